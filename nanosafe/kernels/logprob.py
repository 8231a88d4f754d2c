"""Log-prob and entropy of target tokens from hidden states, without the [N, V] logits of a batch in memory.

The vocabulary goes through the head in tiles of columns, all tokens at once. A tile's logits [N, columns] are one
matrix product; a pass over them updates four numbers per token, which are carried from tile to tile. Backward repeats
the product, a second pass overwrites the logits by their gradient, and one more product completes the weight's gradient
for these columns; only the hidden states' gradient adds up over tiles. Both passes are written twice: here in plain
PyTorch, which defines them, and in logprob_triton.py. All arithmetic on logits, and that sum, is float32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanosafe.kernels import INTERPRETED, triton
from nanosafe.kernels.cpu_matmul import linear
from nanosafe.kernels.logprob_triton import LOWEST, triton_row_gradients, triton_row_statistics

# Of a tile's logits. Every tile reads and writes the hidden states' whole gradient, so few wide ones: 8,192 columns of
# 16,384 tokens. On a CPU they stay in its cache from the product to the pass.
TILE_BYTES, CPU_TILE_BYTES = 512 << 20, 16 << 20
COLUMNS = 1024  # a tile is a multiple of this wide, and at least this wide, so that matrix products waste nothing
BLOCK_BYTES = 1 << 20  # the plain passes take this many at a time, which stay in one core's cache


def token_logprob_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, *, columns: int | None = None
) -> tuple[Tensor, Tensor]:
    """hidden [N, D], weight [V, D], targets [N] int64 -> log p(target) [N], entropy in nats [N]; float32 (float64 for
    float64 inputs), differentiable once in hidden and weight.

    p = softmax(hidden @ weight^T / temperature). For a head whose logits are divided by a constant (Granite's
    logits_scaling) multiply the temperature by it. Every target lies in [0, V), for no token is ignored: select those
    that count before the head. Another raises RuntimeError in the plain pass and gives NaN in the Triton kernel.

    Logits [N, columns] exist at a time, by default `tile_columns`. Backward also holds the hidden states' gradient in
    float32. Half precision on CUDA has its logits and the addends of that gradient in float32, elsewhere rounded.
    """
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {list(targets.shape)} are not one per row of hidden states {list(hidden.shape)}")
    if not takes_triton(hidden) and ((targets < 0) | (targets >= len(weight))).any():
        raise RuntimeError(f"a target is out of bounds of the vocabulary of {len(weight)}")
    columns = columns or tile_columns(len(hidden), hidden.dtype, hidden.is_cuda)
    with torch.cuda.device_of(hidden):  # where Triton launches
        return _TiledHead.apply(hidden, weight, targets.contiguous(), float(temperature), columns)


def tile_columns(tokens: int, dtype: torch.dtype, is_cuda: bool) -> int:
    """Columns of a tile of logits for `tokens` hidden states of `dtype`."""
    numbers = TILE_BYTES // 4 if is_cuda else CPU_TILE_BYTES // dtype.itemsize
    return max(1, numbers // max(tokens, 1) // COLUMNS) * COLUMNS


class _TiledHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, columns: int):
        row_statistics = triton_row_statistics if takes_triton(hidden) else plain_row_statistics
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        statistics = hidden.new_zeros(4, len(hidden), dtype=dtype)
        peak, total, weighted, picked = statistics
        peak.fill_(torch.finfo(dtype).min)  # finite, for a tile may hold nothing but -inf
        picked.fill_(torch.nan)  # until the target's tile comes
        for first in range(0, len(weight), columns):
            # The logits have no name here, so that they are gone before the next tile's are made.
            row_statistics(_logits(hidden, weight[first : first + columns]), targets - first, temperature, statistics)
        logsum = total.log()
        entropy = logsum - weighted / total
        # Peak and logsum are kept apart because their sum would be rounded where all logits are far from 0.
        ctx.save_for_backward(hidden, weight, targets, peak, logsum, entropy)
        ctx.temperature, ctx.columns = temperature, columns
        return picked - peak - logsum, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs: Tensor, grad_entropies: Tensor):
        hidden, weight, targets, peak, logsum, entropy = ctx.saved_tensors
        row_gradients = triton_row_gradients if takes_triton(hidden) else plain_row_gradients
        grads = grad_logprobs / ctx.temperature, grad_entropies / ctx.temperature
        numbers = torch.stack([peak, logsum, entropy, *grads])  # [5, N]
        # In bfloat16 every tile would round the sum of all tiles before it once more.
        grad_hidden = torch.zeros_like(hidden, dtype=numbers.dtype)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for first in range(0, len(weight), ctx.columns):
            tile = slice(first, first + ctx.columns)
            part = weight[tile]  # [columns, D]
            logits = _logits(hidden, part)
            grads = logits.view(weight.dtype)[:, : len(part)]  # a row lies in the first part of its own logits
            row_gradients(logits, grads, targets - first, ctx.temperature, numbers)
            if widens(hidden):
                torch.addmm(grad_hidden, grads, part, out_dtype=torch.float32, out=grad_hidden)
            else:
                grad_hidden += linear(grads, part.T)
            if grad_weight is not None:  # LoRA's head is frozen
                torch.mm(grads.T, hidden, out=grad_weight[tile])
            del logits, grads  # before the next tile's are made
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [N, D] @ weight [columns, D].T, before temperature."""
    return torch.mm(hidden, weight.T, out_dtype=torch.float32) if widens(hidden) else linear(hidden, weight)


