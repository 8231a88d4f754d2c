"""Joined storage of projections. `decode_hidden` itself is compared in tests/helpers/interpreted_decode_step.py."""

import pytest
import torch
from tiny_models import random_checkpoint

from nanosafe.model.decode import join_projections, joined, products
from nanosafe.model.weights import save_tensors
from nanosafe.names import load_model


def load_twice(folder, family):
    random_checkpoint(folder, family)
    plain, other = (load_model(folder, dtype=torch.float32) for _ in range(2))
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


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_training_and_saving_know_nothing_of_it(family, tmp_path):
    """After a step of AdamW, in place, every parameter and the saved file are equal to the bit."""
    models = load_twice(tmp_path / "model", family)
    for number, model in enumerate(models):
        model.requires_grad_(True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        model(torch.tensor([[3, 4, 5]])).square().mean().backward()
        optimizer.step()
        (tmp_path / str(number)).mkdir()
        save_tensors(dict(model.state_dict()), tmp_path / str(number), "model")
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(ours, theirs)
    first, second = (sorted((tmp_path / name).iterdir()) for name in "01")
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second] and first
