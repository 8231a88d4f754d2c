"""The head's log-probs, entropies and gradients against plain log-softmax in float64, and its memory.

This is the plain twin; interpreted_logprob.py has the Triton kernels.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nanosafe.kernels.logprob import BLOCK_BYTES, tile_columns, token_logprob_entropy

D, V = 12, 101  # no multiple of anything


def inputs(N: int, scale: float = 1.0, vocab: int = V, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator)
    weight = torch.randn(vocab, D, generator=generator) * scale
    return hidden, weight, torch.randint(vocab, (N,), generator=generator)


def by_definition(logits, targets):
    """log p(target) and -sum p log p."""
    logp = logits.log_softmax(-1)
    return logp[torch.arange(len(targets)), targets], -(logp.exp() * logp).sum(-1)


def plain(hidden, weight, targets, temperature=1.0):
    """All logits at once."""
    logits = F.linear(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32)) / temperature
    return by_definition(logits, targets)


def with_gradients(function, hidden, weight, targets, upstream, dtype=torch.float64, **options):
    """[log-probs, entropies, d hidden, d weight] in float64 of `function` run in `dtype`; upstream: two [N] or None."""
    hidden, weight = (x.to(dtype).requires_grad_() for x in (hidden.detach(), weight.detach()))
    outputs = function(hidden, weight, targets, **options)
    sum((out * up).sum() for out, up in zip(outputs, upstream, strict=True) if up is not None).backward()
    return [x.detach().double() for x in (*outputs, hidden.grad, weight.grad)]


def upstream(N: int, kinds: str):
    generator = torch.Generator().manual_seed(7)
    both = {kind: torch.randn(N, generator=generator) for kind in ("logprob", "entropy")}
    return [both[kind] if kind in kinds else None for kind in both]


@pytest.mark.parametrize("kinds", ["logprob", "entropy", "logprob and entropy"])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 6.0])
@pytest.mark.parametrize("columns", [1, 4, 50, 1000])
def test_values_and_gradients_equal_plain_log_softmax(kinds, temperature, columns):
    case = (*inputs(11), upstream(11, kinds))
    truth = with_gradients(plain, *case, temperature=temperature)
    options = dict(temperature=temperature, columns=columns)
    for a, b in zip(with_gradients(token_logprob_entropy, *case, **options), truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_analytic_gradient_agrees_with_finite_differences():
    hidden, weight, targets = inputs(5, vocab=7)
    arguments = [x.double().requires_grad_() for x in (hidden, weight)]

    def function(h, w):
        return token_logprob_entropy(h, w, targets, 0.7, columns=3)

    assert function(*arguments)[0].dtype == torch.float64
    assert torch.autograd.gradcheck(function, arguments, eps=1e-6, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("offset", [-1e4, -1e3, 1e4])
def test_a_large_offset_common_to_all_logits_costs_no_precision(offset):
    hidden, weight, targets = inputs(9)
    logits = F.linear(hidden, weight) + offset  # rounded to steps of 1e-3: the truth is that of these logits
    case = (logits, torch.eye(V), targets, upstream(9, "logprob and entropy"))
    *ours, _ = with_gradients(token_logprob_entropy, *case, dtype=torch.float32)
    *truth, _ = with_gradients(plain, *case)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_peaked_and_uniform_rows():
    weight = torch.cat([torch.full((1, D), 100.0), torch.zeros(V - 1, D)])
    hidden = torch.stack([torch.ones(D), torch.zeros(D)]).requires_grad_()  # logits 1200, 0, 0, ...; all 0
    logprobs, entropies = token_logprob_entropy(hidden, weight, torch.tensor([1, 1]))
    (logprobs.sum() + entropies.sum()).backward()
    assert logprobs.tolist() == [-1200.0, pytest.approx(-torch.log(torch.tensor(float(V))).item())]
    assert entropies.tolist() == [0.0, pytest.approx(torch.log(torch.tensor(float(V))).item())]
    torch.testing.assert_close(hidden.grad[0], torch.full((D,), -100.0))  # all of p lies on token 0, not on the target


def test_a_tile_of_several_blocks_of_rows():
    N = 2 * BLOCK_BYTES // (4 * 3001) + 1
    case = (*inputs(N, vocab=3001), upstream(N, "logprob and entropy"))
    for a, b in zip(with_gradients(token_logprob_entropy, *case), with_gradients(plain, *case), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("N", [0, 1])
def test_no_row_and_one_row(N):
    case = (*inputs(N), upstream(N, "logprob and entropy"))
    for a, b in zip(with_gradients(token_logprob_entropy, *case), with_gradients(plain, *case), strict=True):
        torch.testing.assert_close(a, b)


def test_a_frozen_weight_or_frozen_hidden_states_get_no_gradient():
    hidden, weight, targets = inputs(6)
    truth = with_gradients(plain, hidden, weight, targets, upstream(6, "logprob"))
    for frozen in (0, 1):
        arguments = [hidden.double(), weight.double()]
        arguments[1 - frozen].requires_grad_()
        (token_logprob_entropy(*arguments, targets)[0] * upstream(6, "logprob")[0]).sum().backward()
        assert arguments[frozen].grad is None
        torch.testing.assert_close(arguments[1 - frozen].grad, truth[2 + 1 - frozen])
    assert not any(out.requires_grad for out in token_logprob_entropy(hidden, weight, targets))


def test_a_tied_weight_gets_both_gradients():
    _, weight, targets = inputs(8)
    tokens = targets.flip(0)
    ours, truth = (weight.double().requires_grad_() for _ in range(2))
    token_logprob_entropy(ours[tokens], ours, targets, columns=30)[0].sum().backward()
    plain(truth[tokens], truth, targets)[0].sum().backward()
    torch.testing.assert_close(ours.grad, truth.grad)


def test_hidden_states_that_are_not_contiguous():
    hidden, weight, targets = inputs(11)
    case = (weight, targets, upstream(11, "logprob and entropy"))
    wide = hidden.double().T.contiguous().T  # column-major, as a selection from a transposed tensor may be
    assert not wide.is_contiguous()
    ours = with_gradients(token_logprob_entropy, wide, *case, columns=40)
    for a, b in zip(ours, with_gradients(plain, hidden, *case), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype, of_hidden, of_weight", [
    (torch.bfloat16, 2**-6, 2**-8), (torch.float32, 2**-20, 2**-18)])  # fmt: skip
def test_tiles_are_no_further_from_the_truth_than_all_logits_at_once(dtype, of_hidden, of_weight):
    """Adding up the hidden states' gradient in bfloat16 would be: each tile rounds the sum of those before it again."""
    N = 1024
    hidden, weight, targets = inputs(N, scale=0.5)
    case = (hidden.to(dtype), weight.to(dtype), targets, upstream(N, "logprob and entropy"))
    truth = with_gradients(plain, *case)
    eager = with_gradients(plain, *case, dtype=dtype)
    ours = with_gradients(token_logprob_entropy, *case, dtype=dtype, columns=16)
    # The addends of the hidden states' gradient, 7 of them, are of half precision where torch has no wider products;
    # the weight's is one product over all tokens.
    for a, b, t, tolerance in zip(ours, eager, truth, (1e-5, 1e-5, of_hidden, of_weight), strict=True):
        assert ((a - t).abs() <= (b - t).abs() + tolerance * (1 + t.abs())).all()
        assert (a - t).norm() <= 1.2 * (b - t).norm()
        assert (a - t).abs().max() <= 1.5 * (b - t).abs().max()


