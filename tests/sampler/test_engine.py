"""The sampling engine over random schedules: its tokens against a sampler without a cache. test_scheduler.py has its
blocks without a model."""

import dataclasses
import random
from collections import Counter
from functools import lru_cache

import pytest
import test_scheduler
import torch
from test_randomness import python_noise
from test_sampler import PROMPTS, Spy, count_divergences, models, transformers_greedy, warped, with_changes
from test_scheduler import EVENTS, prompts_with_common_beginnings, random_pool
from tiny_models import decoder_like, tiny_raw

from nanosafe.randomness import derive_seed
from nanosafe.sampler import graphs
from nanosafe.sampler.engine import Engine
from nanosafe.sampler.generation import generate, sequence
from nanosafe.sampler.graphs import GraphRunner
from nanosafe.sampler.params import Completion, SamplingParams
from nanosafe.sampler.runner import SlotRunner
from nanosafe.sampler.scheduler import Sequence

events = test_scheduler.events  # the fixture


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


def run_at_random(rng, model, chosen, rate, decode_by_graphs, make_engine):
    """Run the chosen requests in an engine of `make_engine`; before each step the next comes with probability `rate`.

    Returns the engine and the sequences, all finished. Two engines in five that have pages decode as on CUDA.
    """
    sequences = [sequence(model, prompt, params, 0, sample) for (prompt, params, sample), _ in chosen]
    coming, running = list(sequences), make_engine(rng, model, max(s.longest for s in sequences))
    if not isinstance(running.runner, SlotRunner) and rng.random() < 0.4:
        decode_by_graphs(running)
    while coming or running.busy:
        while coming and (not running.busy or rng.random() < rate):
            running.add(coming.pop(0))
        running.step()
    return running, sequences


def test_random_schedules_yield_what_a_slow_sampler_does(events, decode_by_graphs):
    """A third of the engines with pages decode as on CUDA."""
    totals = Counter()
    for seed in range(60):
        rng, family = random.Random(seed), "granite" if seed % 3 == 0 else "qwen3"
        reference, model = models(family)
        start = rng.randrange(len(solved(family)))
        chosen = (solved(family) * 2)[start : start + rng.randint(2, 20)]  # neighbours, whose prompts begin alike
        rng.shuffle(chosen)
        running, sequences = run_at_random(rng, model, chosen, 0.4, decode_by_graphs, random_engine)
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
    assert lengths == [(1, 1), (9, 9), (12, 12), (20, 12)] and running.runner.steps_per_sync == 8
    assert set(running.runner.graphs) == {1, 2}


def test_rows_are_padded_to_the_next_size_of_a_graph(decode_by_graphs):
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
