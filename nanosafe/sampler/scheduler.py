"""Who runs, and in which blocks of the cache: plain data, without a tensor.

A `Sequence` is one completion in the making. `BlockPool` counts who holds which cache block. `Scheduler` admits waiting
sequences while rows and blocks last, and says what is prefilled. When blocks run out, the youngest sequence is
preempted: it gives its blocks back, waits, and is computed anew later.
"""

import heapq
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field

SHORTEST_SHARED = 16  # tokens; a shorter common prefix is not worth waiting for or copying


@dataclass(eq=False)
class Sequence:
    """One completion in the making."""

    prompt: list[int]
    max_new_tokens: int
    stop_ids: frozenset[int]
    seed: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    token_ids: list[int] = field(default_factory=list)  # drawn so far
    logprobs: list[float] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)  # the block table
    slot: int = 0  # where the cache keeps the state of its Mamba layers
    cached: int = 0  # leading tokens whose keys and values are in the cache

    def __len__(self) -> int:
        return len(self.prompt) + len(self.token_ids)

    @property
    def pending(self) -> int:
        """Tokens not in the cache: 1 when it is ready to decode, for the last token drawn was never computed."""
        return len(self) - self.cached

    @property
    def longest(self) -> int:
        """Positions it can come to need; the last token drawn needs none."""
        return len(self.prompt) + self.max_new_tokens - 1

    @property
    def finish_reason(self) -> str | None:
        if self.token_ids and self.token_ids[-1] in self.stop_ids:
            return "stop"
        return "length" if len(self.token_ids) >= self.max_new_tokens else None


