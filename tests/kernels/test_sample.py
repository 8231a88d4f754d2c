"""draw against chance, its filters against transformers, its shortcuts against plain arithmetic over all tokens."""

import pytest
import torch
from test_randomness import python_noise
from transformers.generation import logits_process as warpers

from nanosafe.kernels import noise as noise_module
from nanosafe.kernels.noise import W, gumbel_noise
from nanosafe.kernels.sample import SamplingTensors, cpu_draw, draw, filter_scores, plain_draw
from nanosafe.randomness import derive_seed


def settings(rows: int, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seeds=None, steps=0) -> SamplingTensors:
    """How rows are drawn: each setting a number for all of them or a list."""

    def column(value, dtype):
        return torch.tensor(value if isinstance(value, list) else [value] * rows, dtype=dtype)

    return SamplingTensors(
        column(temperature, torch.float32), column(top_k, torch.int64), column(top_p, torch.float64),
        column(min_p, torch.float32), column(seeds or [derive_seed(i) for i in range(rows)], torch.int64),
        column(steps, torch.int64),
    )  # fmt: skip


def row_of(params: SamplingTensors, row: int) -> SamplingTensors:
    return SamplingTensors(*(column[row : row + 1] for column in params))


def columns(rows) -> list[list]:
    return [list(column) for column in zip(*rows, strict=True)]


def warped(scores: torch.Tensor, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> torch.Tensor:
    """What transformers' processors make of scores [B, V]: -inf where filtered out."""
    chain = [warpers.TemperatureLogitsWarper(float(temperature))]
    chain += [warpers.TopKLogitsWarper(top_k)] if top_k else []
    chain += [warpers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    chain += [warpers.MinPLogitsWarper(float(min_p))]
    return warpers.LogitsProcessorList(chain)(None, scores)


def filter_rows() -> torch.Tensor:
    normal = torch.randn(60, 200, generator=torch.Generator().manual_seed(0))
    return torch.cat([
        3 * normal,
        (2 * normal).round() / 2,  # many ties
        40 * normal,  # one token has nearly everything, many underflow to probability 0
        torch.zeros(20, 200),  # all tied
        (torch.arange(200.0) < 3).float().repeat(20, 1) * 20,  # three tied at the top
    ])  # fmt: skip


def test_filters_keep_what_transformers_keeps():
    choices = [(k, p, m) for k in (0, 1, 2, 7, 50, 500) for p in (1.0, 0.95, 0.5, 1e-9) for m in (0.0, 0.05, 0.5, 1.0)]
    # 96 choices and 220 rows have no common period: every kind of row meets every choice
    rows = filter_rows().repeat(4, 1)
    chosen = [choices[i * 7 % 96] for i in range(len(rows))]
    top_k, top_p, min_p = columns(chosen)
    kept = filter_scores(rows, settings(len(rows), 1.0, top_k, top_p, min_p))
    expected = torch.cat([warped(row[None], 1.0, *one) for row, one in zip(rows, chosen, strict=True)])
    # Equal values, equally many: of tokens tied at the edge of top-p, transformers' sort keeps any, ours the first.
    assert torch.equal(kept.sort(dim=1).values, expected.sort(dim=1).values)
    assert torch.equal(kept, torch.where(kept.isfinite(), rows, -torch.inf))
    untied = torch.tensor([len(row.unique()) == 200 for row in rows])
    assert untied.sum() == 480 and torch.equal(kept[untied], expected[untied])
    tiny = torch.tensor([p == 1e-9 for p in top_p])
    assert (kept[tiny].isfinite().sum(1) == 1).all() and torch.equal(kept[tiny].argmax(1), rows[tiny].argmax(1))


@pytest.mark.parametrize("begin", [W, 1187 * W])
def test_a_slice_of_a_vocabulary_has_the_noise_of_its_ids(begin):
    logits = filter_rows()[::3]
    params = settings(len(logits), [[1.0, 0.6, 0.0][i % 3] for i in range(len(logits))])
    tokens, logprobs = cpu_draw(logits, params, begin)
    temperature = torch.where(params.temperature > 0, params.temperature, 1.0)[:, None]
    noise = gumbel_noise(params.seeds[:, None], params.steps[:, None], begin + torch.arange(200))
    perturbed = torch.where(params.temperature[:, None] > 0, logits / temperature + noise, logits)
    assert torch.equal(tokens, begin + perturbed.argmax(dim=1))
    expected = (logits / temperature).log_softmax(dim=1).gather(1, tokens[:, None] - begin)[:, 0]
    torch.testing.assert_close(logprobs, expected)


def test_among_equals_top_p_keeps_the_lower_ids_and_top_k_and_min_p_keep_all():
    scores = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0]]).repeat(4, 1)  # probabilities 0.03, 0.24, 0.09
    expected = [[1, 3], [1, 3, 5, 2], [1, 2, 3, 4, 5, 6], [1, 3, 5]]
    kept = filter_scores(scores, settings(4, 1.0, [0, 0, 4, 0], [0.4, 0.75, 1.0, 1.0], [0.0, 0.0, 0.0, 0.5]))
    assert [row.isfinite().nonzero()[:, 0].tolist() for row in kept] == [sorted(ids) for ids in expected]


