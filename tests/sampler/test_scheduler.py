"""The scheduler without a model: random schedules over a cache of hashes, which show every block held or lost wrongly.

They count the events they are about (pre-emption, sharing, copying, ...): a schedule in which nothing happens proves
nothing.
"""

import random
from collections import Counter
from itertools import accumulate
from os.path import commonprefix

import pytest

from nanosafe.sampler import engine
from nanosafe.sampler.graphs import GraphRunner
from nanosafe.sampler.scheduler import SHORTEST_SHARED, BlockPool, Scheduler, Sequence


def prompts_with_common_beginnings(rng: random.Random, count: int, longest: int) -> list[list[int]]:
    prompts = []
    while len(prompts) < count:
        trunk = rng.choice(prompts) if prompts and rng.random() < 0.7 else []
        prompt = trunk[: rng.randint(0, len(trunk))] + [rng.randrange(3, 97) for _ in range(rng.randint(0, longest))]
        prompts += [prompt[:2 * longest]] if prompt else []
    return prompts


def random_pool(rng: random.Random, longest: int) -> tuple[int, int, int]:
    """Block size, most rows and blocks, which suffice for anything from the longest sequence alone to a full batch."""
    slots, max_batch = rng.random() < 0.35, rng.choice([1, 3, 6, 12])
    block_size = longest + rng.randint(0, 3) if slots else rng.choice([1, 2, 3, 4, 7, 16])
    width = -(-longest // block_size)
    return block_size, max_batch, rng.randint(width, rng.choice([max_batch, max_batch if slots else 2]) * width)


@pytest.fixture
def events(monkeypatch) -> Counter:
    """How often each thing happened, counted from outside."""
    counts = Counter()

    class CountedPool(BlockPool):
        def share(self, block):
            counts["shared blocks"] += 1
            return super().share(block)

    class CountedScheduler(Scheduler):
        def admit(self):
            copies = super().admit()
            counts["partial copies"] += len(copies)
            return copies

        def _find_donor(self, sequence):
            shared_prefix = super()._find_donor(sequence)
            counts["held back"] += shared_prefix is None
            return shared_prefix

        def prefill(self):
            chunks = super().prefill()
            counts["chunks"] += sum(count < s.pending for s, count in chunks)
            counts["packed prefills"] += len(chunks) > 1
            counts["continued prefills"] += sum(s.cached > 0 for s, _ in chunks)
            return chunks

        def compact(self):
            copies = super().compact()
            counts["moves"] += len(copies)
            return copies

        def remove(self, sequence):
            if sequence.finish_reason is None:
                counts["pre-emptions"] += 1
                counts["pre-emptions with drawn tokens"] += bool(sequence.token_ids)
            super().remove(sequence)

    monkeypatch.setattr(engine, "BlockPool", CountedPool)
    monkeypatch.setattr(engine, "Scheduler", CountedScheduler)
    return counts


EVENTS = ["shared blocks", "partial copies", "held back", "chunks", "packed prefills", "continued prefills", "moves",
          "pre-emptions", "pre-emptions with drawn tokens"]


class Shadow:
    """A scheduler driven as the engine drives it, over a cache that holds, for each position, a hash of the text up
    to there. After every move it checks that no block is lost or held twice and that each text finds its own past."""

    def __init__(self, rng: random.Random):
        self.rng, n = rng, rng.choice([1, 2, 4])
        prompts = prompts_with_common_beginnings(rng, rng.randint(1, 8), 25)
        self.coming = [Sequence(prompt, rng.choice([1, 4, 12, 30]), frozenset([0]), seed=0)
                       for prompt in prompts for _ in range(n)]
        rng.shuffle(self.coming)
        self.hashes = {s: hash_text(s.prompt) for s in self.coming}
        longest = max(s.longest for s in self.coming)
        self.block_size, max_batch, blocks = random_pool(rng, longest)
        self.slots = self.block_size >= longest
        self.most_steps = 1 if self.slots else rng.choice([1, 1, 3, GraphRunner.steps_per_sync])
        self.pool = engine.BlockPool(blocks, self.block_size)
        self.scheduler = engine.Scheduler(self.pool, max_batch, rng.choice([1, 8, 16, 30, 60, 1000]))
        self.cells = [[None] * self.block_size for _ in range(blocks)]

    def run(self) -> None:
        scheduler, patience, rush = self.scheduler, 4000, self.rng.uniform(0.05, 1)
        while self.coming or scheduler.waiting or scheduler.running:
            while self.coming and self.rng.random() < rush:
                scheduler.waiting.append(self.coming.pop())
            self.step()
            patience -= 1
            assert patience, "a sequence waits for ever"
        assert sorted(self.pool.free) == list(range(len(self.cells))) and not any(self.pool.holders)
        assert all(s.finish_reason for s in self.hashes)

    def step(self) -> None:
        self.admit()
        chunks, running = self.prefill(), self.scheduler.running
        for s, count in chunks:
            self.write(s, count)
            if not s.pending:
                self.draw(s)
        if running and not chunks:
            steps = min([self.most_steps, *(s.max_new_tokens - len(s.token_ids) for s in running)])
            self.grow(steps)
            if self.slots:
                self.copy(self.scheduler.compact())
                assert {block for s in running for block in s.blocks} == set(range(len(running)))
            self.check()
            for s in running:
                for _ in range(steps):
                    if not s.finish_reason:
                        self.write(s, 1)
                        self.draw(s)
        self.check()
        for s in list(running):
            if s.finish_reason:
                self.scheduler.remove(s)

    def admit(self) -> None:
        """First come, first served; only who waits for another's prefix is overtaken, and a row is kept for it."""
        queue, before = list(self.scheduler.waiting), list(self.scheduler.running)
        self.copy(self.scheduler.admit())
        running, waiting, free = self.scheduler.running, list(self.scheduler.waiting), len(self.pool.free)
        new = [s for s in queue if s in running]
        assert running == before + new and waiting == [s for s in queue if s not in new]
        assert bool(running) == bool(queue or before)
        growing = [len(s.blocks) < self.pool.blocks_for(s.longest) for s in running]
        overtaken = [s for s in queue[: queue.index(new[-1])] if s not in new] if new else []
        assert len(running) + len(overtaken) <= self.scheduler.max_batch
        for s in new:
            cached, to_come = common_beginning(s, running[: running.index(s)])
            assert s.cached == cached and to_come < SHORTEST_SHARED
        assert all(common_beginning(s, running)[1] >= SHORTEST_SHARED for s in overtaken)
        assert len(running) < 2 or not new or sum(growing[:-1]) <= free
        if waiting and len(running) < self.scheduler.max_batch:
            cached, to_come = common_beginning(waiting[0], running)
            needed = self.pool.blocks_for(len(waiting[0])) - cached // self.block_size
            assert to_come >= SHORTEST_SHARED or needed + sum(growing) > free
        self.check()

    def prefill(self) -> list[tuple[Sequence, int]]:
        """In order, whole ones as long as the budget lasts, or a part of the first."""
        chunks, unready = self.scheduler.prefill(), [s for s in self.scheduler.running if s.pending > 1]
        room = self.scheduler.prefill_tokens - sum(count for _, count in chunks)
        assert room >= 0 and [s for s, _ in chunks] == unready[: len(chunks)] and bool(chunks) == bool(unready)
        if any(count < s.pending for s, count in chunks):
            assert len(chunks) == 1 and room == 0
        elif len(chunks) < len(unready):
            assert unready[len(chunks)].pending > room
        return chunks

    def grow(self, steps: int) -> None:
        """All who stay get room for `steps` tokens; where there is not enough, the youngest go, in order."""
        scheduler, free = self.scheduler, len(self.pool.free)
        before, waiting = list(scheduler.running), list(scheduler.waiting)
        wanted = sum(self.pool.blocks_for(s.cached + steps) - len(s.blocks) for s in before)
        scheduler.grow(steps)
        kept = len(scheduler.running)
        assert kept and scheduler.running == before[:kept] and list(scheduler.waiting) == before[kept:] + waiting
        assert all(len(s.blocks) == self.pool.blocks_for(s.cached + steps) for s in scheduler.running)
        assert (kept == len(before)) == (wanted <= free)

    def copy(self, copies: list[tuple[int, int, int]]) -> None:
        for source, target, positions in copies:
            assert source != target
            self.cells[target][:positions] = self.cells[source][:positions]

    def write(self, s: Sequence, count: int) -> None:
        for position in range(s.cached, s.cached + count):
            block, offset = divmod(position, self.block_size)
            assert self.pool.holders[s.blocks[block]] == 1, "a shared block is written"
            self.cells[s.blocks[block]][offset] = self.hashes[s][position]
        s.cached += count

    def draw(self, s: Sequence) -> None:
        s.token_ids.append(int(self.rng.random() < 0.96))  # 0 stops
        self.hashes[s] += hash_text(s.token_ids[-1:], self.hashes[s][-1])

    def check(self) -> None:
        held = Counter(block for s in self.scheduler.running for block in s.blocks)
        assert self.pool.holders == [held[block] for block in range(len(self.cells))]
        assert sorted(self.pool.free) == [block for block in range(len(self.cells)) if not held[block]]
        assert all(not s.blocks and not s.cached for s in self.scheduler.waiting)
        for block in self.pool.free:
            self.cells[block] = [None] * self.block_size
        for s in self.scheduler.running:
            assert s.cached < len(s) and len(set(s.blocks)) == len(s.blocks) <= self.pool.blocks_for(s.longest)
            past = [text for block in s.blocks for text in self.cells[block]][: s.cached]
            assert past == self.hashes[s][: s.cached], "a position in the cache belongs to another text"


def hash_text(tokens: list[int], start: int = 0) -> list[int]:
    """A hash of the text up to each token."""
    return list(accumulate(tokens, lambda text, token: hash((text, token)), initial=start))[1:]


def common_beginning(s: Sequence, others: list[Sequence]) -> tuple[int, int]:
    """How many tokens of a common prefix the others have in the cache, and how many more are to come."""
    cached = coming = 0
    for other in others:
        common = min(len(commonprefix([s.prompt, other.prompt])), len(s) - 1)
        if common >= SHORTEST_SHARED:
            cached, coming = max(cached, min(common, other.cached)), max(coming, common)
    return cached, coming - cached


def test_no_block_is_lost_shared_wrongly_or_freed_twice_over_1000_schedules(events):
    for seed in range(1000):
        Shadow(random.Random(seed)).run()
    print(dict(events))
    assert all(events[event] > 100 for event in EVENTS)


def test_the_youngest_goes_first_and_comes_back_first():
    scheduler = Scheduler(BlockPool(6, block_size=4), max_batch=8, prefill_tokens=100)
    a, b, c, d = (Sequence([i] * 4, 9, frozenset(), seed=0) for i in range(4))
    scheduler.waiting.extend((a, b, c, d))
    scheduler.admit()
    assert scheduler.running == [a, b, c] and list(scheduler.waiting) == [d]  # each of the three may need one more
    for s in (a, b, c):
        s.cached = 4
    scheduler.grow(8)  # two more each
    assert scheduler.running == [a, b] and list(scheduler.waiting) == [c, d]
    assert (len(a.blocks), len(b.blocks), c.blocks, c.cached) == (3, 3, [], 0)
    b.cached = 11
    scheduler.remove(a)
    scheduler.admit()
    assert scheduler.running == [b, c, d]
