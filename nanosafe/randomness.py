"""Randomness as a function of (seed, purpose, step, row, ...): no global generator, so nothing to save and nothing to
resume.

The same numbers come out whatever the batch, the order, the rank or the number of processes.
"""

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

MASK = 0xFFFFFFFF  # the hash works on 32-bit words held in int64, where products wrap and their low word stays exact


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any sequence of ints and strings."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


@lru_cache(maxsize=8)
def permutation(size: int, *parts: int | str) -> tuple[int, ...]:
    """A permutation of range(size) that depends on `parts` alone."""
    return tuple(torch.randperm(size, generator=torch.Generator().manual_seed(derive_seed(*parts))).tolist())


def shuffled_passes(size: int, positions: range, *parts: int | str) -> list[int]:
    """Items at `positions` of an endless row of passes over range(size), each pass in another order."""
    return [permutation(size, *parts, p // size)[p % size] for p in positions]


def gumbel_noise(seeds: Tensor, steps: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise hashed from (seed, step, token id): seeds [B], steps [B] int64 -> float32 [B, V].

    Seeds are derive_seed's (the unhashed seed 0 gives token 0 of step 0 the largest noise there is).
    argmax(logits + noise) is a draw from softmax(logits). Written as -log(-log1p(-v)) for a uniform v, so that
    the large values, which decide draws, come from small v, where float32 is finest.
    """
    low = _mix((seeds & MASK) ^ _mix(steps))[:, None]
    high = _mix(((seeds >> 32) & MASK) + steps)[:, None]
    bits = _mix(_mix(torch.arange(vocab_size, device=seeds.device)[None, :] ^ low) + high)  # [B, V], 0 .. 2^32 - 1
    uniform = ((bits.float() + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _mix(x: Tensor) -> Tensor:
    """The 32-bit finaliser of MurmurHash3: every input bit flips every output bit with probability near 1/2."""
    x = x & MASK
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK
    return x ^ (x >> 16)