def widens(hidden: Tensor) -> bool:
    """Only CUDA has products wider than their factors."""
    return hidden.is_cuda and hidden.dtype.itemsize < 4


def takes_triton(hidden: Tensor) -> bool:
    return triton is not None and (hidden.is_cuda or INTERPRETED) and hidden.dtype != torch.float64


def plain_row_statistics(logits: Tensor, targets: Tensor, temperature: float, statistics: Tensor) -> None:
    """Update statistics [4, N] by a tile's logits [N, columns]; targets [N] count from its first column.

    With z = logits / temperature of all tiles so far they are peak = max z, total = sum exp(z - peak), weighted =
    sum (z - peak) exp(z - peak), and z_target: the online softmax of Milakov and Gimelshein (arXiv:1805.02867).
    """
    for rows in _blocks(logits):
        peak, total, weighted, picked = statistics[:, rows]
        z = logits[rows].to(statistics.dtype).div_(temperature)  # [block, columns]
        place = targets[rows].clamp(0, z.shape[1] - 1)
        picked.copy_(z.gather(1, place[:, None])[:, 0].where(place == targets[rows], picked))
        higher = torch.maximum(peak, z.amax(dim=1))
        fall = (peak - higher).clamp_(min=LOWEST)
        exp = z.sub_(higher[:, None]).exp()
        weighted.addcmul_(fall, total).mul_(fall.exp())
        total.mul_(fall.exp()).add_(exp.sum(dim=1))
        weighted.add_(exp.mul_(z.clamp_(min=LOWEST)).sum(dim=1))
        peak.copy_(higher)


def plain_row_gradients(
    logits: Tensor, grads: Tensor, targets: Tensor, temperature: float, numbers: Tensor
) -> None:
    """Fill grads [N, columns], which lies in the memory of a tile's logits, with their gradient.

    numbers [5, N]: peak, logsum = log sum exp(z - peak), entropy, and the upstream gradients a and b of log-prob and
    entropy over the temperature. d/d logit_j = a (1{j = target} - p_j) - b p_j (log p_j + entropy).
    """
    for rows in _blocks(logits):
        peak, logsum, entropy, a, b = numbers[:, rows, None]  # [block, 1]
        z = logits[rows].to(numbers.dtype).div_(temperature)  # [block, columns]
        place = targets[rows, None].clamp(0, z.shape[1] - 1)
        logp = z.sub_(peak).sub_(logsum)
        p = logp.exp()
        by_p = logp.clamp_(min=LOWEST).add_(entropy).mul_(-b).sub_(a)
        grads[rows] = p.mul_(by_p).scatter_add_(1, place, a * (place == targets[rows, None]))


def _blocks(logits: Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK_BYTES // (4 * logits.shape[1]))
    for start in range(0, len(logits), rows):
        yield slice(start, start + rows)
