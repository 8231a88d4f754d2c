"""Joined storage of projections, and `decode_hidden` against transformers; against the decoder itself, and by its
kernels, it is compared in tests/helpers/interpreted_decode_step.py."""

import pytest
import torch
from parallel_cases import decoded, run_decoded
from tiny_models import decoder_like, random_checkpoint, random_reference, tiny_raw

from nanosafe.model import decode
from nanosafe.model.decode import join_projections, joined, products
from nanosafe.model.weights import save_tensors
from nanosafe.names import load_model
from nanosafe.train.optim import Optimizer


@pytest.mark.parametrize("rows", [3, 1])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "granite"])
@torch.no_grad()
def test_decoded_logprobs_are_those_of_transformers(family, rows, monkeypatch):
    monkeypatch.setattr(decode, "ROW_PRODUCTS", True)
    raw = tiny_raw(family)
    reference = random_reference(raw)
    model = decoder_like(reference, raw)
    join_projections(model)
    ids = torch.randint(3, 97, (rows, 11), generator=torch.Generator().manual_seed(0))
    expected = reference(ids).logits.log_softmax(-1)
    torch.testing.assert_close(decoded(model, ids), expected, rtol=0, atol=1e-4)


def test_gathered_weights_are_joined_as_those_of_one_process(tmp_path):
    """Of two processes that hold a half of each weight; sampling gathers a copy, whose projections are joined."""
    random_checkpoint(tmp_path, "qwen2")
    for processes in (1, 2):
        torch.multiprocessing.spawn(run_decoded, (processes, tmp_path), nprocs=processes)
    one, *two = (torch.load(tmp_path / f"decoded-{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for logprobs in two:
        assert torch.equal(logprobs, one)


def load_twice(folder, family, dtype=torch.float32):
    random_checkpoint(folder, family)
    plain, other = (load_model(folder, dtype=dtype) for _ in range(2))
    join_projections(other)
    return plain, other


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_one_product_is_the_separate_ones(family, tmp_path):
    plain, other = load_twice(tmp_path, family)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    for before, after in zip(plain.model.layers, other.model.layers, strict=True):
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            room = "self_attn" if "q_proj" in names else "mlp"
            separate = [getattr(getattr(before, room), name) for name in names]
            together = [getattr(getattr(after, room), name) for name in names]
            assert joined([layer.weight for layer in separate]) is None
            whole = joined([layer.weight for layer in together])
            assert torch.equal(whole, torch.cat([layer.weight for layer in separate]))
            found = products(x, *together)
            assert found[0].untyped_storage().data_ptr() == found[1].untyped_storage().data_ptr()
            for layer, result in zip(separate, found, strict=True):
                torch.testing.assert_close(result, layer(x), rtol=1e-5, atol=1e-6)


def test_joining_twice_copies_nothing_and_keeps_parameters(tmp_path):
    _, model = load_twice(tmp_path, "qwen2")
    before = [(parameter, parameter.data_ptr()) for parameter in model.parameters()]
    join_projections(model)
    for (parameter, address), now in zip(before, model.parameters(), strict=True):
        assert parameter is now and address == now.data_ptr()


def test_neighbours_in_the_wrong_order_are_not_joined():
    a, b = torch.zeros(5, 3).split([2, 3])
    assert joined([b, a]) is None and joined([a, b]).shape == (5, 3)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_training_and_saving_know_nothing_of_it(family, low_memory, tmp_path):
    """After two steps of AdamW, in place, every parameter, the moments and the saved file are equal to the bit."""
    models = load_twice(tmp_path / "model", family, torch.bfloat16 if low_memory else torch.float32)
    states = []
    for number, model in enumerate(models):
        model.requires_grad_(True)
        optimizer = Optimizer(model, low_memory=low_memory)
        for tokens in ([3, 4, 5], [6, 7]):
            model(torch.tensor([tokens])).square().mean().backward()
            optimizer.step(0.01)
        states.append(optimizer.state())
        (tmp_path / str(number)).mkdir()
        save_tensors(dict(model.state_dict()), tmp_path / str(number), "model")
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(ours, theirs)
    assert states[0].keys() == states[1].keys() and len(states[0]) > 40
    for name, ours in states[0].items():
        assert torch.equal(ours, states[1][name]), name
    first, second = (sorted((tmp_path / name).iterdir()) for name in "01")
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second] and first
    mlp = models[1].model.layers[0].mlp
    assert joined([mlp.gate_proj.weight, mlp.up_proj.weight]) is not None
