"""How a token is drawn from logits: temperature, top-k, top-p, min-p, and Gumbel-max with hashed noise.

`plain_draw` is the definition. `draw` yields the same tokens faster: by one fused Triton kernel (sample_triton.py), or
on a CPU by the second half of this file.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nanosafe.kernels import INTERPRETED, triton
from nanosafe.kernels.noise import block_argmax, gumbel_argmax, gumbel_noise
from nanosafe.kernels.sample_triton import triton_draw


class SamplingTensors(NamedTuple):
    """How each row of a batch is drawn."""

    temperature: Tensor  # [B] float32; 0: the first of the largest logits, whatever the filters
    top_k: Tensor  # [B] int64; keeps the k best scores and those equal to the k-th; 0: off
    top_p: Tensor  # [B] float64; keeps the smallest set with this share of what is left; 1: off
    min_p: Tensor  # [B] float32; keeps what has this share of the best one's probability; 0: off
    seeds: Tensor  # [B] int64 of 63 bits
    steps: Tensor  # [B] int64, the number of the token to be drawn


def draw(logits: Tensor, params: SamplingTensors, begin: int = 0) -> tuple[Tensor, Tensor]:
    """Draw one token per row of logits [B, V] float32 -> token ids [B] int64, their log-probs [B] float32.

    begin: the first id, a multiple of W, where the logits are a slice of a vocabulary: the draw is the slice's own.
    A log-prob is that of softmax(logits / temperature) before the filters (temperature 0: as 1). The Triton kernel
    reads nothing back to the host, so a CUDA graph can capture it.
    """
    if triton is not None and (logits.is_cuda or INTERPRETED):
        return triton_draw(logits, params, begin)
    return cpu_draw(logits, params, begin)


def plain_draw(logits: Tensor, params: SamplingTensors) -> tuple[Tensor, Tensor]:
    """`draw`, step by step."""
    temperature, top_k, top_p, min_p, seeds, steps = (column[:, None] for column in params)
    scores = logits / torch.where(temperature > 0, temperature, 1.0)
    ranked, ids = scores.sort(descending=True, stable=True)  # Of equals the lower id comes first.
    kth = ranked.gather(1, (top_k - 1).clamp(0, scores.shape[1] - 1))
    ranked = ranked.masked_fill((top_k > 0) & (ranked < kth), -torch.inf)
    probs = ranked.double().softmax(dim=-1)
    ranked = ranked.masked_fill((top_p < 1) & (probs.cumsum(dim=-1) - probs >= top_p), -torch.inf)
    ranked = ranked.masked_fill(ranked < ranked[:, :1] + min_p.log(), -torch.inf)
    kept = scores.scatter(1, ids, ranked)
    noise = gumbel_noise(seeds, steps, torch.arange(scores.shape[1], device=scores.device))
    tokens = torch.where(temperature > 0, kept + noise, scores).argmax(dim=-1, keepdim=True)
    return tokens[:, 0], scores.log_softmax(dim=-1).gather(1, tokens)[:, 0]


# The same on a CPU: no pass over [B, V] that no row needs, and no sort or hash of a whole vocabulary.


def cpu_draw(logits: Tensor, params: SamplingTensors, begin: int = 0) -> tuple[Tensor, Tensor]:
    sampled = params.temperature > 0
    scores = logits
    if (sampled & (params.temperature != 1)).any():
        scores = logits / torch.where(sampled, params.temperature, 1.0)[:, None]
    if not sampled.any():
        tokens = block_argmax(scores)
    else:
        filters = (params.top_k > 0) | (params.top_p < 1) | (params.min_p > 0)
        kept = filter_scores(scores, params) if (sampled & filters).any() else scores
        tokens = gumbel_argmax(kept, params.seeds, params.steps, begin)
        if not sampled.all():
            tokens = torch.where(sampled, tokens, block_argmax(scores))
    logprobs = scores.log_softmax(dim=-1)  # one pass, which logsumexp is not
    return begin + tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def filter_scores(scores: Tensor, params: SamplingTensors) -> Tensor:
    """Set to -inf what top-k, then top-p, then min-p exclude: [B, V] -> [B, V]. The best score always stays."""
    top_k, top_p, min_p = params.top_k, params.top_p, params.min_p
    limited = (top_k > 0) & (top_k < scores.shape[1])
    if limited.any():
        best = scores.topk(int(top_k[limited].max()), dim=-1).values
        kth = best.gather(1, (top_k - 1).clamp(0, best.shape[1] - 1)[:, None])
        least = torch.where(limited[:, None], kth, -torch.inf)
        scores = scores.masked_fill(scores < least, -torch.inf)
    if (top_p < 1).any():
        nucleus = _filter_top_p(scores, (1 - top_p).float()[:, None])
        scores = torch.where(top_p[:, None] < 1, nucleus, scores)
    if min_p.any():
        least = scores.amax(dim=-1, keepdim=True) + min_p.log()[:, None]
        scores = scores.masked_fill(scores < least, -torch.inf)
    return scores


def _filter_top_p(scores: Tensor, spare: Tensor) -> Tensor:
    """Set to -inf the largest set of the lowest scores [B, V] that has at most `spare` [B, 1] of the probability.

    A row with nothing to spare comes out undefined.
    """
    probs = scores.softmax(dim=-1)
    # Tokens this unlikely have at most half of `spare` together, so none of them stays and none needs to be sorted.
    likely = (probs > spare / (2 * probs.shape[1])).count_nonzero(dim=-1) * (spare[:, 0] > 0)
    index = probs.topk(max(int(likely.max()), 1), sorted=False).indices.sort(dim=-1, descending=True).values
    # Ascending, so that small numbers are added first; stable, so that of equals the higher id goes first.
    ordered, order = probs.gather(1, index).sort(dim=-1, stable=True)
    rest = probs.scatter_(1, index, 0.0).sum(dim=-1, keepdim=True)
    excluded = ordered.cumsum(dim=-1) <= spare - rest
    excluded[:, -1] = False
    index = index.gather(1, order)
    kept = scores.gather(1, index).masked_fill(excluded, -torch.inf)
    return torch.full_like(scores, -torch.inf).scatter_(1, index, kept)
