"""The two passes of logprob.py as Triton kernels, a program for each row of a tile of logits."""

from torch import Tensor

from nanosafe.kernels import tl, triton

BLOCK = 4096  # logits that a program of the Triton kernels has in registers at a time
# A log-prob of -inf has p = 0 and adds nothing to an entropy, but 0 * -inf would be NaN. Below -1000 p is 0 as well,
# even in float64, so clamping there changes no other result.
LOWEST = -1000.0


def triton_row_statistics(logits: Tensor, targets: Tensor, temperature: float, statistics: Tensor) -> None:
    """`plain_row_statistics`."""
    N, columns = logits.shape
    _row_statistics[(N,)](
        logits, targets, temperature, statistics, N, columns, BLOCK=BLOCK, LOWEST=LOWEST, num_warps=8
    )


def triton_row_gradients(
    logits: Tensor, grads: Tensor, targets: Tensor, temperature: float, numbers: Tensor
) -> None:
    """`plain_row_gradients`."""
    N, columns = logits.shape
    _row_gradients[(N,)](
        logits, grads, targets, temperature, numbers, N, columns, grads.stride(0),
        BLOCK=BLOCK, LOWEST=LOWEST, num_warps=8,
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _row_statistics(
        logits, targets, temperature, statistics, N, columns, BLOCK: tl.constexpr, LOWEST: tl.constexpr
    ):
        """Program r updates the numbers of row r; each place in a block has a total and a weighted sum of its own."""
        row = tl.program_id(0).to(tl.int64)
        logits, statistics = logits + row * columns, statistics + row
        is_first = tl.arange(0, BLOCK) == 0  # the place that takes the sums of earlier tiles
        peak = tl.load(statistics)
        total = tl.where(is_first, tl.load(statistics + N), 0.0)
        weighted = tl.where(is_first, tl.load(statistics + 2 * N), 0.0)
        for start in range(0, columns, BLOCK):
            z = _load_block(logits, start, columns, temperature, BLOCK)[1]
            higher = tl.maximum(peak, tl.max(z, 0))
            fall = tl.maximum(peak - higher, LOWEST)
            decay, exp = tl.exp(fall), tl.exp(z - higher)
            weighted = (weighted + fall * total) * decay + exp * tl.maximum(z - higher, LOWEST)
            total = total * decay + exp
            peak = higher
        tl.store(statistics, peak)
        tl.store(statistics + N, tl.sum(total, 0))
        tl.store(statistics + 2 * N, tl.sum(weighted, 0))
        target = tl.load(targets + row)
        inside = (target >= 0) & (target < columns)
        picked = tl.load(logits + target, mask=inside, other=0.0).to(tl.float32)
        tl.store(statistics + 3 * N, picked / temperature, mask=inside)

    @triton.jit
    def _row_gradients(
        logits, grads, targets, temperature, numbers, N, columns, grad_stride,
        BLOCK: tl.constexpr, LOWEST: tl.constexpr,
    ):  # fmt: skip
        """Program r overwrites row r. Gradients of half the width take half its bytes, from the start of the row on, so
        that a block of them lands where this block or an earlier one of logits has been read."""
        row = tl.program_id(0).to(tl.int64)
        logits, grads, numbers = logits + row * columns, grads + row * grad_stride, numbers + row
        target = tl.load(targets + row)
        peak, logsum, entropy = tl.load(numbers), tl.load(numbers + N), tl.load(numbers + 2 * N)
        a, b = tl.load(numbers + 3 * N), tl.load(numbers + 4 * N)
        for start in range(0, columns, BLOCK):
            ids, z = _load_block(logits, start, columns, temperature, BLOCK)
            logp = z - peak - logsum
            grad = tl.where(ids == target, a, 0.0) - tl.exp(logp) * (a + b * (tl.maximum(logp, LOWEST) + entropy))
            tl.debug_barrier()  # all threads have read this block before one overwrites it
            tl.store(grads + ids, grad.to(grads.dtype.element_ty), mask=ids < columns)

    @triton.jit
    def _load_block(logits, start, columns, temperature, BLOCK: tl.constexpr):
        """Columns and scaled logits from column `start` on; -inf from `columns` on."""
        ids = start + tl.arange(0, BLOCK)
        return ids, tl.load(logits + ids, mask=ids < columns, other=float("-inf")).to(tl.float32) / temperature
