"""Log-prob and entropy of target tokens from hidden states, without the [N, V] logits of a whole batch in memory.

Plain PyTorch: token chunks sized by a byte budget; each chunk's logits live only inside its forward and, recomputed,
inside its backward. All arithmetic on logits is float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 256 << 20  # float32 logits of one chunk; a few copies of it exist at the peak


def token_logprob_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, *, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
    """hidden [N, D], weight [V, D], targets [N] int64 -> log p(target) [N], entropy in nats [N]; float32,
    differentiable in both.

    p = softmax(hidden @ weight^T / temperature). For a head whose logits are divided by a constant (Granite's
    logits_scaling) multiply the temperature by it.
    """
    rows = max(1, chunk_bytes // (4 * weight.shape[0]))
    grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    parts = []
    for h, y in zip(hidden.split(rows), targets.split(rows), strict=True):
        if grad:
            parts.append(checkpoint(_chunk, h, weight, y, temperature, use_reentrant=False))
        else:
            parts.append(_chunk(h, weight, y, temperature))
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _chunk(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight).float() / temperature  # [n, V]
    log_z = logits.logsumexp(dim=-1)
    # H = log Z - sum p z; a -inf logit has p = 0 and adds nothing, but 0 * -inf would be NaN
    mean = (torch.softmax(logits, dim=-1) * logits.clamp(min=torch.finfo(torch.float32).min)).sum(dim=-1)
    return logits.gather(1, targets[:, None])[:, 0] - log_z, log_z - mean
