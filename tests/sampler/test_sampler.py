"""generate against transformers (greedy, log-probs), against itself in other batches, against chance."""

import dataclasses
import math
from functools import lru_cache

import pytest
import torch
from test_randomness import python_noise
from test_sample import chi_square_p
from tiny_models import FAMILIES, decoder_like, random_checkpoint, random_reference, tiny_raw
from transformers.generation import logits_process as warpers
from world import write_world

from nanosafe.model.config import ModelConfig
from nanosafe.names import load_model, load_tokenizer
from nanosafe.randomness import derive_seed
from nanosafe.sampler import capacity, runner
from nanosafe.sampler.generation import generate
from nanosafe.sampler.params import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=14, ignore_eos=True)


@lru_cache
def models(family: str):
    """The transformers model and ours, with the same random tensors."""
    raw = tiny_raw(family)
    reference = random_reference(raw)
    return reference, decoder_like(reference, raw)


def with_changes(family: str, generation: dict | None = None, **changes):
    """Our model of `family` under another config.json or generation_config.json."""
    model = decoder_like(models(family)[0], tiny_raw(family))
    model.config = ModelConfig.from_dict(tiny_raw(family, **changes), generation)
    return model


def uniform_model():
    """All logits are 0: what is drawn is decided by the noise alone."""
    model = with_changes("qwen3")
    torch.nn.init.zeros_(model.lm_head.weight)
    return model


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_of_nan_is_named(temperature, tmp_path):
    random_checkpoint(tmp_path, "qwen3")
    model = load_model(tmp_path, dtype=torch.float32)
    torch.nn.init.constant_(model.model.layers[1].mlp.down_proj.weight, math.nan)
    with pytest.raises(ValueError, match=f"the model of {tmp_path / 'config.json'} gave a token the log-prob nan"):
        generate(model, [[5, 6]], dataclasses.replace(GREEDY, temperature=temperature, seed=0))


def random_prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, 97, (n,), generator=generator).tolist() for n in lengths]


def transformers_greedy(family: str, prompt: list[int], eos: list[int] | None = None, tokens: int = 14) -> list[int]:
    reference = models(family)[0]
    reference.generation_config.eos_token_id = eos
    ids = torch.tensor([prompt])
    out = reference.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens,
                             pad_token_id=0)  # fmt: skip
    return out[0, len(prompt) :].tolist()


PROMPTS = [random_prompts(1, 1)[0], [5, 80, 33, 60, 7], *random_prompts(2, 40, seed=1)]


@lru_cache
def free_runs(family: str) -> list[list[int]]:
    """transformers' greedy continuation of PROMPTS, no token ends it."""
    return [transformers_greedy(family, prompt) for prompt in PROMPTS]


