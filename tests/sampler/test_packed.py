"""Packed weights: the same logits, nothing else copied, and the plain weights where torch cannot pack."""

import copy
import dataclasses
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from test_sampler import PROMPTS, models, transformers_greedy
from tiny_models import decoder_like, tiny_raw

from nanosafe.sampler import engine, packed
from nanosafe.sampler.generation import generate
from nanosafe.sampler.params import SamplingParams

LONG = list(range(3, 45))  # 42 tokens
IDS = torch.tensor([LONG[:30], LONG[12:]])
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=40, ignore_eos=True)
V, HIDDEN = 97, 32
PLENTY = 1 << 30  # bytes of memory
FAMILIES = ["qwen2", "qwen3", "granite"]  # biases; an own head; a tied head


def fresh_model(family: str):
    return decoder_like(models(family)[0], tiny_raw(family))


def needs_packing(dtype: torch.dtype) -> None:
    if not packed.packing_works(dtype):
        pytest.skip(f"this PyTorch packs no {dtype} weights on this CPU")


@pytest.fixture
def widths(monkeypatch) -> list[int]:
    """The width of every product with packed weights, as it is computed."""
    found, real = [], torch.ops.mkldnn

    def multiply(*arguments):
        product = real._linear_pointwise(*arguments)
        found.append(product.shape[-1])
        return product

    functions = SimpleNamespace(_reorder_linear_weight=real._reorder_linear_weight, _linear_pointwise=multiply)
    monkeypatch.setattr(torch.ops, "mkldnn", functions)
    monkeypatch.setattr(packed, "SMALLEST", 1)
    return found


