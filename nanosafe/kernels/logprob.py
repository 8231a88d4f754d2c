"""Log-prob and entropy of target tokens from hidden states, without the [N, V] logits of a whole batch in memory.

The tokens go through the head in chunks. A chunk's logits are one matrix product into a workspace of `chunk_bytes`, and
one pass over its rows reduces them to a few numbers per token; backward repeats the product, a second pass overwrites
the logits by their gradient, and two more products give those of hidden states and weight. Both passes are written
twice: here in plain PyTorch, which defines them, and in logprob_triton.py with a program for each row. All arithmetic
on logits is float32, and the weight's gradient adds up over chunks in float32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanosafe.kernels import INTERPRETED, triton
from nanosafe.kernels.cpu_matmul import add_weight_gradient, head_rows, linear_into
from nanosafe.kernels.logprob_triton import LOWEST, triton_row_gradients, triton_row_statistics

# Every chunk reads and writes the weight's whole gradient, so few large chunks: at least 1,024 rows up to V = 262,144.
CHUNK_BYTES = 1 << 30
CUDA_ROWS = 256  # of whose multiples a matrix product on a GPU wastes nothing
BLOCK_BYTES = 1 << 20  # the plain passes take this many at a time, which stay in a CPU's cache


def token_logprob_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, *, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
    """hidden [N, D], weight [V, D], targets [N] int64 -> log p(target) [N], entropy in nats [N]; float32 (float64 for
    float64 inputs), differentiable once in hidden and weight.

    p = softmax(hidden @ weight^T / temperature). For a head whose logits are divided by a constant (Granite's
    logits_scaling) multiply the temperature by it. Every target lies in [0, V), for no token is ignored: select those
    that count before the head. Another raises RuntimeError in the plain pass and gives NaN in the Triton kernel.

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
        row_statistics = triton_row_statistics if takes_triton(hidden) else plain_row_statistics
        # Log-prob, entropy, the largest logit, and by how much log sum exp exceeds it. The last two are
        # kept apart because their sum would be rounded where all logits are far from 0.
        statistics = hidden.new_empty(4, len(hidden), dtype=wide(hidden))
        for rows, logits in _chunks(hidden, weight, chunk_bytes):
            row_statistics(logits, targets[rows], temperature, statistics[:, rows])
        ctx.save_for_backward(hidden, weight, targets, statistics)
        ctx.temperature, ctx.chunk_bytes = temperature, chunk_bytes
        return statistics[0].clone(), statistics[1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs: Tensor, grad_entropies: Tensor):
        hidden, weight, targets, statistics = ctx.saved_tensors
        row_gradients = triton_row_gradients if takes_triton(hidden) else plain_row_gradients
        upstream = torch.stack([grad_logprobs, grad_entropies])
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = hidden.new_empty(hidden.shape)
        if ctx.needs_input_grad[1]:
            # In bfloat16 every chunk would round the sum of all chunks before it once more.
            grad_weight = torch.zeros_like(weight, dtype=wide(weight))
        for rows, logits in _chunks(hidden, weight, ctx.chunk_bytes):
            # Each row of gradients lies in the first part of its own logits.
            grads = logits.view(weight.dtype)[:, : len(weight)]
            row_gradients(
                logits, grads, targets[rows], ctx.temperature, statistics[:, rows], upstream[:, rows]
            )
            if grad_hidden is not None:
                linear_into(grad_hidden[rows], grads, weight.T)
            if grad_weight is not None:
                _add_weight_gradient(grad_weight, grads, hidden[rows])
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None


def _chunks(hidden: Tensor, weight: Tensor, chunk_bytes: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows of hidden and their logits [n, V], before temperature, in a workspace that the next overwrite."""
    # Only CUDA has products wider than their factors.
    dtype = wide(hidden) if hidden.is_cuda else hidden.dtype
    chunk_rows = max(1, chunk_bytes // (len(weight) * dtype.itemsize))
    if hidden.is_cuda:
        chunk_rows = chunk_rows // CUDA_ROWS * CUDA_ROWS or chunk_rows
    else:
        chunk_rows = head_rows(chunk_rows, hidden, weight)
    workspace = hidden.new_empty(min(chunk_rows, len(hidden)), len(weight), dtype=dtype)
    options = {} if dtype == hidden.dtype else {"out_dtype": dtype}
    for start in range(0, len(hidden), chunk_rows):
        rows = slice(start, min(start + chunk_rows, len(hidden)))
        yield rows, linear_into(workspace[: rows.stop - start], hidden[rows], weight, **options)


def _add_weight_gradient(total: Tensor, grads: Tensor, hidden: Tensor) -> None:
    """total += grads.T @ hidden, without rounding the product to the factors' type where torch allows it."""
    if total.dtype == grads.dtype:
        add_weight_gradient(total, grads, hidden)
    elif total.is_cuda:
        torch.addmm(total, grads.T, hidden, out_dtype=total.dtype, out=total)
    else:
        total += grads.T @ hidden


def wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def takes_triton(hidden: Tensor) -> bool:
    return triton is not None and (hidden.is_cuda or INTERPRETED) and hidden.dtype != torch.float64


def plain_row_statistics(logits: Tensor, targets: Tensor, temperature: float, statistics: Tensor) -> None:
    """Fill statistics [4, n] from logits [n, V], which are overwritten, and targets [n].

    With z = logits / temperature they are logprob = z_target - peak - logsum, entropy = -sum p log p, peak = max z and
    logsum = log sum exp(z - peak).
    """
    for rows in _blocks(logits):
        z = logits[rows].to(statistics.dtype).div_(temperature)  # [block, V]
        peak = z.amax(dim=1, keepdim=True)
        picked = z.sub_(peak).gather(1, targets[rows, None])[:, 0]
        exp = z.exp()
        total = exp.sum(dim=1)
        logsum = total.log()
        entropy = logsum - exp.mul_(z.clamp_(min=LOWEST)).sum(dim=1) / total
        statistics[:, rows] = torch.stack([picked - logsum, entropy, peak[:, 0], logsum])


def plain_row_gradients(
    logits: Tensor, grads: Tensor, targets: Tensor, temperature: float, statistics: Tensor, upstream: Tensor
) -> None:
    """Fill grads [n, V], which lies in the memory of logits [n, V], with the gradient of logits.

    With upstream gradients a and b [2, n] of log-prob and entropy it is
    d/d logit_j = (a (1{j = target} - p_j) - b p_j (log p_j + entropy)) / temperature.
    """
    _, entropy, peak, logsum = statistics[:, :, None].unbind()  # [n, 1]
    a, b = (upstream / temperature)[:, :, None].unbind()
    for rows in _blocks(logits):
        z = logits[rows].to(statistics.dtype).div_(temperature)  # [block, V]
        logp = z.sub_(peak[rows]).sub_(logsum[rows])
        p = logp.exp()
        by_p = logp.clamp_(min=LOWEST).add_(entropy[rows]).mul_(-b[rows]).sub_(a[rows])
        grads[rows] = p.mul_(by_p).scatter_add_(1, targets[rows, None], a[rows])


def _blocks(logits: Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK_BYTES // (4 * logits.shape[1]))
    for start in range(0, len(logits), rows):
        yield slice(start, start + rows)
