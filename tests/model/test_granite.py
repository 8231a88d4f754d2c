"""Granite 4 against transformers: logits, gradients, texts decoded from states, schedules, names; and its recurrence
against the definition."""

import copy
import json
import random
from collections import Counter
from dataclasses import replace

import pytest
import test_engine
import torch
import torch.nn.functional as F
from parallel_cases import run_named
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_decoder import random_documents, relative_difference
from test_engine import EVENTS, count_divergences, run_at_random, solved
from test_plan import FusedNorm, LiveBytes
from test_sampler import PROMPTS, Spy, free_runs, models
from tiny_models import decoder_like, random_reference, tiny_config, tiny_raw
from world import write_policy

from nanosafe.kernels.scan import Segments, convolve, convolve_step, scan, scan_step
from nanosafe.model import granite
from nanosafe.model.activations import forward_bytes
from nanosafe.model.attention import Chunk, KVCache, PackedDocuments, PagedDecode, Prefill, SlotDecode
from nanosafe.model.config import ModelConfig
from nanosafe.model.decoder import Decoder
from nanosafe.model.granite import Balance, HybridDecoder, HybridLayer, make_decoder, official
from nanosafe.model.hybrid import StateCache
from nanosafe.model.recompute import RECOMPUTE
from nanosafe.model.weights import StoredTensors, load_checkpoint, save_model
from nanosafe.parallel import Ranks
from nanosafe.plan import memory as plan_memory
from nanosafe.plan.random_weights import random_checkpoint
from nanosafe.plan.shapes import SHAPES
from nanosafe.sampler.engine import Engine
from nanosafe.sampler.generation import generate
from nanosafe.sampler.params import SamplingParams
from nanosafe.sampler.scheduler import BlockPool, Scheduler, Sequence

events, decode_by_graphs = test_engine.events, test_engine.decode_by_graphs  # the fixtures
TOLERANCE = 1e-4  # of the largest |logit|
LENGTHS = [5, 40, 1, 9, 27, 10, 8, 2]  # around the chunk of nine tokens and the convolution of four
CASES = {
    "granite4": {},
    "without experts": dict(num_local_experts=0),
    "rope": dict(position_embedding_type="rope"),
    "four groups": dict(mamba_n_groups=4),
    # with RoPE, for without it attention does not depend on a key's bias
    "other biases": dict(mamba_conv_bias=False, mamba_proj_bias=True, attention_bias=True,
                         position_embedding_type="rope"),
    "short convolution": dict(mamba_d_conv=2, tie_word_embeddings=False),
    "one chunk": dict(mamba_chunk_size=256, mamba_d_head="auto"),
    "Mamba alone": dict(layer_types=None),
}


@pytest.fixture(scope="module")
def pair():
    """pair(case) -> the reference and our decoder with the same random tensors, made once each."""
    made = {}

    def make(case):
        if case not in made:
            raw = tiny_raw("granite4", **CASES[case])
            reference = random_reference(raw)
            made[case] = reference, decoder_like(reference, raw)
        return made[case]

    return make


def packed_logits(model, documents):
    packed = PackedDocuments([len(d) for d in documents])
    return model.logits(model.hidden(torch.cat(documents), packed.positions, packed))


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_packed_documents_and_batches_give_the_logits_of_transformers(case, pair):
    reference, model = pair(case)
    documents = random_documents(LENGTHS)
    expected = torch.cat([reference(document[None], use_cache=False).logits[0] for document in documents])
    assert relative_difference(packed_logits(model, documents), expected) < TOLERANCE
    batch = torch.stack(random_documents([29, 29]))
    assert relative_difference(model(batch), reference(batch, use_cache=False).logits) < TOLERANCE


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_of_transformers(case, recompute, pair):
    reference, model = pair(case)
    documents = random_documents(LENGTHS)

    def loss(logits, document):  # next token, summed
        return F.cross_entropy(logits[:-1], document[1:], reduction="sum")

    model.recompute(recompute)
    model.zero_grad()
    logits = packed_logits(model, documents).split(LENGTHS)
    sum(loss(*pair) for pair in zip(logits, documents, strict=True)).backward()
    model.recompute("none")
    reference.zero_grad()
    sum(loss(reference(document[None], use_cache=False).logits[0], document) for document in documents).backward()
    expected = {official(name): tensor.grad for name, tensor in reference.named_parameters()}
    for name, tensor in model.named_parameters():
        assert expected[name].abs().max() > 0 and relative_difference(tensor.grad, expected[name]) < 1e-3, name


