"""The optimizer against AdamW written out in float64, and what float32 masters are for."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config
from torch import nn

from nanosafe.model.granite import make_decoder
from nanosafe.model.weights import StoredTensors
from nanosafe.train.optim import Optimizer, cosine_schedule

EACH = pytest.mark.parametrize(
    "dtype, low_memory", [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
BETAS, EPS, DECAY, MAX_NORM = (0.9, 0.95), 1e-8, 0.1, 0.5


def small_model(dtype: torch.dtype, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
    return model(x).float().square().sum()


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        loss_of(model, step).backward()
        optimizer.step(lr=0.01)


def snapshot(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Weights and everything the optimizer remembers."""
    return {k: v.clone() for k, v in (optimizer.state() | model.state_dict()).items()}


def assert_identical(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_schedule_warms_up_from_above_0_then_falls_along_half_a_cosine():
    values = [cosine_schedule(step, 10, warmup_share=0.2, final_share=0.1) for step in range(10)]
    assert values[:3] == [0.5, 1.0, 1.0]
    assert values[4] == pytest.approx(0.1 + 0.45 * (1 + math.sqrt(0.5)))  # a quarter of the way
    assert values[6] == pytest.approx(0.55)  # half of it
    assert values[2:] == sorted(values[2:], reverse=True) and len(set(values[2:])) == 8
    assert 0.1 < values[9] < 0.15


def test_schedule_of_short_runs_and_without_warmup():
    assert cosine_schedule(0, 1, 0.05, 0.0) == cosine_schedule(0, 1, 0.0, 0.0) == 1.0
    assert [cosine_schedule(step, 2, 0.0, 0.0) for step in range(2)] == [1.0, pytest.approx(0.5)]
    assert [cosine_schedule(step, 3, 1.0, 0.0) for step in range(3)] == [pytest.approx(x / 3) for x in (1, 2, 3)]
    for steps in range(1, 60):
        assert all(0 < cosine_schedule(step, steps, 0.03, 0.0) <= 1 for step in range(steps))


@EACH
def test_steps_equal_clipped_adamw_in_float64(dtype, low_memory):
    """AdamW, algorithm 2 of arXiv 1711.05101, with gradients of the weights as the model holds them."""
    model = small_model(dtype)
    optimizer = Optimizer(
        model, betas=BETAS, eps=EPS, weight_decay=DECAY, max_grad_norm=MAX_NORM, low_memory=low_memory
    )
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(w) for name, w in weights.items()}
    second = {name: torch.zeros_like(w) for name, w in weights.items()}
    clipped, moved = 0, 0.0
    for t in range(1, 13):
        lr, scale = 0.02 / t, 1.0 if t % 2 else 0.01
        twin = copy.deepcopy(model)  # the same weights, but not those the optimizer watches
        (loss_of(twin, t) * scale).backward()
        (loss_of(model, t) * scale).backward()
        gradients = {name: p.grad.double() for name, p in twin.named_parameters()}
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
        clipped += norm > MAX_NORM
        for name, g in gradients.items():
            g = g * min(1.0, MAX_NORM / norm)
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * g
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * g.square()
            update = first[name] / (1 - BETAS[0] ** t) / ((second[name] / (1 - BETAS[1] ** t)).sqrt() + EPS)
            decay = DECAY if weights[name].ndim == 2 else 0.0
            weights[name] = weights[name] - lr * (update + decay * weights[name])
        assert optimizer.step(lr) == pytest.approx(norm, rel=1e-6)
        moved += lr
        for name, parameter in model.named_parameters():
            # 8-bit moments err by a few per cent of the way (test_split_adam.py), and bfloat16 by half its last bit.
            close = {"rtol": 2**-8, "atol": 0.05 * moved} if low_memory else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(optimizer.masters[name].double(), weights[name], **close)
            assert torch.equal(parameter, optimizer.masters[name].to(dtype))
    assert 0 < clipped < 12


@pytest.mark.parametrize("low_memory", [False, True])
def test_steps_too_small_for_bfloat16_add_up_in_the_masters(low_memory):
    def run(step_of):
        weight = nn.Parameter(torch.full((3, 3), 0.02, dtype=torch.bfloat16))
        step = step_of(weight)
        for _ in range(200):
            (weight.float() * torch.ones(3, 3)).sum().backward()
            step()
        return weight

    def masters(weight):
        optimizer = Optimizer(nn.ParameterList([weight]), low_memory=low_memory)
        return lambda: optimizer.step(5e-7)  # equal gradients: AdamW moves each weight by its rate

    def none(weight):
        adam = torch.optim.AdamW([weight], lr=5e-7, weight_decay=0.0)
        return lambda: (adam.step(), adam.zero_grad())

    start = torch.tensor(0.02).bfloat16()
    assert (run(none) == start).all()
    torch.testing.assert_close(run(masters).float(), torch.full((3, 3), start.item() - 200 * 5e-7), rtol=0, atol=7e-5)
    assert (run(masters) < start).all()