def test_a_logit_that_overflows_shows_as_a_loss_that_is_not_finite():
    """So that the training loop can see it and skip the step; a token of probability 0 is not an error by itself."""
    hidden = torch.full((1, D), 3e38, requires_grad=True)
    weight = torch.cat([torch.ones(1, D), torch.zeros(V - 1, D)])
    assert not token_logprob_entropy(hidden, weight, torch.tensor([1]))[0].isfinite()
    for target, finite in ((0, False), (1, True)):  # logits -inf, 0, 0, ...
        logprobs, entropies = token_logprob_entropy(hidden, -weight, torch.tensor([target]))
        assert logprobs.isfinite().item() is finite
        torch.testing.assert_close(entropies, torch.tensor([float(V - 1)]).log())
    (logprobs.sum() + entropies.sum()).backward()
    assert hidden.grad.isfinite().all()


def test_tiles_fit_their_budget_but_are_never_narrow():
    half, single = torch.bfloat16, torch.float32
    assert tile_columns(16_384, half, is_cuda=True) == tile_columns(16_384, single, is_cuda=True) == 8192
    assert tile_columns(1024, single, is_cuda=False) == 4096 and tile_columns(1024, half, is_cuda=False) == 8192
    assert tile_columns(10**6, half, is_cuda=True) == 1024 and tile_columns(0, half, is_cuda=False) > 10**6


@pytest.mark.parametrize("target", [-100, V])
def test_a_target_outside_the_vocabulary_is_an_error(target):
    hidden, weight, _ = inputs(1)
    with pytest.raises(RuntimeError, match="out of bounds"):
        token_logprob_entropy(hidden, weight, torch.tensor([target]))
    with pytest.raises(ValueError, match=r"targets \[2\] are not one per row of hidden states \[1, 12\]"):
        token_logprob_entropy(hidden, weight, torch.tensor([0, 0]))


def report_peak(name: str, dtype: str, N: int, D: int, V: int, **options) -> None:
    """Print the bytes by which memory grows, at the most, in forward and backward."""
    hidden = torch.randn(N, D).to(getattr(torch, dtype)).requires_grad_()
    weight = torch.randn(V, D).to(hidden.dtype).requires_grad_()
    targets = torch.randint(V, (N,))

    def status(key: str) -> int:
        return 1024 * int(re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])

    def run(rows: int) -> None:
        logprobs, entropies = globals()[name](hidden[:rows], weight, targets[:rows], **options)
        (logprobs.sum() + entropies.sum()).backward()

    run(8)  # so that what libraries set up once is there
    hidden.grad = weight.grad = None
    before = status("VmRSS")
    run(N)
    print(status("VmHWM") - before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory where Linux has it")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_a_tile_of_logits_and_the_gradients(dtype):
    N, D, V, columns, slack = 2048, 192, 2**15, 2**13, 16 << 20

    def peak(name: str, options: str = "") -> int:
        """In a process of its own, whose maximum no other test has raised."""
        call = f"import test_logprob; test_logprob.report_peak({name!r}, {dtype!r}, {N}, {D}, {V}{options})"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run([sys.executable, "-c", call], env=environment, capture_output=True, text=True, check=True)
        return int(run.stdout)

    assert peak("plain") > 2 * 4 * N * V  # the measure sees what it should
    size = getattr(torch, dtype).itemsize
    tile, gradients = size * N * columns, size * (N + V) * D + 4 * N * D  # the hidden states', as it adds up
    assert peak("token_logprob_entropy", f", columns={columns}") <= tile + gradients + slack
