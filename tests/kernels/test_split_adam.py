"""The low-memory AdamW against torch.optim.AdamW in float32: bit by bit where it is exact, elsewhere within what the
steps of its 8-bit codes allow."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from nanosafe.kernels import split_adam
from nanosafe.kernels.split_adam import BLOCK, OCTAVE, decode, encode, join, ratio_bound, split
from nanosafe.train.low_memory import SplitAdamW
from nanosafe.train.optim import Optimizer

BETAS = (0.9, 0.95)
BOUND = ratio_bound(*BETAS)
ROOT_STEP = 2 ** (1 / OCTAVE) - 1  # relative, between neighbouring codes of sqrt(v)
RATIO_STEP = BOUND / 127  # absolute, between neighbouring codes of m / sqrt(v)


def bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def split_adam_of(parameter: Tensor, lr: float = 1.0, eps: float = 1e-8, weight_decay: float = 0.0) -> SplitAdamW:
    parameter.grad_dtype = None
    return SplitAdamW([{"params": [parameter], "weight_decay": weight_decay}], lr=lr, betas=BETAS, eps=eps)


def master_of(parameter: Tensor, adam: SplitAdamW) -> Tensor:
    return join(parameter.detach(), adam.state[parameter]["remainder"])


class Race:
    """A row of zero weights updated by the same gradients, by SplitAdamW and by torch.optim.AdamW in float32."""

    def __init__(self, size: int):
        self.parameter, self.twin = nn.Parameter(torch.zeros(1, size).bfloat16()), nn.Parameter(torch.zeros(1, size))
        self.adam = split_adam_of(self.parameter, eps=1e-30)
        self.exact = torch.optim.AdamW([self.twin], lr=1.0, betas=BETAS, eps=1e-30, weight_decay=0.0)
        self.weights = torch.zeros(2, size)

    def step(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The updates by a gradient [size]: ours and the exact one."""
        self.parameter.grad = self.twin.grad = gradient[None]
        self.adam.step(), self.exact.step()
        before, self.weights = self.weights, torch.cat([master_of(self.parameter, self.adam), self.twin.detach()])
        return tuple(self.weights - before)