@EACH
def test_gradients_of_many_micro_batches_add_up_in_float32(dtype, low_memory):
    """In bfloat16 the sum of ones would end at 256."""
    model = nn.Linear(4, 1, bias=False).to(dtype)
    optimizer = Optimizer(model, low_memory=low_memory)
    for _ in range(1000):
        model.weight.sum().backward()
    assert optimizer.step(0.0) == pytest.approx(1000 * 2, rel=1e-6)  # the norm of four 1000s


@EACH
def test_tied_embeddings_get_both_gradients_and_stay_tied(dtype, low_memory):
    torch.manual_seed(0)
    tied = make_decoder(tiny_config("qwen3", tie_word_embeddings=True)).to(dtype)
    untied = make_decoder(tiny_config("qwen3")).to(dtype)
    untied.load_state_dict(tied.state_dict() | {"lm_head.weight": tied.head_weight})
    tokens = torch.arange(12)[None]
    for model in (tied, untied):
        optimizer = Optimizer(model, low_memory=low_memory, max_grad_norm=1e9)
        model(tokens).square().sum().backward()
        if model is untied:
            expected = optimizer.masters["model.embed_tokens.weight"].grad + optimizer.masters["lm_head.weight"].grad
        else:
            found = optimizer.masters["model.embed_tokens.weight"].grad.clone()
            before = tied.head_weight.clone()
            optimizer.step(0.01)
            assert tied.head_weight is tied.model.embed_tokens.weight
            assert not torch.equal(tied.head_weight, before)
            assert not any("lm_head" in name for name in optimizer.state())
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=scale * (1e-5 if dtype == torch.float32 else 2**-7))


@EACH
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_changes_nothing(dtype, low_memory, bad):
    model = small_model(dtype)
    optimizer = Optimizer(model, low_memory=low_memory, weight_decay=DECAY)
    train(model, optimizer, range(2))
    before = snapshot(model, optimizer)
    (loss_of(model, 2) + bad * model[0].weight[0, 0]).backward()
    assert not math.isfinite(optimizer.step(0.01))
    assert_identical(snapshot(model, optimizer), before)


@EACH
@pytest.mark.parametrize("how", ["discarded", "not finite"])
def test_a_step_not_taken_leaves_no_gradient_behind(dtype, low_memory, how):
    ends = []
    for spoil in (False, True):
        model = small_model(dtype)
        optimizer = Optimizer(model, low_memory=low_memory)
        train(model, optimizer, range(1))
        if spoil:
            (loss_of(model, 9) * (math.inf if how == "not finite" else 1)).backward()
            assert not math.isfinite(optimizer.discard() if how == "discarded" else optimizer.step(0.01))
        train(model, optimizer, range(1, 3))
        ends.append(snapshot(model, optimizer))
    assert_identical(*ends)


@EACH
def test_a_restored_optimizer_goes_on_bit_for_bit(dtype, low_memory, tmp_path):
    model = small_model(dtype)
    optimizer = Optimizer(model, low_memory=low_memory, weight_decay=DECAY)
    train(model, optimizer, range(3))
    save_file(optimizer.state(), tmp_path / "optimizer.safetensors")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    train(model, optimizer, range(3, 6))

    resumed = small_model(dtype, seed=1)
    resumed.load_state_dict(load_file(tmp_path / "model.safetensors"))
    other = Optimizer(resumed, low_memory=low_memory, weight_decay=DECAY)
    other.load_state(StoredTensors(tmp_path, "optimizer"))
    train(resumed, other, range(3, 6))
    assert_identical(snapshot(resumed, other), snapshot(model, optimizer))
    keys = {"step", "remainder", "ratio", "root", "scale"} if low_memory else {"step", "exp_avg", "exp_avg_sq"}
    keys |= {"master"} if dtype == torch.bfloat16 and not low_memory else set()
    assert {name.split("/")[0] for name in other.state()} == keys


@EACH
def test_only_matrices_decay_and_a_gradient_of_zero_moves_nothing_else(dtype, low_memory):
    model = small_model(dtype)
    before = copy.deepcopy(model.state_dict())
    optimizer = Optimizer(model, low_memory=low_memory, weight_decay=DECAY)
    sum(0 * parameter.sum() for parameter in model.parameters()).backward()
    assert optimizer.step(0.5) == 0.0
    for name, parameter in model.named_parameters():
        share = 1 - 0.5 * DECAY if parameter.ndim == 2 else 1.0
        torch.testing.assert_close(parameter, (before[name].float() * share).to(dtype))


def test_low_memory_refuses_other_types():
    with pytest.raises(ValueError, match="--low-memory .* 0.weight is float32: add --dtype bfloat16"):
        Optimizer(small_model(torch.float32), low_memory=True)