@pytest.mark.parametrize("case", ["granite4", "without experts", "other biases"])
def test_no_documents_still_give_every_weight_a_zero_gradient(case):
    """Under sharding a rank without documents joins the collectives of the others only for weights with a gradient."""
    model = make_decoder(tiny_config("granite4", **CASES[case]))
    empty = PackedDocuments([])
    model.hidden(torch.zeros(0, dtype=torch.long), empty.positions, empty).sum().backward()
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in model.model.parameters())


# The recurrence


def recurrence(x, dt, A, B, C, state):
    """The definition, in float64: x [T, H, P], dt [T, H], A [H], B and C [T, G, S], state [H, P, S]."""
    outputs, heads = [], x.shape[1] // B.shape[1]
    for t in range(len(x)):
        for h in range(x.shape[1]):
            update = torch.outer(dt[t, h] * x[t, h], B[t, h // heads])
            state = state.index_copy(0, torch.tensor([h]), ((dt[t, h] * A[h]).exp() * state[h] + update)[None])
        outputs.append(torch.stack([state[h] @ C[t, h // heads] for h in range(x.shape[1])]))
    return torch.stack(outputs), state


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 64])
@pytest.mark.parametrize("fast", [False, True])
def test_chunks_and_single_steps_are_the_recurrence(chunk_size, fast):
    """fast: log-decays that sum up to thousands within a chunk, between tokens that hardly decay at all."""
    generator = torch.Generator().manual_seed(0)
    lengths, (H, P, G, S) = [6, 1, 20, 13], (4, 3, 2, 5)
    N = sum(lengths)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    x, B, C, past = normal(N, H, P), normal(N, G, S), normal(N, G, S), normal(len(lengths), H, P, S)
    dt, A = F.softplus(normal(N, H)), -normal(H).exp()
    if fast:
        dt = torch.where(normal(N, H) > 0, 100.0, 1e-3)
        A = -torch.tensor([50.0, 100.0, 20.0, 1.0])
    y, states = scan(x, dt, A, B, C, Segments(lengths, "cpu"), chunk_size, past)
    parts = [t.double().split(lengths) for t in (x, dt, B, C)]
    for i, (a, d, b, c) in enumerate(zip(*parts, strict=True)):
        truth, last = recurrence(a, d, A.double(), b, c, past[i].double())
        torch.testing.assert_close(y.split(lengths)[i].double(), truth, rtol=1e-5, atol=1e-5 * truth.abs().max().item())
        torch.testing.assert_close(states[i].double(), last, rtol=1e-5, atol=1e-5 * last.abs().max().item())
    held, outputs = past.clone(), []
    for t in range(13):  # the last two documents, token by token
        pick = [7 + t, 27 + t]
        outputs.append(scan_step(x[pick], dt[pick], A, B[pick], C[pick], held, torch.tensor([2, 3])))
    for i, start in enumerate((7, 27)):
        steps = torch.stack([out[i] for out in outputs])
        torch.testing.assert_close(steps, y[start : start + 13], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(held[3], states[3], rtol=1e-4, atol=1e-4)
    assert torch.equal(held[:2], past[:2])  # no other slot is touched


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_the_convolution_goes_on_from_what_was_before_and_sees_no_other_document(size, bias):
    texts = [torch.randn(n, 6) for n in (5, 1, 2, 9)]
    weight, b = torch.randn(6, 1, size), torch.randn(6) if bias else None
    whole = [F.conv1d(F.pad(text.T, (size - 1, 0))[None], weight, b, groups=6)[0].T for text in texts]
    cuts = [3, 0, 2, 1]
    heads, tails = ([text[:cut] for text, cut in zip(texts, cuts, strict=True)],
                    [text[cut:] for text, cut in zip(texts, cuts, strict=True)])
    first, past = convolve(torch.cat(heads), weight, b, Segments([len(t) for t in heads], "cpu"))
    rest, past = convolve(torch.cat(tails), weight, b, Segments([len(t) for t in tails], "cpu"), past)
    torch.testing.assert_close(first, torch.cat([out[:cut] for out, cut in zip(whole, cuts, strict=True)]))
    torch.testing.assert_close(rest, torch.cat([out[cut:] for out, cut in zip(whole, cuts, strict=True)]))
    x = torch.randn(4, 6)
    last, _ = convolve_step(x, weight, b, past)
    for text, token, out in zip(texts, x, last, strict=True):
        longer = torch.cat([text, token[None]])
        torch.testing.assert_close(
            out, F.conv1d(F.pad(longer.T, (size - 1, 0))[None], weight, b, groups=6)[0].T[-1])


# Texts from states


@torch.no_grad()
@pytest.mark.parametrize("case", ["granite4", "without experts"])
def test_bfloat16_is_as_near_to_float32_as_transformers(case):
    raw = tiny_raw("granite4", **CASES[case])
    theirs = random_reference(raw).to(torch.bfloat16)
    tokens = torch.stack(random_documents([60] * 8))
    ours, rounded = decoder_like(theirs, raw)(tokens), theirs(tokens, use_cache=False).logits.float()
    truth = theirs.float()(tokens, use_cache=False).logits

    def median(logits):  # a token that is routed otherwise is far off in both
        return (logits - truth).abs().median()

    assert ours.dtype == torch.float32 and 0 < median(ours) <= 1.1 * median(rounded)


@torch.no_grad()
@pytest.mark.parametrize("block_size", [40, 4])
@pytest.mark.parametrize("case", ["granite4", "without experts", "four groups", "short convolution"])
def test_cached_decoding_gives_the_logits_of_the_whole_text(case, block_size, pair):
    """Four texts through a used cache, in chunks of prefill, batches of decoding, moves and forks."""
    reference, model = pair(case)
    texts = random_documents([40, 25, 31, 38])
    texts[3][:21] = texts[0][:21]
    expected = [reference(text[None], use_cache=False).logits[0] for text in texts]
    per_text = 40 // block_size
    cache = KVCache(model.config, 4 * per_text, block_size, torch.device("cpu"), torch.float32, slots=5)
    for held in (cache.keys, cache.values, cache.recurrent.past, cache.recurrent.states):
        held.normal_(std=30)  # as if it had been used before
    tables = torch.arange(4 * per_text).view(4, per_text).to(torch.int32)
    slots, done = [3, 0, 4, 1], [0] * 4
    for slot in slots[:3]:
        cache.recurrent.begin(slot, None)

    def check(text, logits):
        assert relative_difference(logits, expected[text][done[text] : done[text] + len(logits)]) < TOLERANCE
        done[text] += len(logits)

    def prefill(texts_in, lengths):
        memory = Prefill(cache, [Chunk(tables[text].tolist(), done[text], n, slots[text])
                                 for text, n in zip(texts_in, lengths, strict=True)])
        parts = zip(texts_in, lengths, strict=True)
        tokens = torch.cat([texts[text][done[text] : done[text] + n] for text, n in parts])
        logits = model.logits(model.hidden(tokens, memory.positions, memory))
        for text, part in zip(texts_in, logits.split(lengths), strict=True):
            check(text, part)

    def decode(active, steps):
        for _ in range(steps):
            positions = torch.tensor([done[text] for text in active])
            tokens = torch.stack([texts[text][done[text]] for text in active])
            held = torch.tensor([slots[text] for text in active])
            memory = (SlotDecode(cache, positions, held) if per_text == 1 and active == list(range(len(active)))
                      else PagedDecode(cache, tables[active], positions, held))
            for text, row in zip(active, model.logits(model.hidden(tokens, positions, memory)), strict=True):
                check(text, row[None])

    prefill([0, 1, 2], [13, 1, 12])
    prefill([1, 0], [2, 8])  # goes on where it stopped
    cache.recurrent.begin(slots[3], slots[0])  # text 3 begins as text 0 does
    done[3] = 21
    for source, target in zip(tables[0].tolist(), tables[3].tolist(), strict=True):
        cache.copy(source, target, block_size)
    decode([0, 1, 2, 3], 8)
    decode([2, 0], 3)
    prefill([3, 2, 1], [9, 1, 11])
    decode([0], 2)
    assert done == [34, 22, 24, 38]


@pytest.mark.parametrize("max_batch", [64, 2])
def test_greedy_equals_transformers(max_batch):
    params = SamplingParams(temperature=0.0, max_new_tokens=14, ignore_eos=True)
    completions = generate(models("granite4")[1], PROMPTS, params, max_batch=max_batch)
    assert [c.token_ids for [c] in completions] == free_runs("granite4")


# Granite 4.0 without experts as the hub has it, but for sizes and ids: plain ones have attention alone and RoPE, the
# "h" ones Mamba layers and no positions. Residual multiplier, divisor of the logits.
DENSE = dict(num_local_experts=0, num_experts_per_tok=0, embedding_multiplier=12, attention_multiplier=0.015625,
             normalization_function="rmsnorm", init_method="mup", router_aux_loss_coef=0.01, rope_scaling=None,
             num_hidden_layers=6, mamba_d_head="auto")  # fmt: skip
PLAIN = DENSE | dict(layer_types=["attention"] * 6, position_embedding_type="rope", rope_theta=10_000_000)
MIXED = DENSE | dict(layer_types=["mamba"] * 3 + ["attention"] + ["mamba"] * 2, position_embedding_type="nope")
SIX = {"350m": (PLAIN, 0.263, 4), "h-350m": (MIXED, 0.246, 3), "1b": (PLAIN, 0.22, 8), "h-1b": (MIXED, 0.22, 6),
       "micro": (PLAIN | dict(intermediate_size=0), 0.22, 10), "h-micro": (MIXED, 0.22, 8)}  # fmt: skip


@pytest.mark.parametrize("name", SIX)
def test_granite_without_experts_is_that_of_transformers(name):
    fields, residual, scaling = SIX[name]
    raw = tiny_raw("granite4", **fields | dict(residual_multiplier=residual, logits_scaling=scaling))
    if name == "1b":  # transformers' other name of the field
        raw["layers_block_type"] = raw.pop("layer_types")
    reference = random_reference(raw)
    model = decoder_like(reference, raw)  # which takes the same parameters, no more and no fewer
    ids = torch.tensor([random.Random(0).choices(range(3, 97), k=30)])
    with torch.no_grad():
        torch.testing.assert_close(model(ids), reference(ids).logits, rtol=1e-4, atol=1e-5)
    theirs = reference.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)[0, 30:]
    greedy = SamplingParams(temperature=0.0, max_new_tokens=12, ignore_eos=True)
    assert generate(model, ids.tolist(), greedy)[0][0].token_ids == theirs.tolist()


@pytest.mark.parametrize("name", ["granite-4.0-350m", "granite-4.0-h-micro"])
def test_the_official_files_without_experts_give_transformers_parameters(name, assets):
    import transformers

    raw = json.loads((assets / "configs" / name / "config.json").read_text())
    with torch.device("meta"):
        ours = make_decoder(ModelConfig.from_dict(copy.deepcopy(raw)))
        config = transformers.GraniteMoeHybridConfig.from_dict(raw)
        theirs = transformers.GraniteMoeHybridForCausalLM._from_config(config)
    assert {key: p.shape for key, p in ours.named_parameters()} == {
        key: p.shape for key, p in theirs.named_parameters()}  # fmt: skip


@pytest.mark.parametrize("block_size", [None, 4])
def test_the_samples_of_a_prompt_are_prefilled_once(block_size, monkeypatch):
    spy, long = Spy(monkeypatch), list(range(3, 45))
    params = [SamplingParams(max_new_tokens=5, n=n, seed=0, ignore_eos=True) for n in (6, 1)]
    generate(models("granite4")[1], [long, long[:40] + [90] * 5], params, block_size=block_size, prefill_tokens=24)
    # The first prompt but for its last token, in two chunks; the other begins alike, but no state is of just that part.
    assert spy.prefills[:2] == [[24], [17]] and sum(map(sum, spy.prefills)) == 41 + 44


def test_only_who_can_take_a_state_over_waits_for_it():
    scheduler, long = Scheduler(BlockPool(100, 4), 8, 1000, recurrent=True), list(range(3, 45))
    prompts = (long, long[:40] + [90] * 5, long + [5], long)  # a state comes to be of 41 tokens: not of 40
    first, other, longer, same = (Sequence(prompt, 9, frozenset(), seed=0) for prompt in prompts)
    scheduler.waiting.extend((first, other, longer, same))
    scheduler.admit()
    assert scheduler.running == [first, other] and list(scheduler.waiting) == [longer, same]
    for s, count in scheduler.prefill():
        s.cached += count
    assert (first.cached, other.cached) == (41, 44)
    scheduler.begins.clear()
    scheduler.admit()
    assert scheduler.running == [first, other, longer, same] and longer.cached == same.cached == 41
    assert scheduler.begins == [(longer.slot, first.slot), (same.slot, first.slot)]
    first.cached = 42  # past what another sample shares: it begins anew
    scheduler.remove(longer)
    scheduler.remove(same)
    scheduler.waiting.append(same)
    scheduler.admit()
    assert same.cached == 0 and scheduler.begins[-1] == (same.slot, None)


def random_engine(rng: random.Random, model, longest: int) -> Engine:
    """Slots or pages for a few rows, often too few for all of them."""
    rows, block_size = rng.choice([1, 3, 6, 12]), longest if rng.random() < 0.5 else rng.choice([1, 3, 4, 16])
    slot, block = (KVCache.bytes_per_slot(model.config, torch.float32),
                   block_size * KVCache.bytes_per_position(model.config, torch.float32))
    width = -(-longest // block_size)
    blocks = rng.randint(width, rng.choice([2, rows]) * width)
    # States take half at most.
    memory = max(2 * (rows + 1) * slot, (rows + 1) * slot + blocks * block)
    made = Engine(model, max_tokens=longest, max_batch=rows, block_size=block_size, cache_bytes=memory,
                  prefill_tokens=rng.choice([rng.randint(1, 40), 1000]))
    assert made.scheduler.max_batch == rows and made.scheduler.pool.total >= min(blocks, rows * width)
    # What the states' half leaves over is not for this test.
    made.scheduler.pool.total = min(blocks, made.scheduler.pool.total)
    made.scheduler.pool.free = list(range(made.scheduler.pool.total))
    return made


def test_random_schedules_yield_what_a_slow_sampler_does(events, decode_by_graphs, monkeypatch):
    """Pre-emption, sharing, chunks and moves, each many times, against transformers on the whole text.

    A third of the engines with pages decode as on CUDA.
    """
    monkeypatch.setattr(StateCache, "begin", counted(StateCache.begin, events))
    totals, (reference, model) = Counter(), models("granite4")
    for seed in range(45):
        rng = random.Random(seed)
        start = rng.randrange(len(solved("granite4")))
        chosen = (solved("granite4") * 2)[start : start + rng.randint(2, 20)]  # neighbours, whose prompts begin alike
        rate = rng.choice([0.4, 1.0])
        if rate < 1:
            rng.shuffle(chosen)
        running, sequences = run_at_random(rng, model, chosen, rate, decode_by_graphs, random_engine)
        divergences, tokens = count_divergences(reference, *zip(*chosen, strict=True), sequences)
        totals.update(divergences=divergences, tokens=tokens)
        pool, slots = running.scheduler.pool, running.scheduler.slots
        assert sorted(pool.free) == list(range(pool.total)) and sorted(slots.free) == list(range(slots.total))
    print(dict(totals), dict(events))
    assert totals["divergences"] * 1000 <= totals["tokens"]
    assert all(events[event] > 5 for event in [*EVENTS, "forks", "fresh starts"])


def counted(begin, events):
    def count(cache, slot, source):
        events["fresh starts" if source is None else "forks"] += 1
        assert slot != source
        begin(cache, slot, source)

    return count


# Every field, every tensor


@torch.no_grad()
def test_every_tensor_and_multiplier_matters(pair):
    reference, model = pair("granite4")
    tokens = torch.stack(random_documents([29]))
    truth = model(tokens)
    for change in (dict(residual_multiplier=1.0), dict(embedding_multiplier=1.0), dict(attention_multiplier=0.35),
                   dict(logits_scaling=1.0)):
        mutant = make_decoder(replace(model.config, **change))
        mutant.load_state_dict(model.state_dict())
        assert relative_difference(mutant(tokens), truth) > 100 * TOLERANCE, change
    mutant = copy.deepcopy(model)
    for name, tensor in mutant.named_parameters():
        kept = tensor.clone()
        tensor.copy_(tensor.roll(1, 0))  # other rows, heads, experts
        assert relative_difference(mutant(tokens), truth) > 10 * TOLERANCE, name
        tensor.copy_(kept)


# One changed value for each field of config.json that transformers' class reads, beside those of test_config.py.
ALTERED = dict(
    vocab_size=89, hidden_size=48, intermediate_size=40, shared_intermediate_size=16, num_attention_heads=8,
    num_key_value_heads=1, head_dim=4, hidden_act="gelu", rms_norm_eps=0.3, tie_word_embeddings=False,
    attention_bias=True, mlp_bias=True, rope_theta=77.0, rope_scaling=dict(rope_type="linear", factor=2.0),
    embedding_multiplier=1.0, attention_multiplier=0.5, residual_multiplier=0.5, logits_scaling=3.0,
    layer_types=["full_attention", "linear_attention", "attention", "mamba"], position_embedding_type=None,
    num_local_experts=3, num_experts_per_tok=1, output_router_logits=True, router_aux_loss_coef=0.5,
    mamba_n_heads=4, mamba_n_groups=8, mamba_d_state=8, mamba_d_head="auto", mamba_d_conv=3, mamba_expand=4,
    mamba_chunk_size=5, mamba_conv_bias=False, mamba_proj_bias=True, time_step_limit=[0.0, 0.1],
    attention_dropout=0.5, initializer_range=0.5, use_cache=False, pad_token_id=5, max_position_embeddings=128,
    num_hidden_layers=3,
)  # fmt: skip
TOGETHER = {"mamba_n_heads": dict(mamba_d_head=16), "hidden_size": dict(mamba_d_head=12),
            "mamba_expand": dict(mamba_d_head=16), "num_hidden_layers": dict(layer_types=None)}  # fmt: skip


@torch.no_grad()
def test_every_field_that_transformers_reads_is_computed_or_refused():
    tokens = torch.stack(random_documents([29])) % 89
    for field, value in ALTERED.items():
        raw = tiny_raw("granite4", position_embedding_type="rope") | {field: value} | TOGETHER.get(field, {})
        if field in ("hidden_act", "time_step_limit"):
            with pytest.raises(ValueError, match=field):
                ModelConfig.from_dict(raw)
            continue
        reference = random_reference(raw)
        expected = reference(tokens, use_cache=False).logits
        assert relative_difference(decoder_like(reference, raw)(tokens), expected) < TOLERANCE, field


@pytest.mark.parametrize("case", ["granite4", "without experts", "four groups"])
def test_files_of_transformers_load_under_old_and_new_names_and_ours_load_there(case, pair, tmp_path):
    import transformers

    reference, model = pair(case)
    tokens = torch.stack(random_documents([29]))
    for folder, old_names in ((tmp_path / "old", True), (tmp_path / "new", False)):
        reference.save_pretrained(folder, save_original_format=old_names)
        with safe_open(folder / "model.safetensors", "pt") as file:
            renamed = any("experts.gate_up_proj" in name for name in file.keys())
        assert renamed == (not old_names and case != "without experts")
        loaded = load_checkpoint(folder, "cpu", torch.float32)
        assert torch.equal(loaded(tokens), model(tokens))
    save_model(loaded, tmp_path / "ours")
    official_names = set(StoredTensors(tmp_path / "old", "model"))
    with safe_open(tmp_path / "ours" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == official_names == {name for name, _ in loaded.named_parameters()}
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager")
    assert torch.equal(again(tokens).logits, reference(tokens).logits)
    assert not list(model.buffers())


def test_the_config_decides_the_class():
    hybrid, plain = make_decoder(tiny_config("granite4")), make_decoder(tiny_config("granite"))
    assert type(hybrid) is type(copy.deepcopy(hybrid)) is HybridDecoder and type(plain) is Decoder


def test_a_tensor_that_is_missing_is_named(pair, tmp_path):
    pair("granite4")[0].save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.mamba.D"], tensors["model.layers.1.block_sparse_moe.input_linear.weight"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"(?s)missing:.*block_sparse_moe.input_linear.weight \[6, 48, 32\].*mamba.D"):
        load_checkpoint(tmp_path, "cpu", torch.float32)


def test_the_official_config_gives_the_official_tensors(assets):
    folder = assets / "configs" / "granite-4.0-tiny-preview"
    reference = json.loads((folder.parent / "shapes.json").read_text())[f"{folder.name}.RECONSTRUCTED"]
    config = ModelConfig.from_folder(folder)
    with torch.device("meta"):
        found = {name: list(parameter.shape) for name, parameter in make_decoder(config).named_parameters()}
    expected = {name: shape for name, shape in reference["shapes"].items() if ".layers." not in name}
    for i, kind in enumerate(config.hybrid.layer_types):  # layers 0 and 5 stand for all of their kind
        like = f".layers.{0 if kind == 'mamba' else 5}."
        expected |= {name.replace(like, f".layers.{i}."): shape
                     for name, shape in reference["shapes"].items() if like in name}
    assert found == expected and len(found) == reference["tensors"] == 586
    assert sum(torch.Size(shape).numel() for shape in found.values()) == reference["parameters"] == 6_671_539_776


def test_a_cache_holds_as_many_bytes_as_it_says():
    config = tiny_config("granite4")
    cache = KVCache(config, 3, 10, torch.device("cpu"), torch.bfloat16, slots=5)  # and scratch of both kinds
    assert cache.keys.nbytes + cache.values.nbytes == 4 * 10 * KVCache.bytes_per_position(config, torch.bfloat16)
    held = cache.recurrent
    assert held.past.nbytes + held.states.nbytes == 6 * KVCache.bytes_per_slot(config, torch.bfloat16)


# Training


def test_the_balance_loss_and_its_gradient_are_those_of_transformers():
    raw = tiny_raw("granite4", output_router_logits=True, router_aux_loss_coef=0.3)
    reference = random_reference(raw)
    model, batch = decoder_like(reference, raw), torch.stack(random_documents([29, 29]))
    reference(batch, use_cache=False).aux_loss.mul(0.3).backward()
    expected = {official(name): tensor.grad for name, tensor in reference.named_parameters()}
    documents, balance = PackedDocuments([29, 29]), Balance(model.config, 2 * 58, Ranks("cpu"))
    model.hidden(batch.flatten(), documents.positions, documents)
    loss = balance.add(documents.hybrid.routing)  # half of the step's tokens
    (2 * loss).backward()
    for name, tensor in model.named_parameters():
        if expected[name] is not None and expected[name].any():
            assert relative_difference(tensor.grad, expected[name]) < 1e-3, name
    assert sum(bool(g is not None and g.any()) for g in expected.values()) > 20
    plain = decoder_like(reference, tiny_raw("granite4", router_aux_loss_coef=0.3))
    assert plain.config.hybrid.balance_coef == 0  # as transformers, which adds it only with output_router_logits


def test_one_kernel_for_all_experts_gets_what_their_products_one_by_one_are(pair, monkeypatch):
    """The kernel is CUDA's; here PyTorch's own stand-in of it on a CPU."""
    _, model = pair("granite4")
    documents = random_documents(LENGTHS)

    def run():
        model.zero_grad()
        packed_logits(model, documents).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = run()
    monkeypatch.setattr(granite, "grouped_kernel_works", lambda weight, training: True)
    for found, truth in zip(run(), expected, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4 * truth.abs().max().item())


def test_loads_count_every_token_of_every_layer(pair):
    _, model = pair("granite4")
    lengths, seen = [[7, 3], [20], []], torch.zeros(4, 6)
    balance = Balance(model.config, 30, Ranks("cpu"))

    def count(i):
        def hook(module, inputs, logits):
            seen[i] += F.one_hot(logits.topk(2).indices, 6).sum((0, 1))

        return hook

    for i, layer in enumerate(model.model.layers):
        layer.block_sparse_moe.router.layer.register_forward_hook(count(i))
    for part in lengths:
        documents = PackedDocuments(part)
        tokens = torch.randint(3, 97, (sum(part),), generator=torch.Generator().manual_seed(len(part)))
        model.hidden(tokens, documents.positions, documents)
        balance.add(documents.hybrid.routing)
    for layer in model.model.layers:
        layer.block_sparse_moe.router.layer._forward_hooks.clear()
    metrics = balance.metrics()
    assert seen.sum() == 30 * 4 * 2 and metrics["experts/dropped"] == 0
    even = seen / (30 * 2 / 6)
    assert metrics["experts/load_max"] == pytest.approx(even.max().item())
    assert metrics["experts/load_min"] == pytest.approx(even.min().item())
    assert [metrics[f"experts/load_{i}"] for i in range(6)] == pytest.approx(even.mean(0).tolist())
    assert Balance(tiny_config("qwen3"), 5, Ranks("cpu")).metrics() == {}


def test_two_ranks_compute_what_one_does(tmp_path):
    """Sharded weights, unequal parts, a rank without a row, recomputed layers, the balance loss, saving, sampling."""
    balanced = write_policy(tmp_path / "balanced" / "policy", family="granite4", output_router_logits=True,
                            router_aux_loss_coef=3.0).parent
    write_policy(tmp_path / "policy", family="granite4")
    names = dict.fromkeys(["unequal", "rank without a row", "recomputed", "products kept", "sft"], tmp_path)
    names["one by one"] = balanced
    for ranks in (1, 2):
        torch.multiprocessing.spawn(run_named, (ranks, tmp_path, tmp_path, names), nprocs=ranks)
    one, *two = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for name in names:
        assert two[0][name]["metrics"] == pytest.approx(two[1][name]["metrics"], nan_ok=True, rel=1e-12)
        assert two[0][name]["metrics"] == pytest.approx(one[name]["metrics"], rel=1e-5, abs=1e-6, nan_ok=True)
        assert one[name]["metrics"]["experts/load_max"] > 1 and one[name]["metrics"]["experts/dropped"] == 0
        for parameter, gradient in one[name]["gradients"].items():
            error = (two[0][name]["gradients"][parameter] - gradient).norm() / gradient.norm().clamp(min=1e-12)
            assert error <= 1e-5, (name, parameter, error)
    plain = one["unequal"]["gradients"]
    for name in ("recomputed", "products kept"):
        assert all(torch.equal(one[name]["gradients"][parameter], plain[parameter]) for parameter in plain)
    router = "model.layers.0.block_sparse_moe.router.layer.weight"
    assert relative_difference(one["one by one"]["gradients"][router], plain[router]) > 0.1
    for a, b in zip(two[0]["trained"]["rows"], one["trained"]["rows"], strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    tokens = torch.stack(random_documents([29]))
    by_one, by_two = (load_checkpoint(tmp_path / f"saved-{ranks}", "cpu", torch.float32)(tokens) for ranks in (1, 2))
    assert relative_difference(by_two, by_one) < 1e-3
    for name, tensor in one["trained"]["weights"].items():
        torch.testing.assert_close(two[0]["trained"]["weights"][name], tensor, rtol=1e-3, atol=1e-4)
    assert [[c[0] for c in samples] for samples in two[0]["completions"]] == [
        [c[0] for c in samples] for samples in one["completions"]]


@pytest.mark.parametrize("heads", [6, 8])
@pytest.mark.parametrize("layer", [0, 5], ids=["Mamba", "attention"])
def test_activations_of_a_layer_are_nearly_the_bytes_that_live(layer, heads, monkeypatch):
    """In the true proportions; the larger of both kinds is what a plan counts with."""
    norm = F.rms_norm
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps:
                        norm(x, shape, None, eps) if weight is None else FusedNorm.apply(x, weight))
    raw = SHAPES["granite-4.0-tiny"] | dict(
        hidden_size=32 * heads, mamba_n_heads=heads, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=11 * heads, shared_intermediate_size=22 * heads, num_local_experts=8)
    config, documents = ModelConfig.from_dict(raw), PackedDocuments([256, 256, 512])
    module = HybridLayer(config, layer).bfloat16()
    x = torch.randn(1024, config.hidden_size).bfloat16()
    with torch.no_grad():
        module(x, None, None, documents)  # makes the indices, which serve all layers
    with torch.no_grad(), LiveBytes(module.parameters()) as forward:
        module(x, None, None, documents)
    documents.hybrid.routing.clear()
    with LiveBytes(module.parameters()) as both:
        y = module(x.requires_grad_(), None, None, documents)
        saved, both.peak = both.live - y.nbytes, 0
        y.backward(torch.ones_like(y))
    weights = sum(parameter.nbytes for parameter in module.parameters())
    counted = [count / len(x) for count in (forward.peak, saved, both.peak - weights)]
    functions = forward_bytes, plan_memory.saved_bytes, plan_memory.backward_bytes
    planned = [function(config, 2) for function in functions]
    print([round(a / b, 3) for a, b in zip(counted, planned, strict=True)])
    for a, b in zip(counted, planned, strict=True):
        assert a < 1.03 * b and (layer or a > 0.9 * b)


def test_the_pool_and_the_slots_of_a_plan_are_the_engines():
    config, longest = tiny_config("granite4"), 150
    for free in (200_000, 300_000, 2_000_000):
        made = Engine(make_decoder(config), max_tokens=longest, requests=5, block_size=64, cache_bytes=int(0.8 * free))
        size = plan_memory.engine_cache(config, 4, free, 5, longest, "cuda")
        blocks, block = size.blocks, plan_memory.block_bytes(config, 4, size)
        states = plan_memory.state_bytes(config, 4, size.max_batch)
        assert (blocks, size.table_width) == (made.scheduler.pool.total, made.table_width)
        assert size.max_batch == made.scheduler.max_batch
        assert (blocks + 1) * block == made.cache.keys.nbytes + made.cache.values.nbytes
        assert states == made.cache.recurrent.past.nbytes + made.cache.recurrent.states.nbytes
    with pytest.raises(ValueError, match="needs 0.1 MiB of cache, but only 0.0 may be used"):  # block and state, twice
        Engine(make_decoder(config), max_tokens=longest, requests=5, block_size=64, cache_bytes=50_000)


def test_parameters_of_the_true_shape_in_all_and_active():
    """36 Mamba layers, 4 of attention, 62 experts, of which 6 are active."""
    D, expert = 1536, 3 * 512 * 1536
    each = 2 * D + 62 * D + 3 * 1024 * D
    mamba = 6448 * D + 3328 * 5 + 3 * 48 + 3072 + D * 3072
    attention = 2 * D * D + 2 * 512 * D
    rest = 36 * mamba + 4 * attention + 40 * each + 49160 * D + D
    size = plan_memory.sizes(ModelConfig.from_dict(SHAPES["granite-4.0-tiny"]))
    assert size.total == rest + 40 * 62 * expert == 6_671_539_776 and size.active == rest + 40 * 6 * expert
    assert size.block == mamba + each + 62 * expert and size.root == 49160 * D + D
    slot = KVCache.bytes_per_slot(ModelConfig.from_dict(SHAPES["granite-4.0-tiny"]), torch.bfloat16)
    assert slot == 36 * (4 * 48 * 64 * 128 + 2 * 3 * 3328)


def test_random_weights_of_the_shape_load_and_sample(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOSAFE_CACHE", str(tmp_path / "cache"))
    raw = tiny_raw("granite4", vocab_size=3000, hidden_size=64, mamba_n_heads=16, num_hidden_layers=4)
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text(json.dumps(raw))
    model = load_checkpoint(random_checkpoint(str(tmp_path / "policy")), "cpu", torch.float32)
    mixer, experts = model.model.layers[0].mamba, model.model.layers[0].block_sparse_moe
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17.0), rtol=0.01, atol=0)  # bfloat16
    steps = F.softplus(mixer.dt_bias)
    assert steps.min().item() == pytest.approx(1e-3, rel=0.05) and steps.max().item() == pytest.approx(0.1, rel=0.05)
    assert experts.input_linear.weight.std().item() == pytest.approx(64**-0.5, rel=0.02)
    # of 24 numbers each, one of eight additions to the residual stream
    assert experts.output_linear.weight.std().item() == pytest.approx((24 * 8) ** -0.5, rel=0.02)
    [[completion]] = generate(model, [[5, 6, 7]], SamplingParams(max_new_tokens=20, seed=0, ignore_eos=True))
    assert len(completion.token_ids) == 20
