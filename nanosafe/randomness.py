"""Randomness as a function of (seed, purpose, step, row, ...): no generator, so nothing to save and nothing to resume.

The same numbers come out whatever the batch, the order, the rank or the number of processes.
"""

import hashlib
from functools import lru_cache

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any sequence of ints and strings."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@lru_cache(maxsize=8)
def permutation(size: int, *parts: int | str) -> tuple[int, ...]:
    """A permutation of range(size) that depends on `parts` alone."""
    generator = torch.Generator().manual_seed(derive_seed(*parts))
    return tuple(torch.randperm(size, generator=generator).tolist())


def shuffled_passes(size: int, positions: range, *parts: int | str) -> list[int]:
    """Items at `positions` of an endless row of passes over range(size), each pass in another order."""
    items = []
    for position in positions:
        number, place = divmod(position, size)
        items.append(permutation(size, *parts, number)[place])
    return items
