"""The Triton kernel that draws against its plain twin: on a GPU, or in Triton's interpreter without one.

The interpreter is chosen when Triton is imported, so test_kernels.py runs this file in a process of its own. What the
plain twin does is tested in test_sample.py.
"""

import pytest
import torch
from test_randomness import seed_for
from test_sample import rows_of_every_kind, settings

from nanosafe.kernels import INTERPRETED, sample, sample_triton
from nanosafe.kernels.noise import W, gumbel_noise
from nanosafe.kernels.sample import SamplingTensors, cpu_draw, filter_scores
from nanosafe.kernels.sample_triton import triton_draw
from nanosafe.randomness import derive_seed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not INTERPRETED:
    pytest.skip("without a GPU this needs TRITON_INTERPRET=1", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy has log(0) and inf - inf
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@pytest.fixture(params=["whole rows", "parts"])
def forms(request, monkeypatch):
    """Both forms of the kernels; small parts, so that a row has several."""
    monkeypatch.setattr(sample_triton, "PART", 2 * W)
    monkeypatch.setattr(sample_triton, "FEW_ROWS", 64 if request.param == "parts" else 0)


def on_device(params: SamplingTensors) -> SamplingTensors:
    return SamplingTensors(*(column.to(DEVICE) for column in params))


def check(logits: torch.Tensor, params: SamplingTensors, begin: int = 0) -> torch.Tensor:
    """The kernel draws what the plain twin draws."""
    tokens, logprobs = (x.cpu() for x in triton_draw(logits.to(DEVICE), on_device(params), begin))
    expected, expected_logprobs = cpu_draw(logits, params, begin)
    assert tokens.dtype == torch.int64 and logprobs.dtype == torch.float32
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=2e-6, atol=4e-6)
    return tokens


@pytest.mark.usefixtures("forms")
@pytest.mark.parametrize("V", [1, W - 1, 2 * W, 601])
def test_draws_without_filters(V):
    logits = rows_of_every_kind(V)[::20]
    temperatures = [[1.0, 0.6, 0.0, 1.7][i % 4] for i in range(len(logits))]
    check(logits, settings(len(logits), temperatures, steps=list(range(len(logits)))))


@pytest.mark.usefixtures("forms")
@pytest.mark.parametrize("begin", [W, 9 * W, 1187 * W])
def test_draws_of_a_slice_of_a_vocabulary(begin):
    logits = rows_of_every_kind(601)[::20]
    tokens = check(logits, settings(len(logits), [[1.0, 0.6, 0.0][i % 3] for i in range(len(logits))]), begin)
    assert tokens.min() >= begin and tokens.max() < begin + 601


@pytest.mark.usefixtures("forms")
def test_noise_is_the_plain_twins():
    """Two tokens whose sums with the plain twin's noise are 4e-5 apart; the kernel must know which is larger."""
    words = [0, 1, 2**8, 2**16, 2**24, 2**32 - 2**8, 2**32 - 1]  # the smallest and largest, which no sample would meet
    seeds = [derive_seed(i) for i in range(10)]
    seeds += [seed_for(word, counter) for word in words for counter in (2**31 + 2, 2**31 + 2 * 3, 200)]
    columns = settings(len(seeds), seeds=seeds)
    noise = gumbel_noise(columns.seeds[:, None], columns.steps[:, None], torch.arange(600))
    fastest = noise[:, W : 2 * W].argmax(dim=1) + W
    for pair in ((200, 5), (fastest, 130), (fastest, 3 * W + 7), (noise[:, 3 * W :].argmax(dim=1) + 3 * W, 200)):
        rows, (a, b) = torch.arange(len(seeds)), (torch.as_tensor(x).expand(len(seeds)) for x in pair)
        for winner, loser in ((a, b), (b, a)):
            logits = torch.full((len(seeds), 600), -torch.inf)
            logits[rows, winner], logits[rows, loser] = 4e-5 - noise[rows, winner], -noise[rows, loser]
            assert torch.equal(check(logits, columns)[winner != loser], winner[winner != loser])