def test_a_filter_of_one_row_leaves_an_unfiltered_neighbour_alone():
    """In a large vocabulary the running sum of float32 probabilities reaches 1 before the last token."""
    scores = 4 * torch.randn(1, 150_000, generator=torch.Generator().manual_seed(0)).repeat(4, 1)
    kept = filter_scores(scores, settings(4, 1.0, [0, 10, 0, 0], [1.0, 1.0, 0.9, 1.0], [0.0, 0.0, 0.0, 0.1]))
    assert torch.equal(kept[0], scores[0]) and kept[1].isfinite().sum() == 10
    assert kept[2:].isfinite().sum(1).max() < 5000


def test_top_p_counts_tokens_too_unlikely_to_be_sorted():
    """Each of the 100,000 is below half of its even share of the spare 0.1; together they are 0.04 of it."""
    probs = torch.cat([torch.full((100_000,), 0.04 / 100_000), torch.tensor([0.03, 0.04, 0.05, 0.09, 0.25, 0.5])])
    kept = filter_scores(probs.log()[None], settings(1, top_p=0.9))[0]
    assert kept.isfinite().nonzero()[:, 0].tolist() == list(range(100_001, 100_006))  # 0.04 + 0.03 go


def chi_square_p(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """P(a chi-square statistic at least this large) for counts [V] of draws from probs [V]."""
    expected = probs.double() * counts.sum()
    statistic = ((counts - expected).square() / expected).sum()
    return float(torch.special.gammaincc((len(counts) - 1) / torch.tensor(2.0).double(), statistic / 2))


@pytest.mark.parametrize("varied", ["seed", "step"])
@pytest.mark.parametrize(
    "kind, V",
    [
        (dict(), 30), (dict(temperature=2.0), 30), (dict(top_k=5), 30), (dict(temperature=2.0, top_p=0.7), 30),
        (dict(temperature=0.5, min_p=0.05), 30), (dict(temperature=1.5), 2 * W), (dict(top_k=250, top_p=0.95), 300),
    ],
    ids=str,
)  # fmt: skip
def test_draws_follow_the_filtered_softmax(kind, V, varied):
    draws = 30_000
    logits = 1.5 * torch.randn(1, V, generator=torch.Generator().manual_seed(1))
    many = list(range(draws))
    seeds = [derive_seed(i) for i in many] if varied == "seed" else [derive_seed("one")] * draws
    arguments = settings(draws, **kind, seeds=seeds, steps=3 if varied == "seed" else many)
    tokens, logprobs = draw(logits.expand(draws, V), arguments)
    probs = warped(logits, **kind)[0].softmax(-1)
    counts = torch.bincount(tokens, minlength=V).double()
    kept = probs > 0
    assert (counts[~kept] == 0).all() and (counts[kept & (probs > 1e-3)] > 0).all()
    assert chi_square_p(counts[kept], probs[kept]) > 1e-3
    # neighbouring draws are independent: counts of pairs against the product
    pairs = torch.bincount(tokens[:-1] * V + tokens[1:], minlength=V * V).double()
    joint = torch.outer(probs, probs).flatten()
    common = joint > 5 / draws
    assert common.sum() >= 9
    assert chi_square_p(pairs[common], joint[common] / joint[common].sum()) > 1e-3
    # the log-probs are of the distribution before the filters
    expected = (logits[0] / kind.get("temperature", 1.0)).log_softmax(-1)[tokens]
    assert torch.allclose(logprobs, expected, atol=1e-5)


def test_a_seed_means_pinned_tokens():
    """With equal logits the token is the argmax of the documented noise, here from the pure-Python hash."""
    seeds, steps = [derive_seed(i) for i in range(5)], [0, 1, 2, 7, 2**20]
    tokens, logprobs = draw(torch.full((5, 300), 7.0), settings(5, 0.7, seeds=seeds, steps=steps))
    noise = [[python_noise(seed, step, v) for v in range(300)] for seed, step in zip(seeds, steps, strict=True)]
    assert tokens.tolist() == [row.index(max(row)) for row in noise] == [262, 92, 49, 245, 147]
    assert torch.allclose(logprobs, -torch.tensor(300.0).log())


def rows_of_every_kind(V: int) -> torch.Tensor:
    normal = torch.randn(40, V, generator=torch.Generator().manual_seed(V))
    few = normal.masked_fill(torch.rand(40, V, generator=torch.Generator().manual_seed(V + 1)) > 3 / V, -torch.inf)
    few[:, V // 2] = 0.0  # at least one is left
    peaked = normal.clone()
    peaked[:, V // 3] += 15
    return torch.cat([torch.zeros(40, V), normal, 2.5 * normal, 8 * normal, (2 * normal).round(), peaked, few,
                      normal - 1e4, 1e6 * normal])  # fmt: skip


@pytest.mark.parametrize("V", [1, 2, W - 1, W, W + 1, 5 * W, 3001])
def test_a_draw_is_the_argmax_of_score_and_noise_over_all_tokens(V):
    logits = rows_of_every_kind(V)
    arguments = settings(len(logits), steps=[i % 5 for i in range(len(logits))])
    noise = gumbel_noise(arguments.seeds[:, None], arguments.steps[:, None], torch.arange(V))
    assert torch.equal(draw(logits, arguments)[0], (logits + noise).argmax(dim=1))
    for row in range(0, len(logits), 40):  # alone and at another temperature
        alone = row_of(arguments, row)._replace(temperature=torch.tensor([0.7]))
        assert draw(logits[row : row + 1], alone)[0] == (logits[row] / 0.7 + noise[row]).argmax()


@pytest.mark.parametrize("V", [1, 2, W, 601])
def test_the_fast_form_draws_what_the_definition_draws(V):
    """Also among ties; but no top-p lies exactly on a sum of probabilities, which float32 may round past it."""
    logits = rows_of_every_kind(V)
    kinds = [(1.0, 0, 1.0, 0.0), (0.7, 0, 0.9123, 0.0), (1.3, 7, 1.0, 0.02), (0.0, 9, 0.5, 0.1), (0.6, 40, 0.7317, 0.0),
             (2.0, 0, 1.0, 0.3), (1.0, 3, 1e-9, 0.0)]  # fmt: skip
    for shift in range(len(kinds)):  # every row by every kind
        rows = [kinds[(i + shift) % len(kinds)] for i in range(len(logits))]
        arguments = settings(len(logits), *columns(rows), steps=[i % 5 for i in range(len(logits))])
        tokens, logprobs = cpu_draw(logits, arguments)
        expected, expected_logprobs = plain_draw(logits, arguments)
        assert torch.equal(tokens, expected) and torch.equal(logprobs, expected_logprobs)


def test_of_equal_sums_the_lower_id_is_drawn():
    """At 3e8 a float32 has no room for noise."""
    logits = torch.zeros(50, 3 * W)
    logits[:, [70, 200, 300]] = 3e8
    assert set(draw(logits, settings(50))[0].tolist()) == {70}


def test_few_tokens_are_hashed_one_by_one(monkeypatch):
    hashed, noise = [], noise_module.token_noise

    def counting(keys, tokens, *first_rings):
        hashed.append(tokens.numel())
        return noise(keys, tokens, *first_rings)

    monkeypatch.setattr(noise_module, "token_noise", counting)
    normal = torch.randn(40, 40_000, generator=torch.Generator().manual_seed(0))
    for scale in (0.0, 0.5, 1.5, 2.5, 4.0, 20.0):
        cpu_draw(scale * normal, settings(40))
        assert 0 < hashed.pop() < 40 * 2 * W
    cpu_draw(normal, settings(40, top_k=5))
    assert hashed.pop() <= 40 * 5
    cpu_draw(normal, settings(40, temperature=0.0, top_k=5))
    assert not hashed


def test_logprobs_are_those_before_the_filters():
    logits = 5 * torch.randn(8, 500, generator=torch.Generator().manual_seed(0))
    logits[4:] -= 3000
    temperatures = [1.0, 0.6, 1.7, 0.0, 1.2, 0.3, 1e-6, 0.0]
    filters = [0, 7, 0, 3, 2, 0, 0, 0], [1.0, 1.0, 0.5, 1.0, 0.9, 1.0, 1.0, 0.5], [0.0] * 5 + [0.3, 0.0, 0.0]
    tokens, logprobs = draw(logits, settings(8, temperatures, *filters))
    scores = logits / torch.tensor([t or 1.0 for t in temperatures])[:, None]
    expected = scores.double().log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]
    assert tokens.dtype == torch.int64 and logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours():
    """Bit for bit: not on their filters, nor on whether any of them is greedy or has a temperature."""
    logits = 3 * torch.randn(60, 1000, generator=torch.Generator().manual_seed(0))
    kinds = [(1.0, 0, 1.0, 0.0), (0.7, 0, 0.9, 0.0), (1.3, 20, 1.0, 0.02), (0.0, 9, 0.5, 0.1), (1.0, 50, 0.95, 0.0)]
    arguments = settings(60, *columns(kinds[i % 5] for i in range(60)))
    tokens, logprobs = draw(logits, arguments)
    for row in range(60):
        token, logprob = draw(logits[row : row + 1], row_of(arguments, row))
        assert token == tokens[row] and logprob == logprobs[row]


def test_greedy_rows_take_the_first_of_the_largest_whatever_their_filters():
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(0)).round()  # many ties
    first = [int((row == row.max()).nonzero()[0]) for row in logits]
    for temperature in (0.0, [0.0, 1.0] * 3):  # alone, and with rows that draw
        tokens = draw(logits, settings(6, temperature, 3, 0.1, 0.9))[0]
        assert tokens[::2].tolist() == first[::2]
    # filters that leave one token, and a temperature that leaves no chance to any other
    for kind in (dict(top_p=1e-9), dict(top_k=1), dict(min_p=1.0), dict(temperature=1e-6)):
        untied = torch.randn(6, 300, generator=torch.Generator().manual_seed(1))
        assert draw(untied, settings(6, **kind))[0].tolist() == untied.argmax(dim=1).tolist()
    assert draw(logits, settings(6, top_p=1e-9))[0].tolist() == first


@pytest.mark.parametrize("kind", [dict(), dict(temperature=0.0), dict(top_k=3, top_p=0.9, min_p=0.1)], ids=str)
def test_nan_logits_show_in_the_logprob_and_not_in_other_rows(kind):
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    expected = draw(logits, settings(3, **kind))[0].tolist()
    logits[1] = torch.nan
    tokens, logprobs = draw(logits, settings(3, **kind))
    assert tokens[::2].tolist() == expected[::2] and 0 <= tokens[1] < 300
    assert logprobs.isfinite().tolist() == [True, False, True]


def test_no_rows():
    tokens, logprobs = draw(torch.zeros(0, 10), settings(0, seeds=[]))
    assert tokens.shape == logprobs.shape == (0,)
