"""Adapters: against transformers and PEFT, against finite differences, and the sampler against the forward pass."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from tiny_models import decoder_like, random_checkpoint, random_reference, tiny_config, tiny_raw
from torch import nn

from nanosafe.model.adapter_files import Adapter, save_adapter
from nanosafe.model.decode import join_projections, products
from nanosafe.model.granite import make_decoder
from nanosafe.model.lora import adapted, adapters_off, merge, start_adapters
from nanosafe.model.recompute import RECOMPUTE
from nanosafe.model.weights import load_checkpoint, save_model
from nanosafe.names import load_model
from nanosafe.sampler.generation import generate
from nanosafe.sampler.params import SamplingParams

FAMILIES = ("qwen2", "qwen3", "llama", "granite", "granite4")  # biases; an own head; a tied one; Mamba and experts
IDS = torch.tensor([[5, 9, 3, 77, 20, 41, 8, 13, 60, 2, 30, 31]])
RANK, ALPHA = 3, 5.0


def randomize(model) -> None:
    """Adapters that change the logits much."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for layer in adapted(model).values():
            for parameter in (layer.lora_A, layer.lora_B):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def checkpoint(folder, family: str):
    """transformers' model in `folder`, and ours with random adapters."""
    reference = random_checkpoint(folder, family)
    model = load_checkpoint(folder, "cpu", torch.float32, lora=(RANK, ALPHA))
    randomize(model)
    return reference, model


