"""Log-prob and entropy of target tokens from hidden states, without the [N, V] logits of a whole batch in memory.

The tokens go through the head in chunks. A chunk's logits are one matrix product into a workspace of `chunk_bytes`, and
one pass over its rows reduces them to a few numbers per token; backward repeats the product, a second pass overwrites
the logits by their gradient, and two more products give those of hidden states and weight. The matrix products are the
vendor's; the passes are a Triton kernel each, with a row per program, or its plain PyTorch twin. All arithmetic on
logits is float32, and the weight's gradient adds up over chunks in float32.
"""

import os
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanosafe.kernels.cpu_matmul import TILE_ROWS, add_weight_gradient, prefers_onednn, product_into

try:
    import triton
    import triton.language as tl
except ImportError:  # not every platform has it; the plain twin runs everywhere
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton decides the same way, when a kernel is defined

# Every chunk reads and writes the weight's whole gradient, so few large chunks: at least 1,024 rows up to V = 262,144.
CHUNK_BYTES, CPU_CHUNK_BYTES = 1 << 30, 64 << 20
CUDA_ROWS = 256  # of whose multiples a matrix product on a GPU wastes nothing
BLOCK_BYTES = 1 << 20  # the plain passes take this many at a time, which stay in a CPU's cache from step to step
TILE = 4096  # logits that a program of the Triton kernels has in registers at a time
# A log-prob of -inf has p = 0 and adds nothing to an entropy, but 0 * -inf would be NaN. Below -1000 p is 0 as well,
# even in float64, so clamping there changes no other result.
LOWEST = -1000.0