def warped(scores: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """transformers' processors for `params` on scores [B, V]: what is filtered out is -inf."""
    chain = []
    if params.temperature:
        chain.append(warpers.TemperatureLogitsWarper(float(params.temperature)))
        chain += [warpers.TopKLogitsWarper(params.top_k)] if params.top_k else []
        chain += [warpers.TopPLogitsWarper(float(params.top_p)), warpers.MinPLogitsWarper(float(params.min_p))]
    return warpers.LogitsProcessorList(chain)(None, scores)


def count_divergences(reference, requests: list[tuple], expected: list, got: list) -> tuple[int, int]:
    """Compare completions by the sampler's contract -> (completions that diverge, tokens compared).

    requests: (prompt, params, sample index). Equal tokens, except that a completion may diverge where the two best
    perturbed scores, computed here by transformers and the pure-Python hash, are less than 1e-4 apart.
    """
    divergences = tokens = 0
    for (prompt, params, sample), one, other in zip(requests, expected, got, strict=True):
        pairs = list(zip(one.token_ids, other.token_ids, strict=False))
        step = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if step is None:
            assert one.token_ids == other.token_ids and one.finish_reason == other.finish_reason
        else:
            divergences += 1
            with torch.no_grad():
                logits = reference(torch.tensor([prompt + one.token_ids[:step]])).logits[:, -1]
            perturbed = warped(logits, params)[0].double()
            if params.temperature:
                seed = derive_seed(params.seed, sample, *prompt)
                perturbed += torch.tensor([python_noise(seed, step, v) for v in range(len(perturbed))])
            best = perturbed.topk(2)
            assert best.values[0] - best.values[1] < 1e-4, f"step {step} of {prompt}: not a near tie"
            assert set(best.indices.tolist()) == set(pairs[step])
        same = len(pairs) if step is None else step
        assert one.logprobs[:same] == pytest.approx(other.logprobs[:same], abs=1e-4)
        tokens += same
    return divergences, tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(family):
    model = models(family)[1]
    for max_batch in (64, 2):
        completions = generate(model, PROMPTS, GREEDY, max_batch=max_batch)
        assert [c.token_ids for [c] in completions] == free_runs(family)
        assert {c.finish_reason for [c] in completions} == {"length"}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_stops_at_every_eos_id_as_transformers_does(family):
    runs = free_runs(family)
    first, second = runs[1][6], runs[2][9]  # one in config.json, one only in generation_config.json
    model = with_changes(family, generation={"eos_token_id": [second, 96]}, eos_token_id=first)
    expected = [transformers_greedy(family, prompt, eos=[first, second, 96]) for prompt in PROMPTS]
    assert expected[1] != runs[1] and expected[2] != runs[2]
    params = dataclasses.replace(GREEDY, ignore_eos=False)
    completions = [c for [c] in generate(model, PROMPTS, params)]
    assert [c.token_ids for c in completions] == expected
    for c in completions:
        assert c.finish_reason == ("stop" if c.token_ids[-1] in (first, second, 96) else "length")
        assert len(c.logprobs) == len(c.token_ids)
    # ignore_eos turns them off, stop_token_ids are others
    assert [c.token_ids for [c] in generate(model, PROMPTS, GREEDY)] == runs
    stop = runs[3][9]
    stopping = dataclasses.replace(GREEDY, stop_token_ids=(stop,))
    expected = [run[: run.index(stop) + 1] if stop in run else run for run in runs]
    assert [c.token_ids for [c] in generate(model, PROMPTS, stopping)] == expected


def test_a_stop_token_at_the_last_allowed_place_is_a_stop():
    run = free_runs("qwen3")[1]
    place = max(run.index(token) for token in run) + 1  # where a token that was not there before comes last
    assert place > 3
    for allowed, reason in ((place, "stop"), (place - 1, "length")):
        params = dataclasses.replace(GREEDY, max_new_tokens=allowed, stop_token_ids=(run[place - 1],))
        [[completion]] = generate(models("qwen3")[1], [PROMPTS[1]], params)
        assert completion.token_ids == run[:allowed] and completion.finish_reason == reason


class Spy:
    """Notes what the engine asks of its cache, so that a test shows that it reached the case it is about."""

    def __init__(self, monkeypatch):
        self.blocks, self.copies, self.prefills = [], 0, []
        spy = self

        class KVCache(capacity.KVCache):
            def __init__(self, config, blocks, *rest):
                spy.blocks.append(blocks)
                super().__init__(config, blocks, *rest)

            def copy(self, *arguments):
                spy.copies += 1
                super().copy(*arguments)

        class Prefill(runner.Prefill):
            def __init__(self, cache, chunks):
                spy.prefills.append([chunk.length for chunk in chunks])
                super().__init__(cache, chunks)

        monkeypatch.setattr(capacity, "KVCache", KVCache)
        monkeypatch.setattr(runner, "Prefill", Prefill)


@pytest.mark.parametrize("family", FAMILIES)
def test_slots_are_reused_and_holes_filled(family, monkeypatch):
    """Greedy requests of very different lengths in three slots; each must be a prefix of transformers' free run."""
    spy = Spy(monkeypatch)
    lengths = [14, 2, 1, 7, 3, 13, 1, 12, 4, 14, 5, 9]
    params = [dataclasses.replace(GREEDY, max_new_tokens=n) for n in lengths]
    completions = generate(models(family)[1], PROMPTS * 3, params, max_batch=3)
    runs = free_runs(family) * 3
    assert [c.token_ids for [c] in completions] == [run[:n] for run, n in zip(runs, lengths, strict=True)]
    assert spy.blocks == [3] and spy.copies >= 1 and len(spy.prefills) >= 5


@lru_cache
def workload():
    """Prompts, params of all kinds, and the completions when all are sampled at once."""
    kinds = [
        dict(temperature=1.0),
        dict(temperature=0.7, top_p=0.9),
        dict(temperature=1.3, top_k=20, min_p=0.02),
        dict(temperature=0.0),
        dict(temperature=1.0, top_k=30, top_p=0.95, stop_token_ids=(11, 12)),
        dict(temperature=2.0, ignore_eos=True),
    ]
    prompts = random_prompts(36, 40, seed=2)
    params = [SamplingParams(max_new_tokens=[120, 3, 70, 25, 90][i % 5], n=1 + i % 3, seed=i % 7, **kinds[i % 6])
              for i in range(len(prompts))]  # fmt: skip
    return prompts, params, generate(models("qwen3")[1], prompts, params, max_batch=256)


# 2 (keys and values) * 2 layers * 2 heads * 16 (head_dim) * 4 bytes a position, and two slots and a half of 160
FEW_BYTES = 512 * 160 * 5 // 2


@pytest.mark.parametrize(
    "rows, separate_calls, options, slots, minimum",
    [
        (range(36), 1, dict(max_batch=64), 64, 2000),
        (range(35, -1, -1), 1, dict(max_batch=64), 64, 2000),
        (range(36), 2, dict(), 36, 2000),  # as two ranks would
        (range(36), 1, dict(max_batch=7, prefill_tokens=30), 7, 2000),
        (range(9, 24), 1, dict(max_batch=3), 3, 800),
        (range(8, 16), 1, dict(cache_bytes=FEW_BYTES), 2, 400),
        (range(6), 6, dict(), 1, 200),
        (range(6, 12), 1, dict(max_batch=1), 1, 200),
    ],
    ids=["64", "reversed", "two ranks", "small prefills", "3", "few bytes", "alone", "1"],
)
def test_a_seeded_completion_does_not_depend_on_scheduling(rows, separate_calls, options, slots, minimum, monkeypatch):
    prompts, params, together = workload()
    reference, model = models("qwen3")
    spy, got = Spy(monkeypatch), {}
    for group in (rows[i::separate_calls] for i in range(separate_calls)):
        outs = generate(model, [prompts[i] for i in group], [params[i] for i in group], **options)
        got |= dict(zip(group, outs, strict=True))
    assert spy.blocks[0] == slots
    if "prefill_tokens" in options:
        assert max(map(sum, spy.prefills)) == 30 and [30] in spy.prefills  # a long prompt in chunks

    requests = [(prompts[i], params[i], sample) for i in rows for sample in range(params[i].n)]
    divergences, tokens = count_divergences(
        reference, requests, [c for i in rows for c in together[i]], [c for i in rows for c in got[i]]
    )
    print(f"{divergences} divergences in {tokens} tokens")
    assert tokens > minimum and divergences * 1000 <= tokens


def test_the_contract_check_refuses_what_is_not_a_near_tie_and_accepts_an_exact_one():
    prompts, params, together = workload()
    reference = models("qwen3")[0]
    for i in (0, 3):  # sampled, greedy
        good = together[i][0]
        wrong = dataclasses.replace(good, token_ids=[*good.token_ids[:2], (good.token_ids[2] + 1) % 97])
        with pytest.raises(AssertionError, match="not a near tie"):
            count_divergences(reference, [(prompts[i], params[i], 0)], [good], [wrong])
        shorter = dataclasses.replace(good, token_ids=good.token_ids[:-1], logprobs=good.logprobs[:-1])
        with pytest.raises(AssertionError):
            count_divergences(reference, [(prompts[i], params[i], 0)], [good], [shorter])
    reference = random_reference(tiny_raw("qwen3"))
    good, chosen = together[3][0], together[3][0].token_ids[2]  # greedy
    with torch.no_grad():
        reference.lm_head.weight[96] = reference.lm_head.weight[chosen]
    tied = dataclasses.replace(good, token_ids=[*good.token_ids[:2], 96])
    assert count_divergences(reference, [(prompts[3], params[3], 0)], [good], [tied]) == (1, 2)


@pytest.mark.parametrize("family", ["qwen3", "granite"])
def test_logprobs_equal_teacher_forced_ones(family):
    """Before the filters, at the request's own temperature (greedy: 1), in a batch of mixed params."""
    reference, model = models(family)
    prompts = random_prompts(6, 30, seed=3)
    kinds = [
        dict(temperature=1.0), dict(temperature=0.6, top_p=0.5), dict(temperature=1.7, top_k=3), dict(temperature=0.0),
        dict(temperature=1.2, min_p=0.3), dict(temperature=0.3, top_k=5, top_p=0.8, min_p=0.1),
    ]  # fmt: skip
    params = [SamplingParams(max_new_tokens=20, seed=1, n=2, ignore_eos=True, **kind) for kind in kinds]
    for prompt, one, completions in zip(prompts, params, generate(model, prompts, params, max_batch=5), strict=True):
        for completion in completions:
            with torch.no_grad():
                logits = reference(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
            logprobs = (logits.double() / (one.temperature or 1.0)).log_softmax(-1)
            expected = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            assert completion.logprobs == pytest.approx(expected.tolist(), abs=5e-5)


def test_a_seed_means_pinned_tokens():
    """With uniform logits the tokens are the argmax of the documented noise, here from the pure-Python hash."""
    prompt, sample_count = [5, 6, 7], 2
    params = SamplingParams(seed=42, n=sample_count, max_new_tokens=6, ignore_eos=True)
    [completions] = generate(uniform_model(), [prompt], params)
    for sample, completion in enumerate(completions):
        seed = derive_seed(42, sample, *prompt)
        expected = [max(range(97), key=lambda v, t=t, s=seed: python_noise(s, t, v)) for t in range(6)]
        assert completion.token_ids == expected
        assert completion.logprobs == pytest.approx([-torch.tensor(97.0).log().item()] * 6, abs=1e-6)


def test_one_seed_draws_independently_for_each_prompt_and_sample():
    prompts = [[a, b] for a in range(40) for b in range(25)]
    completions = generate(uniform_model(), prompts, SamplingParams(seed=0, n=4, max_new_tokens=1))
    for sample in range(4):
        tokens = torch.tensor([outs[sample].token_ids[0] for outs in completions])
        assert chi_square_p(torch.bincount(tokens, minlength=97).double(), torch.full((97,), 1 / 97)) > 1e-3
    same = sum(outs[0].token_ids == outs[1].token_ids for outs in completions)
    assert same < 30  # 1000 / 97 = 10.3 expected


def test_seeds_samples_and_fresh_seeds_differ_and_no_global_generator_is_used():
    model = models("qwen2")[1]
    state = torch.random.get_rng_state()

    def tokens(seed, n=1, temperature=1.5):
        params = SamplingParams(seed=seed, n=n, max_new_tokens=12, ignore_eos=True, temperature=temperature)
        return [tuple(c.token_ids) for c in generate(model, [[5, 6]], params)[0]]

    assert tokens(1) == tokens(1) and tokens(1) != tokens(2)
    assert len(set(tokens(3, n=8))) == 8
    assert tokens(None) != tokens(None) and len(set(tokens(None, n=4))) == 4
    assert len(set(tokens(None, n=3, temperature=0.0))) == 1
    assert tokens(3, n=8)[:2] == tokens(3, n=2)  # more samples leave the first ones as they were
    assert torch.equal(state, torch.random.get_rng_state())


def test_greedy_ignores_filters_and_tiny_top_p_is_greedy():
    model = models("llama")[1]
    expected = generate(model, PROMPTS, GREEDY)
    filtered = dataclasses.replace(GREEDY, top_k=3, top_p=0.1, min_p=0.9)
    assert [c.token_ids for [c] in generate(model, PROMPTS, filtered)] == [c.token_ids for [c] in expected]
    for sampled in (dict(top_p=1e-9), dict(top_k=1), dict(min_p=1.0), dict(temperature=1e-6)):
        params = dataclasses.replace(GREEDY, **(dict(temperature=1.3) | sampled))
        assert [c.token_ids for [c] in generate(model, PROMPTS, params)] == [c.token_ids for [c] in expected]


def test_no_prompts_give_no_completions():
    assert generate(models("qwen3")[1], [], GREEDY) == [] and generate(models("qwen3")[1], [], []) == []


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(temperature=-0.1), "temperature must be 0 or at least 1e-6, got -0.1"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(temperature=float("inf")), "temperature"),
        (dict(temperature=1e-40), "temperature"),
        (dict(top_p=0.0), "top_p"),
        (dict(top_p=1.01), "top_p"),
        (dict(top_k=-1), "top_k"),
        (dict(top_k=0.5), "top_k"),
        (dict(min_p=-0.1), "min_p"),
        (dict(min_p=1.5), "min_p"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(max_new_tokens=2.5), "max_new_tokens"),
        (dict(n=0), "SamplingParams.n must"),
        (dict(seed="a"), "seed"),
        (dict(stop_token_ids=("</s>",)), "stop_token_ids"),
        (dict(stop_token_ids=5), "stop_token_ids must be integers, got 5"),
        (dict(temperature="0.6"), "temperature must be a number, got '0.6'"),
        (dict(top_p=None), "top_p must be a number"),
    ],
    ids=str,
)
def test_bad_params_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**changes)