class BlockPool:
    """Which blocks are free, and how many sequences hold each of the others."""

    def __init__(self, blocks: int, block_size: int):
        self.total, self.block_size = blocks, block_size
        self.free = list(range(blocks))  # A heap: to take the lowest number first keeps slots together.
        self.holders = [0] * blocks

    def take(self) -> int:
        block = heapq.heappop(self.free)
        self.holders[block] = 1
        return block

    def share(self, block: int) -> int:
        self.holders[block] += 1
        return block

    def drop(self, block: int) -> None:
        self.holders[block] -= 1
        if self.holders[block] == 0:
            heapq.heappush(self.free, block)

    def blocks_for(self, positions: int) -> int:
        return -(-positions // self.block_size)


Copy = tuple[int, int, int]  # source block, target block, how many positions
Begin = tuple[int, int | None]  # a slot, and the slot whose state it begins with (None: an empty state)


class Scheduler:
    """Who runs: first come, first served, in at most `max_batch` rows and the blocks of the pool.

    recurrent: the model has Mamba layers, whose state is of exactly the tokens computed and cannot go back. So a
    prefill leaves the last token to decoding: there, a state fits every sequence that begins with the same prompt.
    """

    def __init__(self, pool: BlockPool, max_batch: int, prefill_tokens: int, recurrent: bool = False):
        self.pool, self.max_batch = pool, max_batch
        self.prefill_tokens, self.recurrent = prefill_tokens, recurrent
        self.slots = BlockPool(max_batch, 1)  # of states
        self.begins: list[Begin] = []  # to be done, in order, before a step
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # the oldest first

    def admit(self) -> list[Copy]:
        """Let waiting sequences run while rows and blocks last. Returns the copies to make in the cache before a step.

        A sequence takes over what a running one has in the cache of a common prefix of their prompts: whole blocks are
        shared, the rest is copied. It waits where a running one is about to compute SHORTEST_SHARED tokens or more of
        that prefix, so that the n samples of a longer prompt are prefilled once; its place is kept meanwhile.
        """
        copies, held_back = [], []
        while self.waiting and len(self.running) + len(held_back) < self.max_batch:
            sequence = self.waiting.popleft()
            shared_prefix = self._find_donor(sequence)
            if shared_prefix is None:
                held_back.append(sequence)
                continue
            donor, cached = shared_prefix
            shared, rest = divmod(cached, self.pool.block_size)
            needed = self.pool.blocks_for(len(sequence)) - shared
            # One block more for every sequence that may still grow, or the new one would soon be preempted.
            growing = sum(len(s.blocks) < self.pool.blocks_for(s.longest) for s in self.running)
            if self.running and needed + growing > len(self.pool.free):
                held_back.append(sequence)
                break
            if donor:
                sequence.blocks = [self.pool.share(block) for block in donor.blocks[:shared]]
            sequence.blocks += [self.pool.take() for _ in range(needed)]
            if rest:
                copies.append((donor.blocks[shared], sequence.blocks[shared], rest))
            sequence.cached, sequence.slot = cached, self.slots.take()
            self.begins.append((sequence.slot, donor.slot if donor else None))
            self.running.append(sequence)
        self.waiting.extendleft(reversed(held_back))
        return copies

    def _find_donor(self, sequence: Sequence) -> tuple[Sequence | None, int] | None:
        """The running sequence with the most cached tokens of a common prefix, and how many: (None, 0) if none has any.

        Returns None where it is better to wait, because a running sequence is about to compute enough of the prefix.
        """
        donor, cached = None, 0
        coming = 0  # tokens of the prefix that a running sequence will have in the cache after its prefill
        for other in self.running:
            if other.prompt[:SHORTEST_SHARED] != sequence.prompt[:SHORTEST_SHARED]:
                continue
            # One token is always left to compute: its hidden state draws the next.
            common = min(common_prefix(sequence.prompt, other.prompt), len(sequence) - 1)
            if common < SHORTEST_SHARED:
                continue
            prefilled = common
            if self.recurrent:
                # A state cannot go back, so one that has gone or will go beyond the prefix is of no use.
                if other.cached > common:
                    continue
                prefilled = len(other) - 1 if len(other) - 1 <= common else 0
            coming = max(coming, prefilled)
            if min(common, other.cached) > cached:
                donor, cached = other, min(common, other.cached)
                if cached == len(sequence) - 1:
                    break  # No other can have more.
        if coming - cached >= SHORTEST_SHARED:
            return None
        return donor, cached

    def prefill(self) -> list[tuple[Sequence, int]]:
        """Running sequences that are not ready to decode, each with how many tokens to compute now.

        As many whole ones as the budget takes, or a part of one that is longer than the budget.
        """
        chunks, room = [], self.prefill_tokens
        for sequence in self.running:
            if sequence.pending == 1:
                continue
            count = sequence.pending - 1 if self.recurrent else sequence.pending
            if chunks and count > room:
                break
            count = min(count, room)
            chunks.append((sequence, count))
            room -= count
        return chunks

    def grow(self, steps: int) -> None:
        """Give every running sequence blocks for `steps` more tokens; where none is free, the youngest is preempted."""
        for sequence in list(self.running):
            needed = self.pool.blocks_for(sequence.cached + steps)
            while sequence in self.running and len(sequence.blocks) < needed:
                if self.pool.free:
                    sequence.blocks.append(self.pool.take())
                else:
                    youngest = self.running[-1]
                    self.remove(youngest)
                    self.waiting.appendleft(youngest)

    def compact(self) -> list[Copy]:
        """Where blocks are slots: move sequences so that n running ones hold blocks 0 .. n - 1. Returns the copies."""
        copies = []
        for sequence in self.running:
            [block] = sequence.blocks
            if block >= len(self.running):
                sequence.blocks = [self.pool.take()]
                copies.append((block, sequence.blocks[0], sequence.cached))
                self.pool.drop(block)
        return copies

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of the running ones and give its blocks back."""
        self.running.remove(sequence)
        for block in sequence.blocks:
            self.pool.drop(block)
        self.slots.drop(sequence.slot)
        sequence.blocks, sequence.cached = [], 0


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many leading tokens two prompts share: the first length, found by halving, after which they differ."""
    lengths = range(1, min(len(a), len(b)) + 1)
    return bisect_left(lengths, True, key=lambda length: a[:length] != b[:length])