def token_logprob_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, *, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
    """hidden [N, D], weight [V, D], targets [N] int64 -> log p(target) [N], entropy in nats [N]; float32 (float64 for
    float64 inputs), differentiable once in hidden and weight.

    p = softmax(hidden @ weight^T / temperature). For a head whose logits are divided by a constant (Granite's
    logits_scaling) multiply the temperature by it. Every target lies in [0, V), for no token is ignored: select those
    that count before the head. Another raises RuntimeError in the plain twin and gives NaN in the Triton kernel.

    At most `chunk_bytes` of logits, but at least a row, exist at a time. Backward also holds the weight's gradient in
    float32. Half precision on CUDA has its products rounded to float32, elsewhere to the inputs' type.
    """
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {list(targets.shape)} are not one per row of hidden states {list(hidden.shape)}")
    with torch.cuda.device_of(hidden):  # where Triton launches
        return _ChunkedHead.apply(hidden, weight, targets.contiguous(), float(temperature), chunk_bytes)


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_bytes: int):
        row_statistics, _ = _row_passes(hidden)
        # Per token: log-prob, entropy, the largest logit, and by how much log sum exp exceeds it. The last two are kept
        # apart because their sum would be rounded where all logits are far from 0.
        statistics = [hidden.new_empty(len(hidden), dtype=_wide(hidden)) for _ in range(4)]
        for part, logits in _chunks(hidden, weight, chunk_bytes):
            row_statistics(logits, targets[part], temperature, *(x[part] for x in statistics))
        logprobs, *saved = statistics
        ctx.save_for_backward(hidden, weight, targets, *saved)
        ctx.temperature, ctx.chunk_bytes = temperature, chunk_bytes
        return logprobs, saved[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs: Tensor, grad_entropies: Tensor):
        hidden, weight, targets, *saved = ctx.saved_tensors
        _, row_gradients = _row_passes(hidden)
        rows = [targets, *saved, grad_logprobs.contiguous(), grad_entropies.contiguous()]
        grad_hidden = hidden.new_empty(hidden.shape) if ctx.needs_input_grad[0] else None
        # In bfloat16 every chunk would round the sum of all chunks before it once more.
        grad_weight = torch.zeros_like(weight, dtype=_wide(weight)) if ctx.needs_input_grad[1] else None
        for part, logits in _chunks(hidden, weight, ctx.chunk_bytes):
            grad = row_gradients(logits, ctx.temperature, weight.dtype, *(x[part] for x in rows))  # [n, V]
            if grad_hidden is not None:
                product_into(grad_hidden[part], grad, weight.T)
            if grad_weight is not None:
                _add_weight_gradient(grad_weight, grad, hidden[part])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _chunks(hidden: Tensor, weight: Tensor, chunk_bytes: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows `part` of hidden and their logits [n, V], before temperature, in a workspace that the next overwrite."""
    dtype = _wide(hidden) if hidden.is_cuda else hidden.dtype  # only CUDA has products wider than their factors
    row_bytes = len(weight) * dtype.itemsize
    rows = max(1, chunk_bytes // row_bytes)
    if hidden.is_cuda:
        rows = rows // CUDA_ROWS * CUDA_ROWS or rows
    else:
        # A smaller workspace is memory that was used before, which is faster than fresh memory.
        rows = min(rows, max(512, CPU_CHUNK_BYTES // row_bytes))
        if prefers_onednn(hidden, weight):
            rows = max(rows // 2, rows - TILE_ROWS)  # product_into makes tiles besides
        rows = 1 << (rows.bit_length() - 1)  # a power of two, which matrix products are tuned for
    workspace = hidden.new_empty(min(rows, len(hidden)), len(weight), dtype=dtype)
    wider = {} if dtype == hidden.dtype else {"out_dtype": dtype}
    for start in range(0, len(hidden), rows):
        part = slice(start, min(start + rows, len(hidden)))
        yield part, product_into(workspace[: part.stop - start], hidden[part], weight, **wider)


def _add_weight_gradient(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """total += grad.T @ hidden, without rounding the product to the factors' type where torch allows it."""
    if total.dtype == grad.dtype:
        add_weight_gradient(total, grad, hidden)
    elif total.is_cuda:
        torch.addmm(total, grad.T, hidden, out_dtype=total.dtype, out=total)
    else:
        total += grad.T @ hidden


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _row_passes(hidden: Tensor):
    """The forward and the backward pass over rows of logits."""
    if triton is not None and (hidden.is_cuda or INTERPRETED) and hidden.dtype != torch.float64:
        return triton_row_statistics, triton_row_gradients
    return plain_row_statistics, plain_row_gradients


def plain_row_statistics(
    logits: Tensor, targets: Tensor, temperature: float, logprobs: Tensor, entropies: Tensor, peaks: Tensor,
    logsums: Tensor,
) -> None:  # fmt: skip
    """Fill the last four [n] from logits [n, V], which are overwritten, and targets [n]: with z = logits / temperature,
    peak = max z, logsum = log sum exp(z - peak), logprob = z_target - peak - logsum, entropy = -sum p log p."""
    outputs = (logprobs, entropies, peaks, logsums)
    for z, target, *block in _in_blocks(logits, targets, *outputs):
        z = z.to(logprobs.dtype).div_(temperature)  # [block, V]
        peak = z.amax(dim=1, keepdim=True)
        picked = z.sub_(peak).gather(1, target[:, None])[:, 0]
        exp = z.exp()
        total = exp.sum(dim=1)
        logsum = total.log()
        entropy = logsum - exp.mul_(z.clamp_(min=LOWEST)).sum(dim=1) / total
        for output, values in zip(block, (picked - logsum, entropy, peak[:, 0], logsum), strict=True):
            output.copy_(values)


def plain_row_gradients(
    logits: Tensor, temperature: float, dtype: torch.dtype, targets: Tensor, entropies: Tensor, peaks: Tensor,
    logsums: Tensor, grad_logprobs: Tensor, grad_entropies: Tensor,
) -> Tensor:  # fmt: skip
    """Overwrite logits [n, V] by their gradient of a type that is no wider, and return it as a view, [n, V].

    With upstream gradients a and b: d/d logit_j = (a (1{j = target} - p_j) - b p_j (log p_j + entropy)) / temperature.
    """
    grads = logits.view(dtype)[:, : logits.shape[1]]  # each row in the first part of its own logits
    upstream = grad_logprobs / temperature, grad_entropies / temperature
    for z, grad, target, *columns in _in_blocks(logits, grads, targets, entropies, peaks, logsums, *upstream):
        entropy, peak, logsum, a, b = (x[:, None] for x in columns)  # [block, 1]
        logp = z.to(entropies.dtype).div_(temperature).sub_(peak).sub_(logsum)  # [block, V]
        p = logp.exp()
        by_p = logp.clamp_(min=LOWEST).add_(entropy).mul_(-b).sub_(a)
        grad.copy_(p.mul_(by_p).scatter_add_(1, target[:, None], a))
    return grads


def _in_blocks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """All tensors cut alike into blocks of rows."""
    rows = max(1, BLOCK_BYTES // (4 * logits.shape[1]))
    return zip(*(x.split(rows) for x in (logits, *others)), strict=True)


def triton_row_statistics(
    logits: Tensor, targets: Tensor, temperature: float, logprobs: Tensor, entropies: Tensor, peaks: Tensor,
    logsums: Tensor,
) -> None:  # fmt: skip
    """`plain_row_statistics` by the kernel below, which leaves the logits as they are."""
    _row_statistics[(len(logits),)](
        logits, targets, temperature, logprobs, entropies, peaks, logsums, logits.shape[1],
        TILE=TILE, LOWEST=LOWEST, num_warps=8,
    )  # fmt: skip


def triton_row_gradients(
    logits: Tensor, temperature: float, dtype: torch.dtype, targets: Tensor, entropies: Tensor, peaks: Tensor,
    logsums: Tensor, grad_logprobs: Tensor, grad_entropies: Tensor,
) -> Tensor:  # fmt: skip
    """`plain_row_gradients` by the kernel below."""
    grads = logits.view(dtype)[:, : logits.shape[1]]
    _row_gradients[(len(logits),)](
        logits, grads, temperature, targets, entropies, peaks, logsums, grad_logprobs, grad_entropies,
        logits.shape[1], grads.stride(0), TILE=TILE, LOWEST=LOWEST, num_warps=8,
    )  # fmt: skip
    return grads


if triton is not None:

    @triton.jit
    def _row_statistics(
        logits, targets, temperature, logprobs, entropies, peaks, logsums, V, TILE: tl.constexpr, LOWEST: tl.constexpr
    ):
        """Program r reduces row r in one pass, the online softmax of Milakov and Gimelshein (arXiv:1805.02867): `total`
        and `weighted`, per place in a tile, sum exp(z - peak) and (z - peak) exp(z - peak) for the largest z so far."""
        row = tl.program_id(0).to(tl.int64)
        logits += row * V
        peak = tl.full((), -3.4028234663852886e38, tl.float32)  # finite, for a tile may hold nothing but -inf
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
        tl.store(logprobs + row, picked / temperature - peak - logsum)
        tl.store(entropies + row, logsum - tl.sum(weighted, 0) / whole)
        tl.store(peaks + row, peak)
        tl.store(logsums + row, logsum)

    @triton.jit
    def _row_gradients(
        logits, grads, temperature, targets, entropies, peaks, logsums, grad_logprobs, grad_entropies, V, grad_stride,
        TILE: tl.constexpr, LOWEST: tl.constexpr,
    ):  # fmt: skip
        """Program r overwrites row r. Gradients of half the width take half its bytes, from the start of the row on, so
        that a tile of them lands where this tile or an earlier one of logits has been read."""
        row = tl.program_id(0).to(tl.int64)
        logits, grads = logits + row * V, grads + row * grad_stride
        target, entropy = tl.load(targets + row), tl.load(entropies + row)
        peak, logsum = tl.load(peaks + row), tl.load(logsums + row)
        a, b = tl.load(grad_logprobs + row) / temperature, tl.load(grad_entropies + row) / temperature
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