def test_bad_prompts_are_named():
    model = models("qwen3")[1]
    good = [5, 6]
    for prompts, message in (
        ([good, []], "prompt 1 is empty"),
        ([good, [5, 97]], "prompt 1 .* vocabulary of 97"),
        ([[-1], good], "prompt 0 .* vocabulary"),
        ([good, "Hi"], "prompt 1 is a text: give generate a tokenizer"),
        ("Hi", "prompts must be a list"),
        ([5, 6], "prompt 0 must be a text or a list of token ids, not 5"),
        ([good, [5.5]], "prompt 1 must be a text or a list"),
        ([good, [5] * 243], "prompt 1 has 243 tokens; .*max_new_tokens=14 .*max_position_embeddings=256"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, prompts, GREEDY)
    with pytest.raises(ValueError, match="2 prompts but 1 SamplingParams"):
        generate(model, [good, good], [GREEDY])
    # the longest that fits: 242 + 14 = 256
    [[completion]] = generate(model, [[5] * 242], GREEDY)
    assert len(completion.token_ids) == 14


def test_prompts_may_be_tensors():
    model = models("qwen3")[1]
    params = dataclasses.replace(GREEDY, temperature=1.0, seed=3)
    assert generate(model, torch.tensor([PROMPTS[1]]), params) == generate(model, [PROMPTS[1]], params)
    with pytest.raises(ValueError, match="prompt 0 must be a text or a list of token ids, not .1.5."):
        generate(model, [[1.5]], params)


def test_bfloat16_runs_and_reports_agreement_with_itself_alone():
    """Rounding makes exact ties common in bfloat16, so equality is reported, not required."""
    prompts, params, _ = workload()
    model = decoder_like(models("qwen3")[0], tiny_raw("qwen3")).to(torch.bfloat16)
    params = [dataclasses.replace(one, max_new_tokens=min(one.max_new_tokens, 15), n=1) for one in params]
    batch = [c for [c] in generate(model, prompts, params)]
    alone = [generate(model, [p], one)[0][0] for p, one in zip(prompts, params, strict=True)]
    same = sum(a.token_ids == b.token_ids for a, b in zip(batch, alone, strict=True))
    print(f"bfloat16: {same} of {len(batch)} completions are identical alone and in one batch")
    for one, completion in zip(params, batch, strict=True):
        assert 0 < len(completion.token_ids) <= one.max_new_tokens
        assert all(-50 < logprob <= 0 for logprob in completion.logprobs)


def test_banned_tokens_are_never_drawn_and_the_rest_is_renormalised():
    """Log-probs against a plain softmax of transformers' logits in which the banned ones are left out."""
    reference, model = models("qwen3")
    usual = generate(model, PROMPTS, SamplingParams(max_new_tokens=12, n=6, seed=1, ignore_eos=True))
    banned = [v for v in range(97) if v % 3 == 0 or v == 50]
    drawn = {token for samples in usual for one in samples for token in one.token_ids}
    assert drawn & set(banned), "they are drawn otherwise"
    kept = torch.tensor([v for v in range(97) if v not in banned])
    tokens = set()
    for temperature, top_k in ((1.0, 0), (0.7, 0), (1.0, 5), (0.0, 0)):
        params = SamplingParams(temperature=temperature, top_k=top_k, max_new_tokens=12, n=6, seed=1, ignore_eos=True)
        for prompt, samples in zip(PROMPTS, generate(model, PROMPTS, params, banned_token_ids=banned), strict=True):
            for one in samples:
                tokens.update(one.token_ids)
                with torch.no_grad():
                    logits = reference(torch.tensor([prompt + one.token_ids])).logits[0, len(prompt) - 1 : -1]
                rest = (logits[:, kept].double() / (temperature or 1)).log_softmax(-1)
                places = [(kept == token).nonzero().item() for token in one.token_ids]
                expected = rest[range(len(places)), places]
                assert one.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
                ranks = (rest > expected[:, None]).sum(1).tolist()
                assert max(ranks) < (1 if temperature == 0 else top_k or 97), "filters act on what is left"
    assert not tokens & set(banned) and len(tokens) > 20
    [[one]] = generate(uniform_model(), [[5]], SamplingParams(max_new_tokens=20, seed=3, ignore_eos=True),
                       banned_token_ids=[v for v in range(97) if v not in (8, 9)])  # fmt: skip
    assert set(one.token_ids) == {8, 9} and one.logprobs == pytest.approx([-math.log(2)] * 20, abs=1e-6)


def test_texts_are_prompts_where_a_tokenizer_is_given(tmp_path):
    folder = write_world(tmp_path) / "policy"
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    texts = ["What is 1?", "Say hello."]
    named = generate(model, texts, GREEDY, tokenizer=tokenizer)
    plain = generate(model, [tokenizer.encode(text) for text in texts], GREEDY)
    for [one], [other] in zip(named, plain, strict=True):
        assert one.token_ids == other.token_ids and other.text is None
        assert one.text == tokenizer.decode(one.token_ids, skip_special_tokens=True)
    assert model.head_weight.dtype == torch.float32, "on a CPU, as in the scripts"