def telling_seeds(scores: torch.Tensor, kept: torch.Tensor) -> list[int]:
    """Two seeds: one draws the worst token that is kept; the other would draw the best one left out, were it kept.

    scores [V]; kept [V], -inf where filtered out. Of equal scores the lower id is better. One seed if all are kept.
    """
    seeds = torch.arange(3000) + derive_seed("telling")
    noise = gumbel_noise(seeds[:, None], torch.tensor(0), torch.arange(len(scores)))
    ranks = scores.sort(descending=True, stable=True).indices
    inside = kept[ranks].isfinite()
    count = int(inside.sum())
    assert inside[:count].all()
    telling = []
    for last in (count - 1, count)[: 1 if count == len(scores) else 2]:
        candidates = torch.full_like(scores, -torch.inf).index_copy(0, ranks[: last + 1], scores[ranks[: last + 1]])
        telling.append(int(seeds[(candidates + noise).argmax(dim=1) == ranks[last]][0]))
    return telling


def check_edge(scores: torch.Tensor, **filters) -> None:
    """A filter that keeps one token too few or too many shows in a draw."""
    kept = filter_scores(scores[None], settings(1, **filters))[0]
    seeds = telling_seeds(scores, kept)
    tokens = check(scores.expand(len(seeds), -1), settings(len(seeds), **filters, seeds=seeds))
    assert kept[tokens].isfinite().all() and kept[tokens[0]] == kept[kept.isfinite()].min()


FILTERS = [
    dict(top_k=1), dict(top_k=5), dict(top_k=1000), dict(top_p=0.7), dict(top_p=1e-9), dict(min_p=0.3),
    dict(top_k=60, top_p=0.9), dict(top_p=0.97, min_p=0.25), dict(top_k=20, top_p=0.6, min_p=0.5),
]  # fmt: skip


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])
def test_filters_have_the_plain_twins_edges(filters, ties):
    normal = 0.7 * torch.randn(200, generator=torch.Generator().manual_seed(0))
    check_edge((2 * normal).round() / 2 if ties else normal, **filters)


@pytest.mark.parametrize("filters", [dict(top_k=30), dict(top_k=170, top_p=0.95), dict(top_p=0.9901)], ids=str)
def test_rows_of_several_tiles(filters, monkeypatch):
    """The last of these leaves several tiles to search and cuts through ties in the last one."""
    monkeypatch.setattr(sample_triton, "TILE", W)
    check_edge(0.3 * torch.randn(300, generator=torch.Generator().manual_seed(1)).round().clamp(-1, 1), **filters)
    logits = rows_of_every_kind(600)[::20]
    check(logits, settings(len(logits), [float(i % 2) for i in range(len(logits))]))


def test_min_p_after_top_p_has_cut_through_ties():
    check(torch.tensor([[0.0, 0.0, 0.0, 2.0, 2.0]]), settings(1, top_p=0.9, min_p=1.0))


def test_signed_zeros_are_ties():
    zeros = torch.zeros(1, 6)
    zeros[0, ::2] = -0.0
    for sign in (zeros, -zeros, torch.full((1, 6), -0.0)):
        for filters in (dict(top_k=2), dict(top_p=0.6), dict(min_p=1.0)):
            seed = [derive_seed("zeros", 2)]
            check(sign, settings(1, **filters, seeds=seed))


@pytest.mark.usefixtures("forms")
def test_of_equal_sums_the_lower_id_is_drawn():
    """At 3e8 a float32 has no room for noise. The equals are in one part, or in two, or the first has none."""
    for ids in ([70, 200, 300], [300, 590], [520, 590, 600]):
        logits = torch.zeros(8, 601)
        logits[:, ids] = 3e8
        assert set(check(logits, settings(8)).tolist()) == {ids[0]}