@torch.no_grad()
def packed_widths(model, widths: list[int]) -> list[int]:
    """Of which widths the packed products of one forward are."""
    view = packed.packed_view(model, PLENTY)
    widths.clear()
    view(IDS)
    return list(widths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_view_computes_the_same_and_shares_the_rest(family, dtype, widths):
    needs_packing(dtype)
    model = fresh_model(family).to(dtype)
    config, modules, tensors = model.config, dict(model.named_modules()), dict(model.named_parameters())
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    view = packed.packed_view(model, PLENTY)
    widths.clear()
    with torch.no_grad():
        fast = view(IDS)
        packed_products = list(widths)
        plain, exact = model(IDS), copy.deepcopy(model).float()(IDS)
    assert widths == packed_products  # the model itself does not use them
    attention = model.model.layers[0].self_attn
    sizes = [module.out_features for module in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert packed_products[-1] == V and sum(packed_products) == 2 * (sum(sizes) + 2 * HIDDEN + 2 * 48) + V
    assert fast.dtype == torch.float32
    if dtype == torch.float32:
        torch.testing.assert_close(fast, exact, rtol=1e-5, atol=1e-5)
    else:  # no further from what the same weights give in float32
        assert (fast - exact).norm() < 1.2 * (plain - exact).norm() < 0.05 * exact.norm()

    shared = [name for name in tensors if "embed" in name or "layernorm" in name or name == "model.norm.weight"]
    assert len(shared) == 2 * 2 + 2 and all(view.get_parameter(name) is tensors[name] for name in shared)
    assert model.config is config and config.tie_word_embeddings == (family == "granite")
    assert dict(model.named_modules()) == modules
    for name, tensor in model.named_parameters():
        assert tensor is tensors[name] and torch.equal(tensor, before[name])


def test_only_large_matrices_are_packed(widths, monkeypatch):
    needs_packing(torch.float32)
    for family in ("qwen3", "granite"):
        for smallest, head in ((V * HIDDEN, True), (V * HIDDEN + 1, False), (2**18, False)):
            monkeypatch.setattr(packed, "SMALLEST", smallest)
            assert (V in packed_widths(fresh_model(family), widths)) == head
            assert HIDDEN not in widths  # what projects back is 48 * 32 or 64 * 32
    assert widths == []


def test_the_copies_are_kept_while_the_model_stays_as_it_is(monkeypatch):
    needs_packing(torch.float32)
    monkeypatch.setattr(packed, "SMALLEST", 1)
    model = fresh_model("qwen3")
    view = packed.packed_view(model, PLENTY)
    assert packed.packed_view(model, PLENTY) is view and packed.packed_view(model, 0) is view
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight.neg_()
    changed = packed.packed_view(model, PLENTY)
    torch.testing.assert_close(changed(IDS), model(IDS), rtol=1e-5, atol=1e-5)
    assert changed is not view and not torch.allclose(view(IDS), model(IDS), rtol=1e-3, atol=1e-3)
    weight.data = weight.data.neg()  # another tensor, which no counter tells of
    moved = packed.packed_view(model, PLENTY)
    torch.testing.assert_close(moved(IDS), model(IDS), rtol=1e-5, atol=1e-5)
    weight.data.mul_(0.5)  # the same tensor, and again no counter tells
    halved = packed.packed_view(model, PLENTY)
    torch.testing.assert_close(halved(IDS), model(IDS), rtol=1e-5, atol=1e-5)
    packed.forget_packed(model)
    assert packed.packed_view(model, PLENTY) is not halved
    gone = weakref.ref(moved)
    del model, view, changed, moved, weight
    gc.collect()
    assert gone() is None


def test_copies_that_would_take_half_of_the_memory_are_not_made():
    needs_packing(torch.float32)
    model = fresh_model("qwen3")
    weights = sum(tensor.nbytes for tensor in model.parameters())
    assert packed.packed_view(model, 2 * weights) is model and packed.packed_view(model, 2 * weights + 1) is not model


def refuse(*_):
    raise RuntimeError("no oneDNN here")


@pytest.mark.parametrize("functions", [
    {},
    dict(_reorder_linear_weight=refuse),
    dict(_reorder_linear_weight=lambda weight, _: weight, _linear_pointwise=refuse),
    dict(_reorder_linear_weight=lambda weight, _: weight, _linear_pointwise=lambda x, *_: x + 1),
], ids=["missing", "refuse to pack", "refuse to multiply", "wrong"])  # fmt: skip
def test_without_torchs_private_functions_the_plain_weights_stay(functions, monkeypatch):
    monkeypatch.setattr(packed, "SMALLEST", 1)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**functions))
    model, prompts = fresh_model("qwen2"), [LONG, PROMPTS[1]]
    with torch.no_grad():
        torch.testing.assert_close(packed.packed_view(model, PLENTY)(IDS), model(IDS), rtol=1e-5, atol=1e-5)
    completions = generate(model, prompts, GREEDY)
    assert [c.token_ids for [c] in completions] == [transformers_greedy("qwen2", p, tokens=40) for p in prompts]


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_with_packed_weights_equals_transformers(family, widths, monkeypatch):
    needs_packing(torch.float32)
    model, prompts = fresh_model(family), [*PROMPTS, LONG]
    for block_size in (None, 4):
        widths.clear()
        completions = generate(model, prompts, GREEDY, block_size=block_size)
        assert [c.token_ids for [c] in completions] == [transformers_greedy(family, p, tokens=40) for p in prompts]
        assert widths.count(V) >= 40

    with torch.no_grad():  # training goes on: the next call must not use what was packed before
        model.model.layers[0].self_attn.v_proj.weight.neg_()
        widths.clear()
        [[completion], _] = generate(model, [LONG, LONG], GREEDY)
        logits = model(torch.tensor([LONG + completion.token_ids]))[0, len(LONG) - 1 : -1]
    assert logits.argmax(dim=1).tolist() == completion.token_ids and V in widths

    widths.clear()
    generate(model, prompts, dataclasses.replace(GREEDY, max_new_tokens=2))
    assert V not in widths  # too short to pay
    packed.forget_packed(model)
    monkeypatch.setattr(engine, "free_memory", lambda device: 2 * sum(tensor.nbytes for tensor in model.parameters()))
    generate(model, prompts, GREEDY, cache_bytes=2**22)
    assert V not in widths  # a second copy would take what the cache needs
