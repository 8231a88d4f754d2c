"""The Triton kernels of the head against log-softmax in float64: on a GPU, or in Triton's interpreter without one.

The interpreter is chosen when Triton is imported, so test_kernels.py runs this file in a process of its own. Products
of half precision with float32 results need a GPU.
"""

import pytest
import torch
from test_logprob import V, by_definition, inputs, plain, upstream, with_gradients

from nanosafe.kernels import logprob as head
from nanosafe.kernels.logprob_triton import BLOCK

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not head.INTERPRETED:
    pytest.skip("without a GPU this needs TRITON_INTERPRET=1", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")  # inf - inf
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@pytest.fixture(autouse=True)
def without_the_twin(monkeypatch):
    """The public function must take the kernels' path."""
    monkeypatch.delattr(head, "plain_row_statistics")
    monkeypatch.delattr(head, "plain_row_gradients")


def check(hidden, weight, targets, up, tolerance=1e-5, **options):
    truth = with_gradients(plain, hidden, weight, targets, up, temperature=options.get("temperature", 1.0))
    case = [x.to(DEVICE) for x in (hidden, weight, targets)], [x if x is None else x.to(DEVICE) for x in up]
    ours = with_gradients(head.token_logprob_entropy, *case[0], case[1], dtype=torch.float32, **options)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("kinds", ["logprob", "entropy", "logprob and entropy"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("columns", [1, 40, 1000])
def test_values_and_gradients(kinds, temperature, columns):
    check(*inputs(11), upstream(11, kinds), temperature=temperature, columns=columns)


@pytest.mark.parametrize("vocab", [1, BLOCK, BLOCK + 1, 2 * BLOCK + 37])
def test_one_block_full_and_several(vocab):
    check(*inputs(3, vocab=vocab, scale=0.5), upstream(3, "logprob and entropy"))


@pytest.mark.parametrize("N", [0, 1])
def test_no_row_and_one_row(N):
    check(*inputs(N), upstream(N, "logprob and entropy"))


def rows_and_truth(logits, targets, dtype=torch.float32):
    """[log-probs, entropies, d logits] of the kernels over two tiles, and of the definitions in float64."""
    up = upstream(len(logits), "logprob and entropy")
    exact = logits.double().requires_grad_()
    truth = by_definition(exact, targets)
    sum((out * u).sum() for out, u in zip(truth, up, strict=True)).backward()
    logits, targets, *up = (x.clone().to(DEVICE) for x in (logits, targets, *up))
    N = len(logits)
    statistics = torch.zeros(4, N, device=DEVICE)
    statistics[0], statistics[3] = torch.finfo(torch.float32).min, torch.nan
    border = 5 * logits.shape[1] // 8 + 1
    tiles = [(0, logits[:, :border].contiguous()), (border, logits[:, border:].contiguous())]
    for first, tile in tiles:
        head.triton_row_statistics(tile, targets - first, 1.0, statistics)
    peak, total, weighted, picked = statistics
    entropies = total.log() - weighted / total
    numbers, grads = torch.stack([peak, total.log(), entropies, *up]), []
    for first, tile in tiles:
        grads.append(tile.view(dtype)[:, : tile.shape[1]])
        head.triton_row_gradients(tile, grads[-1], targets - first, 1.0, numbers)
    ours = picked - peak - total.log(), entropies, torch.cat(grads, dim=1)
    return [x.cpu().double() for x in ours], [*(x.detach() for x in truth), exact.grad]


def check_rows(logits, targets):
    for a, b in zip(*rows_and_truth(logits, targets), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_a_large_offset_common_to_all_logits_costs_no_precision(offset):
    logits = torch.randn(4, V, generator=torch.Generator().manual_seed(0)) * 3 + offset
    check_rows(logits, torch.tensor([0, 3, V - 1, 50]))


def test_peaked_uniform_rising_and_falling_rows():
    """Over three blocks in two tiles: the largest logit so far grows with every block, or never again."""
    logits = torch.zeros(4, 2 * BLOCK)
    logits[0, 0], logits[1, -1] = 1200.0, 1200.0
    logits[2] = torch.linspace(-50, 50, 2 * BLOCK)
    check_rows(torch.cat([logits, logits[2:3].flip(1)]), torch.tensor([1, 1, 2 * BLOCK - 1, 0, 7]))


@pytest.mark.parametrize("masked", [slice(0, BLOCK), slice(2000, None), slice(5, 9)])
def test_logits_of_minus_infinity_have_no_share(masked):
    """A whole first tile, a whole later one, a few: as if the vocabulary were without them."""
    logits = torch.randn(2, BLOCK + 100, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(logits.shape[1])
    kept = torch.ones_like(ids, dtype=torch.bool)
    kept[masked] = False
    (*ours, grads), _ = rows_and_truth(logits.masked_fill(~kept, -torch.inf), ids[kept][[3, 9]])
    _, truth = rows_and_truth(logits[:, kept], torch.tensor([3, 9]))
    for a, b in zip((*ours, grads[:, kept]), truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not grads[:, ~kept].any()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_logit_that_is_not_finite_shows(wrong):
    logits = torch.zeros(1, BLOCK + 5)
    logits[0, 7] = wrong
    assert all(x.isnan() for x in rows_and_truth(logits, torch.tensor([3]))[0][:2])


@pytest.mark.parametrize("target", [-100, V])
def test_a_target_outside_the_vocabulary_gives_nan(target):
    hidden, weight, _ = (x.to(DEVICE) for x in inputs(1))
    assert head.token_logprob_entropy(hidden, weight, torch.tensor([target], device=DEVICE))[0].isnan()


def test_gradients_of_half_the_width_overwrite_their_own_logits():
    """Three blocks of float16: each lands on logits that have been read, and stays within its row."""
    logits = torch.randn(2, 2 * BLOCK + 11, generator=torch.Generator().manual_seed(0))
    (*_, grads), (*_, truth) = rows_and_truth(logits, torch.tensor([5, 2 * BLOCK + 10]), torch.float16)
    torch.testing.assert_close(grads, truth, rtol=2**-10, atol=2**-24)


def test_arguments_that_are_not_contiguous():
    hidden, weight, targets = inputs(6)
    wide = torch.stack([targets, targets.flip(0)], dim=1)[:, 0]
    assert not wide.is_contiguous()
    check(hidden.T.contiguous().T, weight.T.contiguous().T, wide, upstream(6, "logprob and entropy"))
    hidden, weight, targets = (x.to(DEVICE) for x in (hidden, weight, targets))
    hidden.requires_grad_()
    head.token_logprob_entropy(hidden, weight, targets)[1].sum().backward()  # whose gradient is one number, expanded
    *_, truth, _ = with_gradients(plain, *inputs(6), [None, torch.ones(6)])
    torch.testing.assert_close(hidden.grad.cpu().double(), truth, rtol=1e-4, atol=1e-5)


@on_gpu
@pytest.mark.parametrize("dtype, unit", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("N, vocab", [(300, 1001), (300, 40_000), (0, 1001)])
def test_half_precision_is_no_further_from_the_truth_than_all_logits_at_once(dtype, unit, N, vocab):
    hidden, weight, targets = inputs(N, vocab=vocab, scale=0.5)
    case = [x.to(DEVICE) for x in (hidden.to(dtype), weight.to(dtype), targets)]
    up = [x.to(DEVICE) for x in upstream(N, "logprob and entropy")]
    truth = with_gradients(plain, *case, up)
    eager = with_gradients(plain, *case, up, dtype=dtype)
    ours = with_gradients(head.token_logprob_entropy, *case, up, dtype=dtype, columns=997)
    for a, b, t, tolerance in zip(ours, eager, truth, (1e-5, 1e-5, unit, unit), strict=True):
        assert ((a - t).abs() <= (b - t).abs() + tolerance * (1 + t.abs())).all()


@on_gpu
def test_a_tile_of_more_than_2_31_logits():
    N, vocab = 2**14, 140_000
    hidden, weight, targets = inputs(N, vocab=vocab, scale=0.3)
    up = upstream(N, "logprob and entropy")
    last = slice(N - 4, N)
    truth = with_gradients(plain, hidden[last], weight, targets[last], [x[last] for x in up])
    case = [x.to(DEVICE) for x in (hidden, weight, targets)], [x.to(DEVICE) for x in up]
    options = dict(dtype=torch.float32, columns=vocab)  # 9.2 GB
    *ours, _ = with_gradients(head.token_logprob_entropy, *case[0], case[1], **options)
    for a, b in zip(ours, truth, strict=False):
        torch.testing.assert_close(a[last].cpu(), b, rtol=1e-4, atol=1e-5)


@on_gpu
def test_peak_memory_is_a_tile_of_logits_and_the_gradients():
    N, D, vocab, columns = 4096, 256, 50_000, 4096
    hidden = torch.randn(N, D, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, D, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(vocab, (N,), device=DEVICE)
    for _ in range(2):  # the first also allocates what cuBLAS works in
        hidden.grad = weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logprobs, entropies = head.token_logprob_entropy(hidden, weight, targets, columns=columns)
        (logprobs.sum() + entropies.sum()).backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= 4 * N * columns + (4 + 2) * N * D + 2 * vocab * D + (2 << 20)