@pytest.mark.usefixtures("forms")
def test_rows_with_filters_and_without_are_neighbours():
    logits = 3 * torch.randn(12, 601, generator=torch.Generator().manual_seed(0))
    check(logits, settings(12, [1.0, 0.7, 1.3, 0.0] * 3, [0, 0, 20, 9] * 3, [1.0, 0.9, 1.0, 0.5] * 3))
    check(logits, settings(12, 1.0, 0, 1.0, [0.0, 0.2] * 6))


@pytest.mark.usefixtures("forms")
@pytest.mark.parametrize("empty", [slice(0, 2 * W), slice(2 * W, 601), slice(0, 600)])
def test_a_part_in_which_nothing_can_be_drawn(empty):
    logits = torch.randn(4, 601, generator=torch.Generator().manual_seed(0))
    logits[:, empty] = -torch.inf
    check(logits, settings(4, [1.0, 0.6, 0.0, 1.7]))


@pytest.mark.usefixtures("forms")
@pytest.mark.parametrize("kind", [dict(), dict(temperature=0.0), dict(top_k=3, top_p=0.9, min_p=0.1)], ids=str)
def test_nan_logits_show_in_the_logprob_and_not_in_other_rows(kind):
    logits = torch.randn(3, 601, generator=torch.Generator().manual_seed(0))
    expected = cpu_draw(logits, settings(3, **kind))[0].tolist()
    logits[1, 300] = torch.nan
    tokens, logprobs = triton_draw(logits.to(DEVICE), on_device(settings(3, **kind)))
    assert tokens[::2].tolist() == expected[::2] and 0 <= tokens[1] < 601
    assert logprobs.isfinite().tolist() == [True, False, True]


@pytest.mark.usefixtures("forms")
def test_greedy_rows_ignore_filters_and_take_the_first_of_equals():
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(0)).round()
    tokens = check(logits, settings(2, 0.0, 3, 0.1, 0.9))
    assert tokens.tolist() == [int((row == row.max()).nonzero()[0]) for row in logits]


def test_rows_that_are_not_contiguous_and_no_rows():
    logits = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).T
    assert not logits.is_contiguous()
    check(logits, settings(3))
    check(logits[:0], settings(0, seeds=[]))


def test_the_public_function_takes_this_path(monkeypatch):
    logits, params = torch.zeros(1, 100), settings(1)
    expected = cpu_draw(logits, params)[0]
    monkeypatch.delattr(sample, "cpu_draw")
    assert torch.equal(sample.draw(logits.to(DEVICE), on_device(params))[0].cpu(), expected)


@on_gpu
@pytest.mark.parametrize("filters", [{}, *FILTERS, dict(top_k=20_000), dict(top_p=0.9999)], ids=str)
def test_a_large_vocabulary(filters):
    normal = torch.randn(64, 151_936, generator=torch.Generator().manual_seed(0))
    for logits in (normal, 3 * normal, 12 * normal, 3 * normal.bfloat16().float()):
        check(logits, settings(64, **filters))


@on_gpu
def test_more_than_2_31_logits():
    rows, V = 14_500, 151_936
    logits = torch.zeros(rows, V, device=DEVICE)
    logits[-2:] = torch.randn(2, V, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    columns = settings(rows, top_k=40)
    tokens = triton_draw(logits, on_device(columns))[0][-2:].cpu()
    assert torch.equal(tokens, cpu_draw(logits[-2:].cpu(), SamplingTensors(*(column[-2:] for column in columns)))[0])


@on_gpu
def test_a_captured_graph_sees_arguments_changed_in_place():
    generator = torch.Generator().manual_seed(0)
    logits, params = torch.randn(4, 5000, generator=generator).to(DEVICE), on_device(settings(4))
    triton_draw(logits, params)  # compiles; capturing must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, _ = triton_draw(logits, params)
    other_logits = torch.randn(4, 5000, generator=generator)
    other = settings(4, [0.0, 1.0, 0.5, 2.0], 9, 0.8, 0.01, steps=3)
    logits.copy_(other_logits)
    for old, new in zip(params, other, strict=True):
        old.copy_(new)
    graph.replay()
    assert torch.equal(tokens.cpu(), cpu_draw(other_logits, other)[0])