def add_by_hand(reference, model) -> None:
    """base + alpha / R * B A in transformers' model, computed in float64."""
    names = dict(reference.named_parameters())
    with torch.no_grad():
        for name, layer in adapted(model).items():
            weight = names[f"{name}.weight"]
            product = layer.lora_B.double() @ layer.lora_A.double()
            weight.copy_(weight.double() + ALPHA / RANK * product)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_adapters_and_the_merged_folder_are_base_plus_ba_in_transformers(family, tmp_path):
    import transformers

    reference, model = checkpoint(tmp_path / "base", family)
    before = reference(IDS).logits
    with adapters_off(model):
        assert_close(model(IDS), before)
    add_by_hand(reference, model)
    expected = reference(IDS).logits
    assert (expected - before).abs().max() > 0.1 * before.abs().max(), "the adapters change nothing"
    assert_close(model(IDS), expected)
    save_model(model, tmp_path / "merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for name, weight in theirs.named_parameters():
        torch.testing.assert_close(weight, dict(reference.named_parameters())[name], rtol=0, atol=1e-6)
    assert_close(theirs(IDS).logits, expected)
    assert_close(model(IDS), expected)  # it is merged now too
    assert_close(load_model(tmp_path / "merged", dtype=torch.float32)(IDS), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_the_layers_has_one_but_routers(family):
    with torch.device("meta"):
        model = make_decoder(replace(tiny_config(family), lora=(RANK, ALPHA)))
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    outside = {name for name in linear if name in ("lm_head", "score") or name.endswith("router.layer")}
    assert adapted(model).keys() == linear - outside and len(adapted(model)) >= 8
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)


def test_training_starts_from_the_model_itself(tmp_path):
    random_checkpoint(tmp_path, "qwen3")
    model = load_checkpoint(tmp_path, "cpu", torch.float32, lora=(RANK, ALPHA))
    start_adapters(model, seed=1)
    assert torch.equal(model(IDS), load_checkpoint(tmp_path, "cpu", torch.float32)(IDS))
    drawn = {name: layer.lora_A.clone() for name, layer in adapted(model).items()}
    layer = "model.layers.0.mlp.down_proj"
    assert 0.8 * 48**-0.5 < drawn[layer].abs().max() <= 48**-0.5, "PEFT's bound: 1/sqrt(in)"
    start_adapters(model, seed=1)
    assert torch.equal(adapted(model)[layer].lora_A, drawn[layer])
    start_adapters(model, seed=2)
    assert not torch.equal(adapted(model)[layer].lora_A, drawn[layer])
    assert not torch.equal(drawn["model.layers.0.mlp.gate_proj"], drawn["model.layers.0.mlp.up_proj"])


@pytest.mark.parametrize("family", ["qwen3", "granite4"])
@torch.no_grad()
def test_peft_loads_the_adapter_with_equal_logits(family, tmp_path):
    import peft  # here, because it takes seconds that the other tests need not wait
    reference, model = checkpoint(tmp_path / "base", family)
    save_adapter(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter")
    assert_close(theirs(IDS).logits, model(IDS))
    names = {name.replace(".default", "") for name in theirs.state_dict() if "lora_" in name}
    assert len(names) == 2 * len(adapted(model)), "PEFT has no adapter beside those of the file"


@torch.no_grad()
def test_an_adapter_that_peft_wrote_is_read(tmp_path):
    import peft  # here, because it takes seconds that the other tests need not wait
    reference = random_checkpoint(tmp_path / "base", "qwen3")
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(reference, settings)
    theirs.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    expected, base = theirs(IDS).logits, load_model(tmp_path / "base", dtype=torch.float32)(IDS)
    (tmp_path / "adapter/config.json").write_bytes((tmp_path / "base/config.json").read_bytes())
    assert_close(load_model(tmp_path / "adapter", dtype=torch.float32)(IDS), expected)
    assert (base - expected).abs().max() > 1e-2 * expected.abs().max()


@torch.no_grad()
def test_a_folder_of_adapters_is_the_merged_model(tmp_path):
    _, model = checkpoint(tmp_path / "base", "llama")
    save_adapter(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    loaded = load_model(tmp_path / "adapter", dtype=torch.float32)
    assert not adapted(loaded)
    assert_close(loaded(IDS), model(IDS))
    other = load_checkpoint(tmp_path / "base", "cpu", torch.float32, lora=(RANK, ALPHA))
    Adapter(tmp_path / "adapter").copy_to(other)
    assert torch.equal(other(IDS), model(IDS))


def test_what_is_no_adapter_of_this_model_is_refused(tmp_path):
    _, model = checkpoint(tmp_path / "base", "qwen3")
    save_adapter(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    path = tmp_path / "adapter/adapter_config.json"
    settings = json.loads(path.read_text())
    with pytest.raises(ValueError, match="not those of the model in layers or shape"):
        Adapter(tmp_path / "adapter").copy_to(
            load_checkpoint(tmp_path / "base", "cpu", torch.float32, lora=(RANK + 1, ALPHA)))  # fmt: skip
    random_checkpoint(tmp_path / "wider", "qwen3", intermediate_size=64)
    for change, message in (
        ({"use_dora": True}, "field 'use_dora'"), ({"alpha_pattern": {"q_proj": 1}}, "field 'alpha_pattern'"),
        ({"r": 0}, "field 'r'"), ({"peft_type": "IA3"}, "field 'peft_type'"),
        ({"base_model_name_or_path": str(tmp_path / "wider")}, "adapter of .*mlp.* does not fit .*wider"),
        ({"base_model_name_or_path": str(tmp_path / "gone")}, "gone does not exist"),
        ({"base_model_name_or_path": str(tmp_path / "adapter")}, "field 'base_model_name_or_path'"),
    ):  # fmt: skip
        path.write_text(json.dumps(settings | change))
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_model(tmp_path / "adapter", dtype=torch.float32)


# Gradients.


def loss_of(model) -> torch.Tensor:
    return model(IDS)[0, :-1].log_softmax(-1).gather(1, IDS[0, 1:, None]).mean().neg()


@pytest.mark.parametrize("family", ["qwen2", "granite"])
def test_gradients_are_those_of_finite_differences(family):
    """Of the merged model in transformers: nothing of the adapters' own code computes them."""
    raw = tiny_raw(family)
    reference = random_reference(raw).double()
    model = make_decoder(replace(tiny_config(family), lora=(RANK, ALPHA)))
    model.load_state_dict(decoder_like(random_reference(raw), raw).state_dict(), strict=False)
    randomize(model)
    loss_of(model).backward()

    def loss_with(step: float, directions: dict) -> float:
        moved = copy.deepcopy(reference)
        weights = dict(moved.named_parameters())
        with torch.no_grad():
            for name, layer in adapted(model).items():
                A, B = (layer.lora_A.double(), layer.lora_B.double())
                A, B = A + step * directions[name][0], B + step * directions[name][1]
                weights[f"{name}.weight"] += ALPHA / RANK * B @ A
            return loss_of(lambda ids: moved(ids).logits).item()

    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        directions, along = {}, 0.0
        for name, layer in adapted(model).items():
            parts = [torch.randn(p.shape, generator=generator).double() for p in (layer.lora_A, layer.lora_B)]
            directions[name] = parts
            along += (layer.lora_A.grad * parts[0]).sum().item() + (layer.lora_B.grad * parts[1]).sum().item()
        # transformers computes its norms in float32, whatever the type of the model: steps cannot be small, and two of
        # them cancel the error of third order (Richardson).
        slopes = []
        for step in (1e-3, 5e-4):
            slopes.append((loss_with(step, directions) - loss_with(-step, directions)) / (2 * step))
        slope = (4 * slopes[1] - slopes[0]) / 3
        assert along == pytest.approx(slope, rel=1e-3, abs=1e-4)
    assert not any(p.grad is not None for n, p in model.named_parameters() if "lora_" not in n)


def test_a_step_at_full_width_moves_merged_weights_along_their_own_gradient():
    """With A the identity, a step on B alone is a step of the full weight: by -lr scale^2 times its gradient."""
    raw, width, lr = tiny_raw("qwen3"), 64, 0.01
    plain = decoder_like(random_reference(raw), raw)
    model = make_decoder(replace(tiny_config("qwen3"), lora=(width, 2.0 * width)))
    model.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        for layer in adapted(model).values():
            layer.lora_A.copy_(torch.eye(width, layer.in_features))
    loss_of(plain).backward()
    loss_of(model).backward()
    before = loss_of(model).item()
    with torch.no_grad():
        for layer in adapted(model).values():
            layer.lora_B -= lr * layer.lora_B.grad
    merge(model)
    predicted = 0.0
    weights, moved = dict(plain.named_parameters()), dict(model.named_parameters())
    for name in adapted(model):
        weight = weights[f"{name}.weight"]
        change = moved[f"{name}.weight"] - weight
        torch.testing.assert_close(change, -lr * 4 * weight.grad, rtol=0, atol=1e-6)
        predicted += (change * weight.grad).sum().item()
    assert predicted < 0
    assert loss_of(model).item() - before == pytest.approx(predicted, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recomputation_changes_no_gradient(dtype):
    gradients = {}
    for recompute in RECOMPUTE:
        torch.manual_seed(0)
        model = make_decoder(replace(tiny_config("qwen3"), lora=(RANK, ALPHA))).to(dtype)
        randomize(model)
        model.recompute(recompute)
        loss_of(model).backward()
        gradients[recompute] = [p.grad for p in model.parameters() if p.requires_grad]
    for recompute in RECOMPUTE[1:]:
        for a, b in zip(gradients["none"], gradients[recompute], strict=True):
            assert torch.equal(a, b) and a.abs().max() > 0


# Sampling.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [20, 40])  # packed from 32 new tokens on
def test_the_sampler_draws_from_the_policy_with_its_adapters(family, tokens, tmp_path):
    _, model = checkpoint(tmp_path, family)
    prompts = [IDS[0, :7].tolist(), [8, 3, 30]]
    for expected_change in (True, False):
        outputs = generate(model, prompts, SamplingParams(max_new_tokens=tokens, ignore_eos=True, seed=3))
        for prompt, [completion] in zip(prompts, outputs, strict=True):
            ids = torch.tensor([prompt + completion.token_ids])
            with torch.no_grad():
                logprobs = model(ids)[0, len(prompt) - 1 : -1].log_softmax(-1)
                with adapters_off(model):
                    without = model(ids)[0, len(prompt) - 1 : -1].log_softmax(-1)
            found = torch.tensor(completion.logprobs)
            ours = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0]
            assert (found - ours).abs().max() < 1e-5 * max(1, logprobs.abs().max().item())
            if expected_change:
                assert (found - without.gather(1, ids[0, len(prompt) :, None])[:, 0]).abs().max() > 0.1
        with torch.no_grad():  # as after an update: a packed copy of before is of no use
            for layer in adapted(model).values():
                layer.lora_B.mul_(0.1)


def test_one_product_for_joined_projections_adds_each_layers_own_adapter():
    for family in ("qwen2", "qwen3"):  # with biases and without
        torch.manual_seed(0)
        model = make_decoder(replace(tiny_config(family), lora=(RANK, ALPHA)))
        randomize(model)
        join_projections(model)
        attention, mlp, x = model.model.layers[0].self_attn, model.model.layers[0].mlp, torch.randn(5, 32)
        for group in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
            for layer, found in zip(group, products(x, *group), strict=True):
                plain = nn.functional.linear(x, layer.weight, layer.bias)
                expected = plain + ALPHA / RANK * (x @ layer.lora_A.T) @ layer.lora_B.T
                torch.testing.assert_close(found, expected)
                assert (found - plain).abs().max() > 0.1
