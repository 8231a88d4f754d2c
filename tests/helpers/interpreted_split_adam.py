"""The Triton kernel of the low-memory AdamW against its plain twin: on a GPU, or in Triton's interpreter without one.

The interpreter is chosen when Triton is imported, so test_kernels.py runs this file in a process of its own. The twin
is tested against torch.optim.AdamW in test_split_adam.py.
"""

import pytest
import torch

from nanosafe.kernels import split_adam
from nanosafe.kernels.split_adam import Step, join, new_state, plain_update, triton_update

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not split_adam.INTERPRETED:
    pytest.skip("without a GPU this needs TRITON_INTERPRET=1", allow_module_level=True)


def gradient(step: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Of ten orders of magnitude in every block; a seventh of it is zero."""
    generator = torch.Generator().manual_seed(step)
    noise = torch.randn(shape, generator=generator)
    noise *= 10 ** (-10 * torch.rand(shape, generator=generator))
    return noise.masked_fill_(torch.rand(shape, generator=generator) < 1 / 7, 0).to(DEVICE)


@pytest.mark.parametrize("shape", [(1,), (7,), (1, 255), (2, 256), (3, 700), (2, 1024 + 1), (2, 3, 50)])
def test_an_update_is_that_of_the_plain_twin(shape):
    """The kernel's exp2 and log2 may differ in their last bits, which decide at a threshold alone."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    state, apart, codes = new_state(weight), 0, 0
    for number in range(1, 13):
        step = Step.of(number, lr=1e-3 / number, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        other, others = weight.clone(), {name: x.clone() for name, x in state.items()}
        g = gradient(number, shape)
        plain_update(weight, g, state, step)
        triton_update(other, g, others, step)
        masters = join(weight, state["remainder"]), join(other, others["remainder"])
        torch.testing.assert_close(*masters, rtol=3e-7, atol=1e-10)
        torch.testing.assert_close(others["scale"], state["scale"], rtol=1e-6, atol=0)
        for name in ("ratio", "root"):
            difference = (others[name].int() - state[name].int()).abs()
            assert difference.max() <= 1
            apart, codes = apart + int(difference.sum()), codes + difference.numel()
    assert state["ratio"].any() and state["root"].any()
    assert apart <= 1e-3 * codes + 1


@pytest.mark.parametrize("shape", [(1, 300), (3, 100), (300,)])
def test_blocks_beyond_the_end_are_left_alone(shape):
    """A program has several blocks: those past the parameter's end must not write."""
    memory = torch.full((2048,), 7, dtype=torch.int16, device=DEVICE)
    weight, rest = memory[:300].view(torch.bfloat16).view(shape), memory[300:]
    step = Step.of(1, lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    triton_update(weight, torch.ones(shape, device=DEVICE), new_state(weight), step)
    assert (rest == 7).all() and (weight < -0.9).all()
