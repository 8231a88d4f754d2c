"""The Triton kernel of one step of the scan against its plain twin: on a GPU, or in Triton's interpreter without one.

The interpreter is chosen when Triton is imported, so test_kernels.py runs this file in a process of its own. The twin
is tested against the definition of the recurrence in test_granite.py.
"""

import pytest
import torch

from nanosafe.kernels import scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not scan.INTERPRETED:
    pytest.skip("without a GPU this needs TRITON_INTERPRET=1", allow_module_level=True)


def step_case(heads, groups, P, S, dtype=torch.float32, device=DEVICE):
    """Arguments of scan_step for three sequences in six slots; x, B and C are parts of one tensor, as in the mixer."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device)

    x, B, C = normal(3, heads * P + 2 * groups * S).to(dtype).split([heads * P, groups * S, groups * S], dim=-1)
    B, C = (t.unflatten(-1, (groups, S)) for t in (B, C))
    dt, A = torch.nn.functional.softplus(normal(3, heads)), -normal(heads).exp()
    return [x.unflatten(-1, (heads, P)), dt, A, B, C, normal(6, heads, P, S), torch.tensor([4, 0, 3], device=device)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, groups, P, S", [(4, 1, 8, 16), (6, 2, 5, 12), (3, 3, 64, 128), (2, 1, 1, 3)])
def test_a_step_is_that_of_the_plain_twin_and_touches_no_other_slot(heads, groups, P, S, dtype):
    *arguments, states, slots = step_case(heads, groups, P, S, dtype)
    expected = states.clone()
    truth = scan.plain_scan_step(*arguments, expected, slots)
    y = scan.triton_scan_step(*arguments, states, slots)
    torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-6)
    assert y.dtype == torch.float32


def test_rows_that_share_the_scratch_slot_do_no_harm():
    *arguments, states, _ = step_case(4, 1, 8, 16)
    expected = states.clone()
    truth = scan.plain_scan_step(*arguments, expected, torch.tensor([1, 2, 5], device=DEVICE))
    y = scan.triton_scan_step(*arguments, states, torch.tensor([1, 5, 5], device=DEVICE))
    torch.testing.assert_close(y[0], truth[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states[1], expected[1], rtol=1e-5, atol=1e-6)
