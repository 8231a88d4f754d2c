"""The head's log-probs, entropies and gradients against plain log-softmax in float64, and its memory."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanosafe.kernels.head import token_logprob_entropy

D, V = 12, 101  # no multiple of anything


def inputs(N: int, scale: float = 1.0, vocab: int = V, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator)
    weight = torch.randn(vocab, D, generator=generator) * scale
    return hidden, weight, torch.randint(vocab, (N,), generator=generator)


def plain(hidden, weight, targets, temperature=1.0):
    """All logits at once, by the definitions: log p(target) and -sum p log p."""
    logp = (F.linear(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32)) / temperature).log_softmax(-1)
    return logp[torch.arange(len(targets)), targets], -(logp.exp() * logp).sum(-1)


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
@pytest.mark.parametrize("chunk_rows", [1, 4, 11, 1000])
def test_values_and_gradients_equal_plain_log_softmax(kinds, temperature, chunk_rows):
    case = (*inputs(11), upstream(11, kinds))
    truth = with_gradients(plain, *case, temperature=temperature)
    options = dict(temperature=temperature, chunk_bytes=4 * V * chunk_rows)
    for a, b in zip(with_gradients(token_logprob_entropy, *case, **options), truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_analytic_gradient_agrees_with_finite_differences():
    hidden, weight, targets = inputs(5, vocab=7)
    arguments = [x.double().requires_grad_() for x in (hidden, weight)]

    def function(h, w):
        return token_logprob_entropy(h, w, targets, 0.7, chunk_bytes=4 * 7 * 2)

    assert function(*arguments)[0].dtype == torch.float64
    assert torch.autograd.gradcheck(function, arguments, eps=1e-6, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("offset", [-1e4, -1e3, 1e4])
def test_a_large_offset_common_to_all_logits_costs_no_precision(offset):
    hidden, weight, targets = inputs(9)
    hidden = torch.cat([hidden, torch.full((9, 1), offset)], 1)
    weight = torch.cat([weight, torch.ones(V, 1)], 1)
    logits = F.linear(hidden, weight)  # rounded to steps of 1e-3 already: the truth is that of these logits
    truth = plain(logits.double(), torch.eye(V, dtype=torch.float64), targets)
    for a, b in zip(token_logprob_entropy(hidden, weight, targets), truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)


def test_peaked_and_uniform_rows():
    weight = torch.cat([torch.full((1, D), 100.0), torch.zeros(V - 1, D)])
    hidden = torch.stack([torch.ones(D), torch.zeros(D)]).requires_grad_()  # logits 1200, 0, 0, ...; all 0
    logprobs, entropies = token_logprob_entropy(hidden, weight, torch.tensor([1, 1]))
    (logprobs.sum() + entropies.sum()).backward()
    assert logprobs.tolist() == [-1200.0, pytest.approx(-torch.log(torch.tensor(float(V))).item())]
    assert entropies.tolist() == [0.0, pytest.approx(torch.log(torch.tensor(float(V))).item())]
    torch.testing.assert_close(hidden.grad[0], torch.full((D,), -100.0))  # all of p lies on token 0, not on the target


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
    token_logprob_entropy(ours[tokens], ours, targets, chunk_bytes=4 * V * 3)[0].sum().backward()
    plain(truth[tokens], truth, targets)[0].sum().backward()
    torch.testing.assert_close(ours.grad, truth.grad)


def test_hidden_states_that_are_not_contiguous():
    hidden, weight, targets = inputs(11)
    case = (weight, targets, upstream(11, "logprob and entropy"))
    wide = hidden.double().T.contiguous().T  # column-major, as a selection from a transposed tensor may be
    assert not wide.is_contiguous()
    ours = with_gradients(token_logprob_entropy, wide, *case, chunk_bytes=4 * V * 4)
    for a, b in zip(ours, with_gradients(plain, hidden, *case), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_chunks_are_no_further_from_the_truth_than_all_logits_at_once(dtype):
    """Adding up the weight's gradient in bfloat16 would be: each chunk rounds the sum of those before it once more."""
    N = 1024
    hidden, weight, targets = inputs(N, scale=0.5)
    case = (hidden.to(dtype), weight.to(dtype), targets, upstream(N, "logprob and entropy"))
    truth = with_gradients(plain, *case)
    eager = with_gradients(plain, *case, dtype=dtype)
    ours = with_gradients(token_logprob_entropy, *case, dtype=dtype, chunk_bytes=4 * V * 16)
    for a, b, t in zip(ours, eager, truth, strict=True):
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


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of every tensor storage made inside the block while it lives."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.live += (size := storage.nbytes())
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.free, size)
        return result

    def free(self, size: int) -> None:
        self.live -= size


def peak_bytes(function, *arguments, **options) -> int:
    with PeakBytes() as count:
        logprobs, entropies = function(*arguments, **options)
        (logprobs.sum() + entropies.sum()).backward()
    return count.peak


def test_peak_memory_is_a_few_chunks_and_the_gradients():
    N, vocab, rows = 512, 5000, 16
    hidden, weight, targets = inputs(N, vocab=vocab)
    hidden.requires_grad_(), weight.requires_grad_()
    chunk, logits, gradients = 4 * rows * vocab, 4 * N * vocab, 2 * 4 * D * vocab  # a sum and a chunk's addend
    assert peak_bytes(plain, hidden, weight, targets) > 2 * logits  # the measure sees what it should
    peak = peak_bytes(token_logprob_entropy, hidden, weight, targets, chunk_bytes=chunk)
    assert chunk < peak < 5 * chunk + gradients + 2 * 4 * D * N < logits / 4
