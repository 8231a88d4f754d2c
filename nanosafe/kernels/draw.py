"""One fused sampling pass: temperature, top-k, top-p, min-p, log-prob and a seeded draw, from logits to token ids.

A draw is the argmax of score + Gumbel noise, hashed from (seed, step, token id). A Gumbel variable is -log of the time
at which an exponential clock rings; the largest score + noise belongs to the first of clocks with rates exp(score). The
clocks come in blocks of W tokens, top down as in A* sampling (Maddison, Tarlow, Minka 2014): first when the earliest of
a block rings, then whose it is, then the others, which are as good as new at that moment (exponential clocks have no
memory). So W clocks are exactly independent, and one number bounds all noise in a block: only blocks whose bound beats
the best token found are ever hashed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

W = 128  # tokens in a block of clocks; part of what a seed means
MASK = 0xFFFFFFFF  # the hash works on 32-bit words held in int64, where products wrap and their low word stays exact


def draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor,
         steps: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Draw one token per row of logits [B, V] float32 -> token ids [B] int64, their log-probs [B] float32.

    temperature [B] float32 (0: the first of the largest logits, whatever the filters), top_k [B] int64 (0: off),
    top_p [B] float64 (1: off), min_p [B] float32 (0: off), seeds [B] int64 (of 63 bits), steps [B] int64. The log-prob
    is that of softmax(logits / temperature) before the filters (of softmax(logits) at temperature 0).
    """
    sampled = temperature > 0
    scores = logits
    if (sampled & (temperature != 1)).any():
        scores = logits / torch.where(sampled, temperature, 1.0)[:, None]
    logprobs = scores.log_softmax(dim=-1)  # the one reduction torch does without temporaries
    if sampled.any():
        filtered = sampled & ((top_k > 0) | (top_p < 1) | (min_p > 0))
        candidates = filter_scores(scores, top_k, top_p, min_p) if filtered.any() else scores
        tokens = _gumbel_argmax(candidates, seeds, steps)
        if not sampled.all():
            tokens = torch.where(sampled, tokens, scores.argmax(dim=-1))
    else:
        tokens = scores.argmax(dim=-1)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def filter_scores(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Set to -inf what top-k, then top-p (the smallest set reaching p), then min-p (relative to the largest) exclude.

    scores [B, V]; top_k [B] int64 (0: off), top_p [B] float64 (1: off), min_p [B] (0: off) -> [B, V]. Top-k keeps
    every score equal to the k-th best; top-p counts the probability left after top-k; among equal scores the lower id
    counts as better. The best score always stays.
    """
    limited = (top_k > 0) & (top_k < scores.shape[1])
    if limited.any():
        best = scores.topk(int(top_k[limited].max()), dim=-1).values
        kth = best.gather(1, (top_k - 1).clamp(0, best.shape[1] - 1)[:, None])
        scores = scores.masked_fill((scores < kth) & limited[:, None], -torch.inf)
    partial = (top_p < 1).nonzero()[:, 0]
    if len(partial):
        nucleus = _nucleus(scores[partial].softmax(dim=-1), (1 - top_p[partial]).float()[:, None])
        scores = scores.index_copy(0, partial, scores[partial].masked_fill(~nucleus, -torch.inf))
    if min_p.any():
        scores = scores.masked_fill(scores < scores.amax(dim=-1, keepdim=True) + min_p.log()[:, None], -torch.inf)
    return scores


def _nucleus(probs: Tensor, spare: Tensor) -> Tensor:
    """Mark the smallest set whose complement has a probability of at most `spare` [B, 1]: [B, V] -> bool [B, V]."""
    tail = probs <= spare / (2 * probs.shape[1])  # at most spare / 2 together, so none of these is worth sorting
    rest = probs.masked_fill(~tail, 0).sum(dim=-1, keepdim=True)
    probs = probs.masked_fill(tail, 0)
    index = probs.topk(int((~tail).sum(dim=-1).max()), sorted=False).indices.sort(dim=-1, descending=True).values
    # Ascending, so that small numbers are added first; stable, so that of equals the higher id goes first.
    ordered, order = probs.gather(1, index).sort(dim=-1, stable=True)
    kept = ordered.cumsum(dim=-1) > spare - rest
    kept[:, -1] = True
    return torch.zeros_like(tail).scatter_(1, index.gather(1, order), kept)


def _gumbel_argmax(scores: Tensor, seeds: Tensor, steps: Tensor) -> Tensor:
    """argmax over a row of scores + noise, the lower id among equals: [B, V] -> [B]."""
    B, V = scores.shape
    if V % W:
        scores = F.pad(scores, (0, -V % W), value=-torch.inf)
    scores = scores.view(B, -1, W)  # [B, blocks, W]
    first, owner = first_ring(seeds[:, None], steps[:, None], torch.arange(scores.shape[1], device=scores.device))
    highest = -first.log()  # [B, blocks], no noise in the block is larger
    # The best of the owners, whose noise this is, bounds the winner from below: about W tokens a row can be better.
    least = (scores.gather(2, owner[:, :, None])[:, :, 0] + highest).amax(dim=1).clamp(min=torch.finfo().min)
    rows, blocks = (scores.amax(dim=2) + highest >= least[:, None]).nonzero(as_tuple=True)
    able = scores[rows, blocks] + highest[rows, blocks, None] >= least[rows, None]
    near, places = able.nonzero(as_tuple=True)
    rows, tokens = rows[near], blocks[near] * W + places
    perturbed = scores.view(B, -1)[rows, tokens] + gumbel_noise(seeds[rows], steps[rows], tokens)
    best = scores.new_full((B,), -torch.inf).scatter_reduce(0, rows, perturbed, "amax")
    equal = perturbed == best[rows]
    return rows.new_zeros(B).scatter_reduce(0, rows[equal], tokens[equal], "amin", include_self=False)


def gumbel_noise(seeds: Tensor, steps: Tensor, tokens: Tensor) -> Tensor:
    """Independent standard Gumbel noise of token ids -> float32; the int64 arguments broadcast."""
    first, owner = first_ring(seeds, steps, tokens // W)
    later = first + _exponential(_hash(seeds, steps, tokens))
    return -torch.where(tokens % W == owner, first, later).log()


def first_ring(seeds: Tensor, steps: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """When the earliest of a block's W clocks rings, float32, and the place in the block of the token it belongs to."""
    time = _exponential(_hash(seeds, steps, 2**31 + 2 * blocks)) / W
    return time, _hash(seeds, steps, 2**31 + 2 * blocks + 1) % W


def _exponential(bits: Tensor) -> Tensor:
    """A unit exponential from 32 random bits, as -log1p(-v), so that early rings, which decide draws, come from small
    v, where float32 is finest."""
    return -torch.log1p(-((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24))


def _hash(seeds: Tensor, steps: Tensor, counters: Tensor) -> Tensor:
    """32 random bits, in int64, of each counter below 2^32; the arguments broadcast."""
    low = _mix((seeds & MASK) ^ _mix(steps))
    high = _mix(((seeds >> 32) & MASK) + steps)
    return _mix(_mix(counters ^ low) + high)


def _mix(x: Tensor) -> Tensor:
    """The 32-bit finaliser of MurmurHash3: every input bit flips every output bit with probability near 1/2."""
    x = x & MASK
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK
    return x ^ (x >> 16)
