"""The sampling engine over random schedules: its blocks without a model, its tokens against a sampler without a cache.

Both kinds count the events they are about (pre-emption, sharing, copying, ...): a schedule in which nothing happens
proves nothing.
"""

import dataclasses
import random
from collections import Counter
from functools import lru_cache
from itertools import accumulate
from os.path import commonprefix

import pytest
import torch
from test_randomness import python_noise
from test_sampler import PROMPTS, Spy, count_divergences, models, transformers_greedy, warped, with_changes
from tiny_models import decoder_like, tiny_raw

from nanosafe.randomness import derive_seed
from nanosafe.sampler import Completion, SamplingParams, engine, generate, graphs, sequence
from nanosafe.sampler.engine import Engine
from nanosafe.sampler.graphs import GraphRunner
from nanosafe.sampler.runner import SlotRunner
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


# Schedules without a model


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
        self.most_steps = 1 if self.slots else rng.choice([1, 1, 3, GraphRunner.steps_per_look])
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


# Schedules with a model


def slow_completion(reference, prompt: list[int], params: SamplingParams, sample: int, eos: int) -> Completion:
    """transformers' model on the whole text, its own filters, and the pure-Python noise, one token at a time."""
    tokens, logprobs, reason = [], [], None
    while reason is None:
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + tokens])).logits[:, -1]
        scores = warped(logits, params)[0].double()
        if params.temperature:
            seed = derive_seed(params.seed, sample, *prompt)
            scores += torch.tensor([python_noise(seed, len(tokens), v) for v in range(len(scores))])
        tokens.append(int(scores.argmax()))
        logprobs.append(float((logits[0].double() / (params.temperature or 1.0)).log_softmax(0)[tokens[-1]]))
        if tokens[-1] in {*params.stop_token_ids, None if params.ignore_eos else eos}:
            reason = "stop"
        elif len(tokens) == params.max_new_tokens:
            reason = "length"
    return Completion(tokens, logprobs, reason)


KINDS = [
    dict(temperature=1.0),
    dict(temperature=0.0),
    dict(temperature=0.7, top_p=0.9, stop_token_ids=(11, 12, 13)),
    dict(temperature=1.3, top_k=20, min_p=0.02, ignore_eos=True),
    dict(temperature=0.0, stop_token_ids=tuple(range(3, 10))),
]


@lru_cache
def solved(family: str) -> list[tuple]:
    """((prompt, params, sample), its slow completion) of 26 prompts, many of which begin alike."""
    rng, pairs = random.Random(1), []
    for prompt in prompts_with_common_beginnings(rng, 26, 35):
        n, length, kind = rng.choice([1, 2, 3]), rng.choice([1, 5, 12, 25]), rng.choice(KINDS)
        params = SamplingParams(max_new_tokens=length, n=n, seed=rng.randrange(5), **kind)
        pairs += [(prompt, params, sample) for sample in range(n)]
    return [(one, slow_completion(models(family)[0], *one, eos=2)) for one in pairs]


class EagerGraph:
    """A DecodeGraph that needs no CUDA: a replay does the step."""

    def __init__(self, step, batch, memory_pool):
        self.batch, self.replay = batch, lambda: step(batch)


@pytest.fixture
def decode_by_graphs(monkeypatch):
    """Has an engine on the CPU decode by graphs, as on CUDA: rows are filled up, several steps go between two looks."""
    monkeypatch.setattr(graphs, "DecodeGraph", EagerGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)

    def change(running: Engine) -> None:
        running.runner = GraphRunner(running.runner.model, running.cache, running.table_width)

    return change


