"""Log-prob and entropy of target tokens from hidden states, without the [N, V] logits of a whole batch in memory.

Plain PyTorch: token chunks sized by a byte budget; each chunk's logits live only inside its forward and, recomputed,
inside its backward. All arithmetic on logits is float32, and the weight's gradient adds up over chunks in float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 256 << 20  # float32 logits of one chunk; a few copies of it exist at the peak
# A log-prob of -inf has p = 0 and adds nothing to an entropy, but 0 * -inf would be NaN. Below -1000 p is 0 as well,
# even in float64, so clamping there changes no other result.
LOWEST = -1000.0


def token_logprob_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, *, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
    """hidden [N, D], weight [V, D], targets [N] int64 -> log p(target) [N], entropy in nats [N]; float32 (float64 for
    float64 inputs), differentiable once in hidden and weight.

    p = softmax(hidden @ weight^T / temperature). For a head whose logits are divided by a constant (Granite's
    logits_scaling) multiply the temperature by it.
    """
    rows = max(1, chunk_bytes // (4 * weight.shape[0]))
    return _ChunkedHead.apply(hidden, weight, targets, temperature, rows)


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, rows: int):
        logprobs = hidden.new_empty(len(hidden), dtype=_wide(hidden))
        entropies = torch.empty_like(logprobs)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logp = _log_softmax(hidden[part], weight, temperature)  # [n, V]
            logprobs[part] = logp.gather(1, targets[part, None])[:, 0]
            entropies[part] = -(logp.exp() * logp.clamp_(min=LOWEST)).sum(dim=-1)
        ctx.save_for_backward(hidden, weight, targets, entropies)
        ctx.temperature, ctx.rows = temperature, rows
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs: Tensor, grad_entropies: Tensor):
        """With upstream gradients a and b: d/d logit_j = (a (1{j = target} - p_j) - b p_j (log p_j + entropy)) / T."""
        hidden, weight, targets, entropies = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # In bfloat16 every chunk would round the sum of all chunks before it once more.
        grad_weight = torch.zeros_like(weight, dtype=_wide(weight)) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), ctx.rows):
            part = slice(start, start + ctx.rows)
            a, b, entropy = grad_logprobs[part, None], grad_entropies[part, None], entropies[part, None]  # [n, 1]
            logp = _log_softmax(hidden[part], weight, ctx.temperature)  # [n, V]
            p = logp.exp()
            grad = p.mul_(logp.clamp_(min=LOWEST).add_(entropy).mul_(-b).sub_(a))  # [n, V]
            grad = grad.scatter_add_(1, targets[part, None], a).div_(ctx.temperature).to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[part]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _log_softmax(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(F.linear(hidden, weight).to(_wide(hidden)).div_(temperature), dim=-1)

