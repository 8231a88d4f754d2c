"""The decoder against transformers: every family and option, packed, batched, cached, in float32 and bfloat16."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from test_plan import LiveBytes
from tiny_models import FAMILIES, LLAMA3_ROPE, decoder_like, random_checkpoint, random_reference, tiny_config, tiny_raw
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from nanosafe.kernels import cpu_matmul
from nanosafe.model import attention as memory
from nanosafe.model.attention import Chunk, KVCache, PackedDocuments, PagedDecode, Prefill, SlotDecode
from nanosafe.model.config import ModelConfig
from nanosafe.model.decoder import rope_frequencies, rope_tables
from nanosafe.model.granite import make_decoder
from nanosafe.model.recompute import PRODUCTS, RECOMPUTE

TOLERANCE = 1e-4  # of the largest |logit|
LENGTHS = [5, 80, 1, 33, 33, 12]  # equal neighbours go as one batch; 80 is past the original length of the scaled ropes
# With theta 500 and heads of 16 the ramp goes from pair 1 (1.2 without truncation) to 4 (3.3).
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=2.0, beta_slow=0.4)
CASES = {
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", dict(tie_word_embeddings=True)),
    "qwen3-bias": ("qwen3", dict(attention_bias=True)),
    "qwen3-eps": ("qwen3", dict(rms_norm_eps=0.5)),
    "llama-llama3": ("llama", {}),
    "llama-plain": ("llama", dict(rope_scaling=None)),
    "llama-linear": ("llama", dict(rope_scaling=dict(type="linear", factor=4.0))),
    "llama-yarn": ("llama", dict(rope_theta=500.0, rope_scaling=YARN)),
    "llama-yarn-mscale": (
        "llama", dict(rope_theta=500.0, rope_scaling=YARN | dict(mscale=2.0, mscale_all_dim=0.5, truncate=False))
    ),
    "llama-yarn-factor": ("llama", dict(rope_theta=500.0, rope_scaling=YARN | dict(attention_factor=1.5))),
    "llama-bias": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "granite": ("granite", {}),
    "granite-bias": ("granite", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=False)),
}  # fmt: skip


@pytest.fixture(scope="module")
def pair():
    """pair(case) -> the reference and our decoder with the same random tensors, made once each."""
    made = {}

    def make(case):
        if case not in made:
            family, changes = CASES[case]
            raw = tiny_raw(family, **changes)
            reference = random_reference(raw)
            made[case] = reference, decoder_like(reference, raw)
        return made[case]

    return make


def random_documents(lengths=LENGTHS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (n,), generator=generator) for n in lengths]


def packed_hidden(model, documents):
    memory = PackedDocuments([len(d) for d in documents])
    return model.hidden(torch.cat(documents), memory.positions, memory)


def relative_difference(ours, truth):
    return ((ours - truth).abs().max() / truth.abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_packed_documents_and_batches_give_the_logits_of_transformers(case, pair):
    reference, model = pair(case)
    documents = random_documents()
    expected = torch.cat([reference(document[None]).logits[0] for document in documents])
    assert relative_difference(model.logits(packed_hidden(model, documents)), expected) < TOLERANCE
    batch = torch.stack(random_documents([70, 70]))
    logits = model(batch)
    assert logits.shape == (2, 70, 97) and logits.dtype == torch.float32
    assert relative_difference(logits, reference(batch).logits) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_reward_models_give_the_scores_of_transformers(family):
    raw = tiny_raw(family, reward=True)
    reference = random_reference(raw)
    model = decoder_like(reference, raw)
    documents = random_documents()
    hidden = packed_hidden(model, documents)
    ends = torch.tensor(LENGTHS).cumsum(0) - 1
    expected = torch.cat([reference(document[None]).logits[0] for document in documents])
    assert relative_difference(model.score(hidden)[ends, 0], expected) < TOLERANCE


# What dropping or misreading each field does to the logits: the equality above would see it.
MUTATIONS = [
    ("qwen2", dict(theta=1e6)), ("qwen2", dict(qkv_bias=False)), ("qwen2-tied", dict(tie_word_embeddings=False)),
    ("qwen3", dict(theta=1e4)), ("qwen3", dict(qk_norm=False)), ("qwen3-eps", dict(rms_norm_eps=1e-6)),
    ("llama-bias", dict(qkv_bias=False)), ("llama-bias", dict(o_bias=False)), ("llama-bias", dict(mlp_bias=False)),
    ("llama-plain", dict(theta=1e4)), ("llama-llama3", dict(type="default")), ("llama-llama3", dict(factor=4.0)),
    ("llama-llama3", dict(low_freq_factor=0.5)), ("llama-llama3", dict(high_freq_factor=16.0)),
    ("llama-llama3", dict(original_max_positions=256)),
    ("llama-linear", dict(type="default")), ("llama-linear", dict(factor=2.0)),
    ("llama-yarn", dict(type="default")), ("llama-yarn", dict(type="linear")), ("llama-yarn", dict(factor=2.0)),
    ("llama-yarn", dict(original_max_positions=256)), ("llama-yarn", dict(beta_fast=32.0)),
    ("llama-yarn", dict(beta_slow=0.1)), ("llama-yarn", dict(attention_factor=1.0)),
    ("llama-yarn-factor", dict(attention_factor=None)), ("llama-yarn-mscale", dict(mscale=None)),
    ("llama-yarn-mscale", dict(mscale_all_dim=1.0)), ("llama-yarn-mscale", dict(truncate=True)),
    ("granite", dict(embedding_multiplier=1.0)), ("granite", dict(attention_multiplier=8**-0.5)),
    ("granite", dict(residual_multiplier=1.0)), ("granite", dict(logits_scaling=1.0)), ("granite", dict(theta=1e6)),
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("case", "change"), MUTATIONS, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_every_field_moves_the_logits_far_beyond_the_tolerance(case, change, pair):
    _, model = pair(case)
    config = model.config
    in_rope = {key: value for key, value in change.items() if hasattr(config.rope, key)}
    changed = replace(config, rope=replace(config.rope, **in_rope)) if in_rope else replace(config, **change)
    mutant = make_decoder(changed)
    mutant.load_state_dict(model.state_dict(), strict=False)
    tokens = torch.stack(random_documents([80]))
    assert relative_difference(mutant(tokens), model(tokens)) > 100 * TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("case", ["qwen2", "qwen3-bias", "llama-bias", "granite-bias"])
def test_every_norm_and_bias_matters(case, pair):
    _, model = pair(case)
    mutant, tokens = copy.deepcopy(model), torch.stack(random_documents([80]))
    expected = model(tokens)
    for name, tensor in mutant.named_parameters():
        if tensor.ndim == 1:
            kept = tensor.clone()
            tensor.fill_(1.0 if "norm" in name else 0.0)  # what a fresh model has
            assert relative_difference(mutant(tokens), expected) > 100 * TOLERANCE, name
            tensor.copy_(kept)


# One changed value for each field of config.json that the four transformers classes or their base read.
ALTERED = dict(
    vocab_size=89, hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=8,
    num_key_value_heads=1, head_dim=4, hidden_act="gelu", max_position_embeddings=128, initializer_range=0.5,
    rms_norm_eps=0.3, use_cache=False, tie_word_embeddings=True, attention_dropout=0.5, attention_bias=True,
    mlp_bias=True, pretraining_tp=2, pad_token_id=5, is_causal=False, rope_theta=77.0, partial_rotary_factor=0.5,
    original_max_position_embeddings=32, use_sliding_window=True, sliding_window=4, max_window_layers=0,
    layer_types=["full_attention", "sliding_attention"], per_layer_config={"1": {"intermediate_size": 24}},
    rope_scaling=dict(type="dynamic", factor=2.0), rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=9.0),
    embedding_multiplier=3.0, attention_multiplier=0.5, residual_multiplier=0.5, logits_scaling=3.0,
)  # fmt: skip
REFUSED = {"hidden_act", "is_causal", "partial_rotary_factor", "use_sliding_window", "layer_types", "per_layer_config",
           "rope_scaling"}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_that_transformers_reads_is_computed_or_refused(family):
    tokens = torch.stack(random_documents([80])) % 89
    # a window that starts to matter as soon as use_sliding_window is true
    base = tiny_raw(family, sliding_window=4, max_window_layers=0)
    for field, value in ALTERED.items():
        raw = base | {field: value}
        if field == "rope_parameters":
            raw.pop("rope_scaling", None)  # which goes before it
        try:
            ModelConfig.from_dict(raw)
        except ValueError as error:
            assert field in REFUSED and field in str(error)
            continue
        assert field not in REFUSED
        reference = random_reference(raw)
        assert relative_difference(decoder_like(reference, raw)(tokens), reference(tokens).logits) < TOLERANCE, field


@torch.no_grad()
@pytest.mark.parametrize("block_size", [40, 4, 1])
@pytest.mark.parametrize("case", ["qwen3", "llama-llama3", "granite"])
def test_cached_decoding_gives_the_logits_of_the_whole_text(case, block_size, pair):
    """Five texts through a used cache of slots (40) or pages, in chunks, batches and moves of all kinds."""
    reference, model = pair(case)
    texts = random_documents([40, 25, 31, 35, 22])
    expected = [reference(text[None]).logits[0] for text in texts]
    per_text = 40 // block_size
    cache = KVCache(model.config, 4 * per_text, block_size, torch.device("cpu"), torch.float32)
    cache.keys.normal_(std=30)  # as if every slot had been used before
    cache.values.normal_(std=30)
    # which blocks are slot 0, 1, ...; slots have to lie in order, pages need not
    shuffled = torch.randperm(4 * per_text, generator=torch.Generator().manual_seed(0))
    tables = (torch.arange(4) if per_text == 1 else shuffled).view(4, per_text).to(torch.int32)
    done = [0] * len(texts)  # tokens of each text in the cache

    def check(text, logits):
        assert relative_difference(logits, expected[text][done[text] : done[text] + len(logits)]) < TOLERANCE
        done[text] += len(logits)

    def prefill(texts_in, slots, lengths):
        chunks = [Chunk(tables[slot].tolist(), done[text], n)
                  for text, slot, n in zip(texts_in, slots, lengths, strict=True)]
        memory = Prefill(cache, chunks)
        parts = zip(texts_in, lengths, strict=True)
        tokens = torch.cat([texts[text][done[text] : done[text] + n] for text, n in parts])
        logits = model.logits(model.hidden(tokens, memory.positions, memory))
        for text, part in zip(texts_in, logits.split(lengths), strict=True):
            check(text, part)

    def decode(active, steps):  # active: the text in slots 0, 1, ...
        for _ in range(steps):
            positions = torch.tensor([done[text] for text in active])
            tokens = torch.stack([texts[text][done[text]] for text in active])
            memory = (SlotDecode(cache, positions) if per_text == 1
                      else PagedDecode(cache, tables[: len(active)], positions))
            logits = model.logits(model.hidden(tokens, positions, memory))
            for text, row in zip(active, logits, strict=True):
                check(text, row[None])

    prefill([0, 1, 2], [2, 0, 1], [13, 1, 12])
    prefill([1, 0], [0, 2], [2, 7])  # goes on where it stopped
    decode([1, 2, 0], 8)
    for source, target in zip(tables[2].tolist(), tables[1].tolist(), strict=True):  # text 2 leaves
        cache.copy(source, target, block_size)
    decode([1, 0], 4)
    prefill([3, 4, 0], [2, 3, 1], [7, 7, 2])  # slot 2 holds what text 0 left there
    decode([1, 0, 3, 4], 6)
    assert done == [40, 21, 20, 13, 13]


def test_a_cache_holds_as_many_bytes_as_it_says():
    config = tiny_config("qwen3")
    cache = KVCache(config, 3, 10, torch.device("cpu"), torch.bfloat16)  # and a scratch block
    assert cache.keys.nbytes + cache.values.nbytes == 4 * 10 * KVCache.bytes_per_position(config, torch.bfloat16)


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_near_to_float32_as_transformers(family, seed):
    raw = tiny_raw(family, num_hidden_layers=8, hidden_size=64)
    theirs = random_reference(raw, seed, attention="sdpa")
    rotary = copy.deepcopy(theirs.model.rotary_emb)
    theirs = theirs.to(torch.bfloat16)
    theirs.model.rotary_emb = rotary  # .to() rounded the frequencies too, which from_pretrained does not
    tokens = torch.stack(random_documents([100] * 4, seed))
    ours = decoder_like(theirs, raw)(tokens)
    rounded = theirs(tokens).logits.float()
    truth = theirs.float()(tokens).logits

    def rms(logits):
        return (logits - truth).square().mean().sqrt()

    assert ours.dtype == torch.float32 and 0 < rms(ours) <= 1.1 * rms(rounded)


ROPES = {
    "qwen3": dict(rope_theta=1e6),
    "r1-qwen": dict(rope_theta=10000),
    "llama-3.1": dict(rope_theta=500000.0, rope_scaling=LLAMA3_ROPE | dict(original_max_position_embeddings=8192)),
    "qwen3-yarn": dict(
        rope_theta=1e6, rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768)
    ),
    "linear": dict(rope_theta=1e4, rope_scaling=dict(type="linear", factor=3.0)),
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_of_real_size_equals_transformers_bit_for_bit_at_long_positions(name):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    raw = tiny_raw("llama", head_dim=128, max_position_embeddings=131072, **({"rope_scaling": None} | ROPES[name]))
    theirs = LlamaRotaryEmbedding(LlamaConfig.from_dict(copy.deepcopy(raw)))
    positions = torch.tensor([0, 1, 2, 1000, 8191, 32768, 100_003, 131_071])
    expected_cos, expected_sin = theirs(torch.zeros(1), positions[None])  # [1, N, head_dim], each half the same
    rope_frequencies.cache_clear()
    with torch.device("meta"):  # a default device must not decide where, and so how, the powers are computed
        cos, sin = rope_tables(ModelConfig.from_dict(raw).rope, 128, positions)
    assert cos.dtype == torch.float32
    assert torch.equal(cos[:, 0], expected_cos[0])
    assert torch.equal(sin[:, 0, 64:], expected_sin[0, :, 64:]) and torch.equal(sin[:, 0, :64], -sin[:, 0, 64:])


def test_attn_factor_is_multiplied_in_as_by_yarns_authors():
    """DeepSeek-R1-0528-Qwen3-8B's rope_scaling: its factor takes back YaRN's own, 0.1 ln 4 + 1."""
    scaling = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    both = (scaling, scaling | {"attn_factor": 0.8782488562869419})
    ropes = [tiny_config("qwen3", rope_scaling=one).rope for one in both]
    plain, corrected = (rope_frequencies(rope, 16, torch.device("cpu")) for rope in ropes)
    assert torch.equal(plain[0], corrected[0])
    assert plain[1] == pytest.approx(0.1 * math.log(4) + 1) and corrected[1] == pytest.approx(1.0)


@pytest.mark.parametrize("case", ["qwen3-tied", "granite-bias"])
def test_gradients_equal_those_of_transformers(case, pair):
    reference, model = pair(case)
    documents = random_documents()
    rope_frequencies.cache_clear()
    with torch.inference_mode():  # a rollout comes first and fills the cache of rope_frequencies
        packed_hidden(model, documents)

    def loss(logits, document):  # next token, summed
        return F.cross_entropy(logits[:-1], document[1:], reduction="sum")

    logits = model.logits(packed_hidden(model, documents)).split(LENGTHS)
    sum(loss(*pair) for pair in zip(logits, documents, strict=True)).backward()
    sum(loss(reference(document[None]).logits[0], document) for document in documents).backward()
    expected = {name: tensor.grad for name, tensor in reference.named_parameters()}
    for name, tensor in model.named_parameters():
        assert expected[name].abs().max() > 0 and relative_difference(tensor.grad, expected[name]) < TOLERANCE, name


@pytest.mark.parametrize("case", ["qwen2-tied", "qwen3", "llama-bias", "granite"])
def test_no_documents_still_give_every_weight_a_zero_gradient(case):
    """Under sharding a rank without documents joins the collectives of the others only for weights with a gradient."""
    family, changes = CASES[case]
    model = make_decoder(tiny_config(family, **changes))
    empty = PackedDocuments([])
    hidden = model.hidden(torch.zeros(0, dtype=torch.long), empty.positions, empty)
    assert hidden.shape == (0, 32)
    hidden.sum().backward()
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in model.model.parameters())


@pytest.mark.parametrize("groups", [True, False])
def test_one_kernel_for_all_documents_gets_what_the_loop_computes(groups, pair, monkeypatch):
    """PyTorch's packed attention runs on CUDA alone: here a stand-in by its documentation, in dense float64.

    It takes fewer key heads than query heads as they are, with an argument that says so or, in PyTorch 2.11, without.
    """

    def stand_in(q, k, v, ends_q, ends_k, longest_q, longest_k, *, scale, window_size, enable_gqa=False):
        assert ends_q.dtype == torch.int32 and torch.equal(ends_q, ends_k) and window_size == (-1, 0)
        assert longest_q == longest_k == max(LENGTHS) and enable_gqa == groups and q.shape[1] != k.shape[1]
        document = torch.bucketize(torch.arange(len(q)), ends_q, right=True)
        seen = (document[:, None] == document) & torch.ones(len(q), len(q)).tril().bool()
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v.double()).to(q.dtype)

    model, documents = pair("qwen3")[1], random_documents()
    expected = [model(document[None])[0] for document in documents]
    monkeypatch.setattr(memory, "varlen_works", lambda q: True)
    monkeypatch.setattr(memory, "varlen_attn", stand_in)
    monkeypatch.setattr(memory, "VARLEN_GROUPS_HEADS", {"enable_gqa": True} if groups else {})
    packed = PackedDocuments(LENGTHS)
    found = model.logits(model.hidden(torch.cat(documents), packed.positions, packed)).split(LENGTHS)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Products(TorchDispatchMode):
    """Counts the FLOPs of products and attention; torch's own counter knows neither oneDNN's nor attention on a CPU."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.overloadpacket in flop_registry:
            self.flops += flop_registry[op.overloadpacket](*args, **(kwargs or {}), out_val=out)
        elif op is torch.ops.mkldnn._linear_pointwise.default:
            self.flops += 2 * out.numel() * args[0].shape[-1]
        elif op is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.flops += 4 * args[0].numel() * args[1].shape[-2]
        return out


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "granite4"])
def test_what_is_recomputed_decides_memory_and_flops_and_no_gradient(family, onednn, monkeypatch):
    """`some` repeats no product, `layer` those of one forward pass, at times without each layer's last."""
    if onednn and not cpu_matmul.packing_works(torch.float32):
        pytest.skip("this CPU has no oneDNN")
    monkeypatch.setattr(cpu_matmul, "prefers_onednn", lambda x, weight: onednn)
    torch.manual_seed(0)
    model, documents = make_decoder(tiny_config(family)), random_documents()
    packed = PackedDocuments(LENGTHS)
    kept, flops, forward, gradients = {}, {}, {}, {}
    for recompute in RECOMPUTE:
        model.recompute(recompute)
        with LiveBytes(model.parameters()) as memory, Products() as products:
            loss = model.hidden(torch.cat(documents), packed.positions, packed).square().sum()
            kept[recompute], forward[recompute] = memory.live, products.flops
            loss.backward()
        flops[recompute] = products.flops
        gradients[recompute] = [p.grad for p in model.parameters() if p.grad is not None]
        model.zero_grad()
    for recompute in ("some", "layer"):
        assert all(map(torch.equal, gradients[recompute], gradients["none"]))
    assert flops["some"] == flops["none"] and forward["some"] == forward["none"] == forward["layer"] > 0
    repeated = flops["layer"] - flops["none"]
    assert 0.75 * forward["none"] < repeated <= forward["none"]
    assert kept["layer"] < kept["none"] / 5 and kept["layer"] < kept["some"] < kept["none"]
    with torch.no_grad():
        model(documents[0][None])  # nothing to recompute


def test_the_products_that_are_kept_exist():
    """A name that is none would be recomputed, and nothing would say so."""
    for name in PRODUCTS:
        namespace, operation = name.split("::")
        assert hasattr(getattr(torch.ops, namespace), operation) or not torch.backends.mkldnn.is_available()


@pytest.mark.parametrize(
    ("family", "changes"), [*CASES.values(), *((name, dict(reward=True)) for name in ("qwen2", "qwen3", "llama"))]
)
def test_the_model_holds_the_tensors_of_the_checkpoint_and_nothing_else(family, changes, tmp_path):
    random_checkpoint(tmp_path, family, **changes)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {name: file.get_slice(name).get_shape() for name in file.keys()}
    model = make_decoder(tiny_config(family, **changes))
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == stored
    assert not list(model.buffers())