def random_engine(rng: random.Random, model, longest: int) -> Engine:
    block_size, max_batch, blocks = random_pool(rng, longest)
    config = model.config
    block_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4 * block_size
    made = Engine(model, max_tokens=longest, max_batch=max_batch, block_size=block_size,
                  cache_bytes=blocks * block_bytes + rng.randrange(block_bytes),
                  prefill_tokens=rng.choice([rng.randint(1, 40), 1000]))
    assert isinstance(made.runner, SlotRunner) == (block_size >= longest)
    blocks = min(blocks, max_batch * -(-longest // block_size))
    assert made.scheduler.pool.total == blocks
    assert made.cache.keys.nbytes + made.cache.values.nbytes == (blocks + 1) * block_bytes  # and one for scratch
    return made


def test_random_schedules_yield_what_a_slow_sampler_does(events, decode_by_graphs):
    """A third of the engines with pages decode as on CUDA."""
    totals = Counter()
    for seed in range(60):
        rng, family = random.Random(seed), "granite" if seed % 3 == 0 else "qwen3"
        reference, model = models(family)
        start = rng.randrange(len(solved(family)))
        chosen = (solved(family) * 2)[start : start + rng.randint(2, 20)]  # neighbours, whose prompts begin alike
        rng.shuffle(chosen)
        sequences = [sequence(model, prompt, params, 0, sample) for (prompt, params, sample), _ in chosen]
        coming, running = list(sequences), random_engine(rng, model, max(s.longest for s in sequences))
        if not isinstance(running.runner, SlotRunner) and rng.random() < 0.4:
            decode_by_graphs(running)
        while coming or running.busy:
            while coming and (not running.busy or rng.random() < 0.4):
                running.add(coming.pop(0))
            running.step()
        captured = getattr(running.runner, "graphs", {})
        events["graphs"] += len(captured)
        assert set(captured) <= {1, 2, 4, 8, 16}
        divergences, tokens = count_divergences(reference, *zip(*chosen, strict=True), sequences)
        totals.update(divergences=divergences, tokens=tokens)
        assert sorted(running.scheduler.pool.free) == list(range(running.scheduler.pool.total))
    print(dict(totals), dict(events))
    assert totals["divergences"] * 1000 <= totals["tokens"]
    assert all(events[event] > 5 for event in [*EVENTS, "graphs"])


# One case each

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=20, ignore_eos=True)
LONG = list(range(3, 45))  # 42 tokens


def greedy(prompt: list[int], max_new_tokens: int = 20) -> Sequence:
    return Sequence(prompt, max_new_tokens, frozenset(), seed=0, temperature=0.0)


def test_a_request_that_can_never_fit_is_refused_with_both_sizes():
    model = with_changes("qwen3", max_position_embeddings=100_000)
    params = dataclasses.replace(GREEDY, max_new_tokens=50_000)
    # (2 + 50,000 - 1 positions in 3,126 blocks of 16) * 512 bytes
    with pytest.raises(ValueError, match=r"50001 tokens needs 24\.4 MiB of cache.* 10\.0 may be used"):
        generate(model, [[5], [5, 6]], params, cache_bytes=10 * 2**20, block_size=16)


@pytest.mark.parametrize("option", ["max_batch", "prefill_tokens", "block_size"])
def test_options_below_1_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        generate(models("qwen3")[1], [LONG], GREEDY, **{option: 0})


@pytest.mark.parametrize("block_size, needed", [(None, 61 * 512), (7, 9 * 7 * 512)])
def test_the_longest_request_fits_into_exactly_what_it_needs(block_size, needed):
    """42 + 20 - 1 positions: the last token drawn needs none."""
    [[completion]] = generate(models("qwen3")[1], [LONG], GREEDY, block_size=block_size, cache_bytes=needed)
    assert completion.token_ids == transformers_greedy("qwen3", LONG, tokens=20)
    with pytest.raises(ValueError, match="needs 0.0 MiB"):
        generate(models("qwen3")[1], [LONG], GREEDY, block_size=block_size, cache_bytes=needed - 1)


@pytest.mark.parametrize("block_size", [None, 4])
def test_the_samples_of_a_prompt_are_prefilled_once(block_size, monkeypatch):
    spy = Spy(monkeypatch)
    params = [SamplingParams(max_new_tokens=5, n=n, seed=0, ignore_eos=True) for n in (6, 1)]
    generate(models("qwen3")[1], [LONG, LONG[:40] + [90] * 5], params, block_size=block_size, prefill_tokens=24)
    # Two chunks of the first prompt; then what the other has of its own. The last token of a sample is decoded.
    assert spy.prefills == [[24], [18], [5]]
    # Of 41 tokens 10 blocks of 4 are shared and one token is copied. The first slot to become free is filled at last.
    assert spy.copies == (6 + 1 if block_size is None else 5)


def test_blocks_of_a_common_prefix_are_counted_once():
    running = Engine(models("qwen3")[1], max_tokens=61, max_batch=8, block_size=4)
    pool = running.scheduler.pool
    first, second, third, other = map(greedy, (LONG, LONG, LONG[:36] + [90] * 8, [1, *LONG]))
    for s in (first, second, third, other):
        running.add(s)
    running.step()
    assert running.scheduler.running == [first, other]  # the others wait for what is being computed
    running.step()
    assert first.blocks[:10] == second.blocks[:10] and first.blocks[:9] == third.blocks[:9]
    assert [pool.holders[block] for block in first.blocks] == [3] * 9 + [2, 1]
    assert pool.total - len(pool.free) == 11 + 1 + (11 - 9) + 11
    while running.busy:
        running.step()
    assert sorted(pool.free) == list(range(pool.total))


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


def test_an_engine_outlives_its_requests():
    model, prompts = models("qwen3")[1], PROMPTS + [LONG]
    for block_size in (None, 3):
        running = Engine(model, max_tokens=80, max_batch=2, block_size=block_size)
        for prompt in prompts + prompts[::-1]:
            assert not running.busy
            s = greedy(prompt)
            running.add(s)
            drew = []
            while running.busy:
                drew += running.step()
            assert s.token_ids == transformers_greedy("qwen3", prompt, tokens=20) and drew == [s] * 20
            assert s.finish_reason == "length" and s.blocks == []
        with pytest.raises(ValueError, match="82 tokens is longer than the engine's max_tokens"):
            running.add(greedy(LONG, 41))


def test_what_was_drawn_after_the_end_is_dropped():
    """Between two looks of the host a sequence goes on after its stop token; a limit falls on a look."""
    running = Engine(models("qwen3")[1], max_tokens=20)
    stopped, full, going = (Sequence([5, 6], n, frozenset([9]), seed=0) for n in (10, 3, 10))
    drawn = torch.tensor([[7, 9, 7], [7, 7, 7], [8, 7, 1], [0, 0, 0]])  # the last row fills the batch up
    running._append([stopped, full, going], list(drawn.T), list(drawn.T / -8.0))
    assert [s.token_ids for s in (stopped, full, going)] == [[7, 9], [7, 7, 7], [8, 7, 1]]
    assert stopped.logprobs == [-7 / 8, -9 / 8] and going.logprobs == [-1.0, -7 / 8, -1 / 8]
    assert [s.finish_reason for s in (stopped, full, going)] == ["stop", "length", None]
    assert going.cached == 4  # its last token was never computed


def test_several_steps_go_between_two_looks_and_none_past_the_first_limit(decode_by_graphs):
    running = Engine(models("qwen3")[1], max_tokens=61, block_size=4)
    decode_by_graphs(running)
    longer, shorter = greedy(LONG), greedy(PROMPTS[1], 12)
    running.add(longer)
    running.add(shorter)
    lengths = []
    while running.busy:
        running.step()
        lengths.append((len(longer.token_ids), len(shorter.token_ids)))
    assert lengths == [(1, 1), (9, 9), (12, 12), (20, 12)] and running.runner.steps_per_look == 8
    assert set(running.runner.graphs) == {1, 2}


def test_rows_are_filled_up_to_the_next_size_of_a_graph(decode_by_graphs):
    running, shared = Engine(models("qwen3")[1], max_tokens=9, block_size=4), greedy([5, 6])
    decode_by_graphs(running)
    shared.blocks = [3]
    for count, size in ((1, 1), (3, 4), (8, 8), (9, 16), (16, 16), (17, 32), (33, 48)):
        batch, _ = running.runner.prepare_decode([shared] * count)
        assert batch.tokens.tolist() == [6] * count + [0] * (size - count)
        assert batch.tables[:, 0].tolist() == [3] * count + [running.cache.scratch] * (size - count)


# bfloat16


def test_bfloat16_agreement_of_two_schedules_is_reported(events):
    """Ties of the two best logits are common in bfloat16, so two schedules need not agree; only wide bounds are set."""
    model = decoder_like(models("qwen3")[0], tiny_raw("qwen3")).bfloat16()
    prompts = prompts_with_common_beginnings(random.Random(3), 12, 40)
    params = SamplingParams(max_new_tokens=40, n=4, seed=0, ignore_eos=True)
    tight = dict(max_batch=7, block_size=3, prefill_tokens=33, cache_bytes=60 * 3 * 256)
    one, other = (sum(generate(model, prompts, params, **options), []) for options in (dict(), tight))
    same, differences = 0, []
    for a, b in zip(one, other, strict=True):
        same += a.token_ids == b.token_ids
        common = next((i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=True)) if x != y), 40)
        differences += [abs(x - y) for x, y in zip(a.logprobs[:common], b.logprobs[:common], strict=True)]
    mean = sum(differences) / len(differences)
    print(f"bfloat16: {same} of {len(one)} completions are identical, mean |log-prob difference| {mean:.2e}")
    assert same > len(one) // 4 and 0 < mean < 0.02 and events["pre-emptions"] > 0
