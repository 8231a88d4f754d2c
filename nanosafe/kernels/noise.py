"""Gumbel noise as a function of (seed, step, token id), and the argmax of scores with this noise.

To draw from a softmax is to take the argmax of score + Gumbel noise, independent for each token. The noise is hashed,
so a draw depends on no generator's state, and on neither the batch nor the rank.

Gumbel noise is -log of the time at which an exponential clock rings. The clocks come in blocks of W tokens, top down as
in A* sampling (Maddison, Tarlow and Minka, arXiv:1411.0030): first when the earliest of a block rings, then which token
owns it, then how much later each other rings, which is exponential again, for these clocks have no memory. The noise of
all tokens is exactly independent, yet the earliest ring bounds it in a whole block. So `gumbel_argmax` hashes only the
few tokens that can win one by one: hashing a whole vocabulary would take a CPU longer than a small model's step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanosafe.kernels import tl, triton

W = 128  # tokens in a block of clocks; part of what a seed means
BLOCKS = 2**31  # Counters from here on are hashed for blocks, those below for tokens.
# The hash works on 32-bit words held in int64, where products wrap and their low word stays exact.
MASK = 0xFFFFFFFF


def gumbel_noise(seeds: Tensor, steps: Tensor, tokens: Tensor) -> Tensor:
    """Independent standard Gumbel noise, float32, of each token id; the int64 arguments broadcast."""
    keys = noise_keys(seeds, steps)
    return token_noise(keys, tokens, *first_ring(keys, tokens // W))


def token_noise(keys: Tensor, tokens: Tensor, first: Tensor, owner: Tensor) -> Tensor:
    """`gumbel_noise` of tokens whose blocks' first rings are known."""
    later = first + exponential(hash_words(keys, tokens))
    return -torch.where(tokens % W == owner, first, later).log()


def first_ring(keys: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """When the earliest of a block's W clocks rings, float32, and the place in the block of the token that owns it."""
    time = exponential(hash_words(keys, BLOCKS + 2 * blocks)) / W
    owner = hash_words(keys, BLOCKS + 2 * blocks + 1) % W
    return time, owner


def exponential(words: Tensor) -> Tensor:
    """A unit exponential from 32 random bits: -log1p(-v), so that early rings, which decide draws, come from small v,
    where float32 is finest."""
    v = ((words.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log1p(-v)


def noise_keys(seeds: Tensor, steps: Tensor) -> Tensor:
    """Two 32-bit keys, in int64, of each (seed, step): [...] -> [2, ...]."""
    return torch.stack((mix((seeds & MASK) ^ mix(steps)), mix(((seeds >> 32) & MASK) + steps)))


def hash_words(keys: Tensor, counters: Tensor) -> Tensor:
    """32 random bits in int64 for each counter below 2^32; keys [2, ...] and counters broadcast."""
    low, high = keys
    return mix(mix(counters ^ low) + high)


def mix(x: Tensor) -> Tensor:
    """The 32-bit finaliser of MurmurHash3: every input bit flips every output bit with probability near 1/2."""
    x = x & MASK
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK
    return x ^ (x >> 16)


def gumbel_argmax(scores: Tensor, seeds: Tensor, steps: Tensor, begin: int = 0) -> Tensor:
    """(scores + gumbel_noise).argmax(dim=-1), the first among equals: [B, V] -> [B], counted from 0.

    begin: the token id of the first score, a multiple of W.
    """
    scores = in_blocks(scores)
    B, count, _ = scores.shape
    keys = noise_keys(seeds, steps)  # [2, B]
    first, owner = first_ring(keys[:, :, None], begin // W + torch.arange(count, device=scores.device))
    highest = -first.log()  # [B, blocks] noise of the owners, which bounds that of their blocks
    # The winner is no worse than the best owner. Whatever the scores, only about W tokens of a row can be better.
    owners = scores.gather(2, owner[:, :, None])[:, :, 0] + highest
    least = owners.amax(dim=1).clamp(min=torch.finfo(scores.dtype).min)
    # First the blocks that could win, then their tokens that could.
    rows, blocks = (scores.amax(dim=2) + highest >= least[:, None]).nonzero(as_tuple=True)
    bounds = scores[rows, blocks] + highest[rows, blocks, None]
    hits, places = (bounds >= least[rows, None]).nonzero(as_tuple=True)
    rows, blocks = rows[hits], blocks[hits]
    tokens = blocks * W + places
    noise = token_noise(keys[:, rows], begin + tokens, first[rows, blocks], owner[rows, blocks])
    perturbed = scores.flatten(1)[rows, tokens] + noise
    best = scores.new_full((B,), -torch.inf).scatter_reduce(0, rows, perturbed, "amax")
    winners = perturbed == best[rows]
    return rows.new_zeros(B).scatter_reduce(0, rows[winners], tokens[winners], "amin", include_self=False)


def block_argmax(scores: Tensor) -> Tensor:
    """scores.argmax(dim=-1), the first among equals, several times as fast: [B, V] -> [B]."""
    blocks = in_blocks(scores)
    block = blocks.amax(dim=2).argmax(dim=1)
    rows = torch.arange(len(block), device=block.device)
    return block * W + blocks[rows, block].argmax(dim=1)


def in_blocks(scores: Tensor) -> Tensor:
    """[B, V] -> [B, blocks, W], the last block filled up with -inf."""
    if scores.shape[1] % W:
        scores = F.pad(scores, (0, -scores.shape[1] % W), value=-torch.inf)
    return scores.unflatten(1, (-1, W))


# The same hash for the kernel of sample_triton.py, on 32-bit words.

if triton is not None:

    @triton.jit
    def triton_exponential(words):
        """`exponential`. There is no log1p here: log(u) v / (1 - u) repairs the rounding of u = 1 - v (Kahan)."""
        v = tl.minimum((words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1 - 5.9604644775390625e-08)
        u = 1 - v
        return tl.where(u == 1, v, -tl.log(u) * (v / tl.where(u == 1, 1.0, 1 - u)))

    @triton.jit
    def triton_hash(counters, key_low, key_high):
        return triton_mix(triton_mix(counters ^ key_low) + key_high)

    @triton.jit
    def triton_mix(x):
        x = (x ^ (x >> 16)) * 0x85EBCA6B
        x = (x ^ (x >> 13)) * 0xC2B2AE35
        return x ^ (x >> 16)