class NoNaN(TorchDispatchMode):
    """No operation inside yields a NaN: as an integer code it would look like any other."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and "empty" not in func.__name__:
            assert not out.isnan().any(), func
        return out


def noise(step: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(step))


# Upper halves: zeros, denormals, the smallest normals, ones, a quarter of a million, the largest; then any.
HIGHS = [0, 1, 2, 0x7F, 0x80, 0x81, 0x3F7F, 0x3F80, 0x4880, 0x7F7E, 0x7F7F]
HIGHS += torch.randint(0x7F80, (40,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("sign", [0, -0x8000])
def test_split_is_nearest_and_join_its_inverse_for_every_lower_half(sign):
    low = torch.arange(2**16, dtype=torch.int32)
    for high in HIGHS:
        master = ((high + sign << 16) + low).view(torch.float32)
        weight, remainder = split(master)
        assert weight.dtype == torch.bfloat16 and remainder.dtype == torch.int16
        assert torch.equal(bits(join(weight, remainder)), bits(master))
        expected = bits(master.bfloat16())  # torch's own conversion: to nearest, ties to even
        expected[0x8000] = high + sign + 1  # the tie, as near to either side: away from zero
        assert torch.equal(bits(weight), expected)


def test_what_rounds_beyond_the_largest_bfloat16_is_infinite_and_comes_back():
    largest = torch.finfo(torch.float32).max
    master = torch.tensor([largest, -largest, math.inf, -math.inf])
    weight, remainder = split(master)
    assert torch.equal(weight, master.bfloat16()) and weight.isinf().all()
    assert torch.equal(bits(join(weight, remainder)), bits(master))


def test_ratio_bound_is_reached_and_not_passed():
    """Equality in Cauchy-Schwarz: gradients that grow by beta2 / beta1 a step."""
    m = v = 0.0
    for step in range(200):
        g = (BETAS[1] / BETAS[0]) ** step
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
        assert m / math.sqrt(v) < BOUND
    assert m / math.sqrt(v) == pytest.approx(BOUND, rel=1e-3)
    with pytest.raises(ValueError, match="beta1"):
        ratio_bound(0.9, 0.8)


@pytest.mark.parametrize("shape", [(1, 1), (1, 255), (2, 256), (3, 1000), (9, 7)])
def test_codes_are_within_one_step_of_the_moments(shape):
    r = torch.exp2(-19 * torch.rand(shape, generator=torch.Generator().manual_seed(1))) * 1e-5
    m = r * noise(2, *shape).clamp(-BOUND, BOUND) / (1 + ROOT_STEP)
    sums = torch.zeros(2, *shape)
    for step in range(100):
        ratio, root, scale = encode(m, r.square(), BOUND, step)
        assert scale.shape == (shape[0], math.ceil(shape[1] / BLOCK))
        m2, v2 = decode(ratio, root, scale, BOUND)
        r2 = v2.sqrt()
        assert ((r2 / r - 1).abs() <= ROOT_STEP * 1.001).all()
        assert ((m2 - m).abs() <= RATIO_STEP * 1.001 * r2).all()
        sums += torch.stack([r2 / r - 1, (m2 - m) / r])
    assert (sums[0] / 100).abs().max() < 0.03 * ROOT_STEP  # one rounding errs, the mean over the steps hardly
    assert (sums[1] / 100).abs().max() < 0.05 * RATIO_STEP


def test_the_outermost_codes_do_not_wrap_round():
    """At steps whose threshold is nearest to 1: Fibonacci numbers for the golden ratio, Pell numbers for sqrt(2)."""
    r = torch.ones(1, 1)
    for step in (28657, 46368, 75025, 121393, 196418, 317811, 33461, 80782, 195025, 470832):
        for m in (r * BOUND, -r * BOUND, 1.1 * r * BOUND):
            m2, v2 = decode(*encode(m, r.square(), BOUND, step), BOUND)
            torch.testing.assert_close(v2.sqrt(), r)
            torch.testing.assert_close(m2, m.clamp(-r * BOUND, r * BOUND))


def test_master_is_bit_equal_to_a_float32_one_under_the_same_moments(monkeypatch):
    monkeypatch.setattr(split_adam, "CHUNK", 1500)  # chunks of two rows, of one, neither of whole blocks
    parameter = nn.Parameter((0.05 * noise(0, 3, 700)).bfloat16())
    twin = nn.Parameter(parameter.detach().float())
    adam = split_adam_of(parameter, lr=1e-4, eps=1e-8, weight_decay=0.1)
    exact = torch.optim.AdamW([twin], lr=1e-4, betas=BETAS, eps=1e-8, weight_decay=0.1, foreach=False)
    for step in range(1, 41):
        state = adam.state[parameter]
        m, v = decode(state["ratio"], state["root"], state["scale"], BOUND)
        exact.state[twin] = {"step": torch.tensor(step - 1.0), "exp_avg": m, "exp_avg_sq": v}
        parameter.grad = twin.grad = noise(step, 3, 700) * torch.logspace(-9, 0, 700)
        adam.param_groups[0]["lr"] = exact.param_groups[0]["lr"] = 1e-4 / step
        adam.step(), exact.step()
        assert torch.equal(bits(master_of(parameter, adam)), bits(twin.detach()))
        assert (parameter.float() - twin).abs().max() <= twin.abs().max() * 2**-8
    assert (state["remainder"] != 0).float().mean() > 0.9


def test_updates_err_by_what_the_codes_allow():
    """Rounding to the neighbour above or below with even thresholds has variance step^2 / 6 at the most; a moving
    average of rate beta keeps beta / sqrt(1 - beta^2) of independent errors."""
    size = 16 * BLOCK
    sizes = torch.logspace(-5, 0, BLOCK).repeat(16)  # five orders of magnitude in every block
    race, error, total, movement = Race(size), 0.0, 0.0, torch.zeros(2, size)
    for step in range(1, 101):
        ours, exact = race.step(sizes * (noise(step, size) + 0.3))
        if step > 20:
            error += (ours - exact).square().sum().item()
            total += exact.square().sum().item()
            movement += torch.stack([ours, exact])
    kept = [beta / math.sqrt(1 - beta**2) for beta in BETAS]
    of_ratio = RATIO_STEP / math.sqrt(6) * kept[0] / math.sqrt(total / (80 * size))
    of_root = ROOT_STEP / math.sqrt(6) * kept[1]
    assert 0 < math.sqrt(error / total) < math.hypot(of_ratio, of_root) < 0.08
    assert (movement[0] - movement[1]).norm() < 0.03 * movement[1].norm()  # the errors average out
    assert movement[0].norm() == pytest.approx(movement[1].norm().item(), rel=0.01)


def test_tiny_gradients_beside_a_huge_one_never_make_a_huge_step():
    race = Race(2 * BLOCK)
    sizes = torch.logspace(-12, -2, 2 * BLOCK)
    sizes[5] = sizes[BLOCK + 7] = 1e4
    lost = sizes < 2**-20 * 1e4 * 0.1  # below the range of the code, whatever the noise of the largest
    for step in range(1, 61):
        ours, exact = race.step(sizes * noise(step, 2 * BLOCK))
        limit = BOUND * math.sqrt(1 - BETAS[1] ** step) / (1 - BETAS[0] ** step)  # of exact AdamW
        assert (ours.abs() <= limit * (1 + 2 * ROOT_STEP)).all()
        assert (ours - exact)[~lost].abs().max() <= 1.0
    assert lost.sum() > BLOCK and ours[lost].abs().max() < limit and ours.isfinite().all()
    assert ((ours - exact)[[5, BLOCK + 7]].abs() < 0.1).all()


def test_weights_come_to_rest_when_their_gradients_stop():
    """Rows of an embedding whose tokens are not seen again, in blocks whose other entries go on."""
    race, stopped = Race(4 * BLOCK), torch.arange(4 * BLOCK) % 2 == 0
    for step in range(1, 251):
        gradient = noise(step, 4 * BLOCK)
        if step > 50:
            gradient[stopped] = 0
        ours, exact = race.step(gradient)
        if step == 50:
            start = race.weights.clone()
    assert (ours[stopped] == 0).all() and ours[~stopped].abs().min() > 0
    drift, expected = (race.weights - start)[:, stopped]
    assert (drift - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_zero_gradients_move_nothing_alone_or_beside_others():
    race = Race(3 * BLOCK)
    for _ in range(5):
        with NoNaN():
            ours, _ = race.step(torch.zeros(3 * BLOCK))
        assert (ours == 0).all() and not race.adam.state[race.parameter]["ratio"].any()
    gradient = noise(0, 3 * BLOCK)
    gradient[BLOCK : 2 * BLOCK] = 0  # a whole block
    gradient[7] = 0
    for _ in range(5):
        with NoNaN():
            ours, exact = race.step(gradient)
        assert ((ours == 0) == (gradient == 0)).all() and ours.isfinite().all()
        torch.testing.assert_close(ours, exact, rtol=0.2, atol=0)


def test_state_is_4_bytes_a_parameter_and_temporary_memory_that_of_a_chunk(monkeypatch):
    monkeypatch.setattr(split_adam, "CHUNK", 2**14)
    peaks = []
    for size in (2**14, 2**18):
        parameter = nn.Parameter(torch.zeros(size // 512, 512).bfloat16())
        adam = split_adam_of(parameter)
        tensors = [x for name, x in adam.state[parameter].items() if name != "step"]
        assert sum(x.numel() * x.element_size() for x in tensors) == size * (4 + 4 / BLOCK)
        parameter.grad = noise(0, size // 512, 512)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            adam.step()
        live, peak = 0, 0
        for event in record.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
        peaks.append(peak)
    assert 4 * 2**14 < peaks[1] <= 1.02 * peaks[0]
    assert peaks[0] <= 11 * 4 * 2**14  # as split_adam.CHUNK promises


def test_learns_a_noisy_quadratic_as_float32_moments_do():
    ends = []
    for low_memory in (False, True):
        model = nn.Linear(64, 32, bias=False).bfloat16()
        with torch.no_grad():
            model.weight.zero_()
        target = noise(-1, 32, 64) * torch.logspace(-1, 1, 64)
        optimizer = Optimizer(model, low_memory=low_memory)
        for step in range(300):
            x = noise(step, 16, 64) * torch.logspace(1, -2, 64)  # gradients of three orders of magnitude
            difference = model.weight.float() - target
            (x @ difference.T).square().mean().backward()
            optimizer.step(0.05 * (1 - step / 300))
        ends.append(((model.weight.float() - target) * torch.logspace(1, -2, 64)).square().mean().item())
    start = (target * torch.logspace(1, -2, 64)).square().mean().item()
    assert ends[0] < 0.1 * start
    assert ends[1] == pytest.approx(ends[0], rel=0.05)
