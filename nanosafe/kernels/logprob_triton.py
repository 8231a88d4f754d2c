"""The two passes of logprob.py as Triton kernels, a program for each row of logits."""

from torch import Tensor

from nanosafe.kernels import tl, triton

TILE = 4096  # logits that a program of the Triton kernels has in registers at a time
# A log-prob of -inf has p = 0 and adds nothing to an entropy, but 0 * -inf would be NaN. Below -1000 p is 0 as well,
# even in float64, so clamping there changes no other result.
LOWEST = -1000.0


def triton_row_statistics(logits: Tensor, targets: Tensor, temperature: float, statistics: Tensor) -> None:
    """`plain_row_statistics`, but the logits stay as they are."""
    _row_statistics[(len(logits),)](
        logits, targets, temperature, statistics, statistics.stride(0), logits.shape[1],
        TILE=TILE, LOWEST=LOWEST, num_warps=8,
    )  # fmt: skip


def triton_row_gradients(
    logits: Tensor, grads: Tensor, targets: Tensor, temperature: float, statistics: Tensor, upstream: Tensor
) -> None:
    """`plain_row_gradients`."""
    _row_gradients[(len(logits),)](
        logits, grads, targets, temperature, statistics, statistics.stride(0),
        upstream, upstream.stride(0), logits.shape[1], grads.stride(0),
        TILE=TILE, LOWEST=LOWEST, num_warps=8,
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _row_statistics(
        logits, targets, temperature, statistics, column_stride, V, TILE: tl.constexpr, LOWEST: tl.constexpr
    ):
        """Program r reduces row r in one pass, the online softmax of Milakov and Gimelshein (arXiv:1805.02867): `total`
        and `weighted`, per place in a tile, sum exp(z - peak) and (z - peak) exp(z - peak) for the largest z so far."""
        row = tl.program_id(0).to(tl.int64)
        logits += row * V
        # Finite, for a tile may hold nothing but -inf.
        peak = tl.full((), -3.4028234663852886e38, tl.float32)
        total, weighted = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
        for start in range(0, V, TILE):
            z = _load_tile(logits, start, V, temperature, TILE)[1]
            higher = tl.maximum(peak, tl.max(z, 0))
            fall = tl.maximum(peak - higher, LOWEST)
            decay, exp = tl.exp(fall), tl.exp(z - higher)
            weighted = (weighted + fall * total) * decay + exp * tl.maximum(z - higher, LOWEST)
            total = total * decay + exp
            peak = higher
        whole = tl.sum(total, 0)
        logsum = tl.log(whole)
        target = tl.load(targets + row)
        picked = tl.load(logits + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
        statistics += row
        tl.store(statistics, picked / temperature - peak - logsum)
        tl.store(statistics + column_stride, logsum - tl.sum(weighted, 0) / whole)
        tl.store(statistics + 2 * column_stride, peak)
        tl.store(statistics + 3 * column_stride, logsum)

    @triton.jit
    def _row_gradients(
        logits, grads, targets, temperature, statistics, column_stride, upstream, upstream_stride,
        V, grad_stride, TILE: tl.constexpr, LOWEST: tl.constexpr,
    ):  # fmt: skip
        """Program r overwrites row r. Gradients of half the width take half its bytes, from the start of the row on, so
        that a tile of them lands where this tile or an earlier one of logits has been read."""
        row = tl.program_id(0).to(tl.int64)
        logits, grads = logits + row * V, grads + row * grad_stride
        statistics, upstream = statistics + row, upstream + row
        target, entropy = tl.load(targets + row), tl.load(statistics + column_stride)
        peak, logsum = tl.load(statistics + 2 * column_stride), tl.load(statistics + 3 * column_stride)
        a, b = tl.load(upstream) / temperature, tl.load(upstream + upstream_stride) / temperature
        for start in range(0, V, TILE):
            ids, z = _load_tile(logits, start, V, temperature, TILE)
            logp = z - peak - logsum
            grad = tl.where(ids == target, a, 0.0) - tl.exp(logp) * (a + b * (tl.maximum(logp, LOWEST) + entropy))
            tl.debug_barrier()  # all threads have read this tile before one overwrites it
            tl.store(grads + ids, grad.to(grads.dtype.element_ty), mask=ids < V)

    @triton.jit
    def _load_tile(logits, start, V, temperature, TILE: tl.constexpr):
        """Ids and scaled logits from id `start` on; -inf from V on."""
        ids = start + tl.arange(0, TILE)
        return ids, tl.load(logits + ids, mask=ids < V, other=float("-inf")).to(tl.float32) / temperature
