"""Intervals against closed forms, published tables, enumeration, and how often they hold the truth."""

import itertools
import json
import math
import random
from collections import Counter

import pytest
import torch

from nanosafe.evals import statistics
from nanosafe.evals.statistics import (
    SHARES,
    Estimate,
    auc,
    auc_interval,
    over_items,
    over_seeds,
    paired_difference,
    pass_at_k,
    student_t,
)


def test_estimates_print_as_tables_want_them():
    estimate = Estimate(0.41234, 0.371, 0.4551, 200, "items")
    assert str(estimate) == f"{estimate}" == "0.412 [0.371, 0.455]"
    assert f"{estimate:.1%}" == "41.2% [37.1%, 45.5%]"
    assert str(over_seeds([0.5])) == "0.500 (one run)" and str(over_items([0.5])) == "0.500 (one item)"
    assert str(Estimate(-0.0001, -0.02, 0.01, 9, "pairs")) == "0.000 [-0.020, 0.010]"  # not -0.000
    assert json.loads(json.dumps(over_seeds([0.5])._asdict()))["low"] is None


# Over items


def wilson_by_bisection(successes: int, n: int) -> tuple[float, float]:
    """The definition: the shares p whose score test, |k/n - p| <= z sqrt(p (1 - p) / n), does not reject k of n."""
    z, share = 1.959963984540054, successes / n

    def end(inside: float, outside: float) -> float:
        for _ in range(200):
            p = (inside + outside) / 2
            inside, outside = (p, outside) if abs(share - p) <= z * math.sqrt(p * (1 - p) / n) else (inside, p)
        return inside

    return end(share, 0.0), end(share, 1.0)


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (0, 10), (1, 10), (10, 10), (17, 40), (313, 313), (81, 263)])
def test_zeros_and_ones_get_wilsons_interval(successes, n):
    estimate = over_items([1.0] * successes + [0] * (n - successes))
    assert estimate.mean == successes / n and estimate.n == n and estimate.over == "items"
    assert estimate[1:3] == pytest.approx(wilson_by_bisection(successes, n), abs=1e-9)
    assert estimate.low <= estimate.mean <= estimate.high and estimate.high - estimate.low > 0


def test_wilson_equals_the_published_example():
    # Newcombe, Stat. Med. 17 (1998), table I, method 3: 81 of 263 and 15 of 148
    assert over_items([1] * 81 + [0] * 182)[1:3] == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert over_items([1] * 15 + [0] * 133)[1:3] == pytest.approx((0.0624, 0.1605), abs=5e-5)


def test_a_bootstrap_has_the_width_of_the_central_limit():
    values = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64).tolist()
    estimate, tensor = over_items(values), torch.tensor(values, dtype=torch.float64)
    half = 1.96 * tensor.std().item() / 20
    assert estimate.mean == pytest.approx(tensor.mean().item(), abs=1e-12)
    assert estimate[1:3] == pytest.approx((estimate.mean - half, estimate.mean + half), abs=0.05 * half)


def test_a_bootstrap_of_few_items_equals_all_resamples():
    values = [0.0, 0.1, 0.25, 0.7, 0.8, 0.15]
    means = sorted(sum(draw) / 6 for draw in itertools.product(values, repeat=6))  # all 46,656 resamples
    # Hesterberg's level: the normal distribution's chance below t of 5 degrees of freedom, 2.5706, times sqrt(6 / 5)
    level = 0.5 * math.erfc(2.570582 * math.sqrt(6 / 5) / math.sqrt(2))
    assert 0.0024 < level < 0.0025
    exact = means[round(level * len(means))], means[round((1 - level) * len(means))]
    assert over_items(values)[1:3] == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize(("successes", "n"), [(3, 10), (27, 30), (100, 300), (1, 40)])
def test_the_bounded_bootstrap_of_zeros_and_ones_is_jeffreys_interval(successes, n):
    low, high = statistics.bounded_bootstrap([1.0] * successes + [0.0] * (n - successes), (0, 1), seed=0)
    x = torch.linspace(0, 1, 200_001, dtype=torch.float64)[1:-1]  # the density of Beta(k + 1/2, n - k + 1/2)
    logs = (successes - 0.5) * x.log() + (n - successes - 0.5) * (1 - x).log()
    mass = (logs - logs.max()).exp().cumsum(0)
    exact = [x[torch.searchsorted(mass / mass[-1], q)].item() for q in (0.025, 0.975)]
    assert (low, high) == pytest.approx(exact, abs=0.03 * (exact[1] - exact[0]))
    scaled = statistics.bounded_bootstrap([3.0] * successes + [-1.0] * (n - successes), (-1, 3), seed=0)
    assert scaled == pytest.approx((4 * low - 1, 4 * high - 1))


def test_shares_that_are_nearly_all_equal_have_an_interval():
    nearly = over_items([1.0] * 29 + [[1] * 63 + [0]], bounds=SHARES)
    assert nearly.low == pytest.approx(over_items([1.0] * 30).low, abs=0.05) and nearly.mean < nearly.high <= 1
    assert over_items([1.0] * 29 + [[1] * 63 + [0]]).low > 0.998  # the items alone do not show that others may be rare
    almost = over_items([1.0] * 30 + [1 - 1e-9], bounds=SHARES)
    assert almost.low < almost.mean <= almost.high
    assert over_items([0.5], bounds=SHARES).low < 0.2
    with pytest.raises(ValueError, match="1.5: beyond 0.0 to 1.0"):
        over_items([0.5, 1.5], bounds=SHARES)


def test_blocks_of_resamples_are_as_independent_as_one_block(monkeypatch):
    values = torch.rand(50, generator=torch.Generator().manual_seed(1)).tolist()
    whole, bounded = over_items(values, seed=1), over_items(values, bounds=SHARES, seed=1)
    monkeypatch.setattr(statistics, "CHUNK", 50 * 7)  # 7 resamples a block: 10,000 is no multiple
    # numbers are drawn one after the other, so that the size of a block changes nothing but the order of a sum
    assert over_items(values, seed=1) == pytest.approx(whole[:4] + (whole.over,), abs=1e-12)
    assert over_items(values, bounds=SHARES, seed=1)[1:3] == pytest.approx(bounded[1:3], abs=0.01)  # two sorts of draws


def test_samples_are_averaged_first_and_only_items_are_resampled():
    rng = random.Random(0)
    items = [[float(rng.random() < share)] * 50 for share in [0.5] * 40]  # 50 equal samples say no more than one
    assert over_items(items) == over_items([item[0] for item in items])
    half = [0.5, [1, 0], [0.0, 1.0, 1.0, 0.0], 0.5, [0.25, 0.75]]
    assert over_items(half)[:3] == (0.5, 0.5, 0.5)  # all items equal; samples resampled would differ
    assert over_items([[1, 1, 1, 1, 1, 1], 0.5, 0.0]).mean == 0.5  # not weighted by samples


def test_seeds_decide_and_the_global_generator_does_not():
    values = torch.rand(30, generator=torch.Generator().manual_seed(3)).tolist()
    state = torch.get_rng_state()
    first = over_items(values, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert over_items(values, seed=5) == first != over_items(values, seed=6)


@pytest.mark.parametrize("values", [[], [0.5, None], [1, [0, None]], [0.1, []], [0.2, math.nan], [math.inf], ["1"]])
def test_what_was_not_judged_is_refused(values):
    with pytest.raises(ValueError, match="item"):
        over_items(values)


@pytest.mark.parametrize(("n", "share"), [(10, 0.1), (40, 0.5), (60, 0.97)])
def test_wilson_holds_the_truth_in_95_of_100(n, share):
    # exact, no simulation: the chance of each outcome times whether its interval holds the share
    held = [low <= share <= high for low, high in (over_items([1] * k + [0] * (n - k))[1:3] for k in range(n + 1))]
    coverage = sum(math.comb(n, k) * share**k * (1 - share) ** (n - k) * held[k] for k in range(n + 1))
    assert 0.92 < coverage < 0.985


def covered(interval, draw, truth: float, trials: int = 400) -> float:
    """The share of `trials` data sets whose interval holds the truth; the standard error of 95 % is 1.1 points."""
    rng = random.Random(7)
    estimates = [interval(draw(rng)) for _ in range(trials)]
    return sum(e.low <= truth <= e.high for e in estimates) / trials


def test_the_bootstrap_holds_the_truth_in_95_of_100(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)

    def draw(rng):  # 60 items of different difficulty, 4 samples each
        return [[float(rng.random() < share) for _ in range(4)] for share in (rng.random() for _ in range(60))]

    assert 0.92 < covered(over_items, draw, 0.5) < 0.98
    # the mistake it avoids: samples taken for items
    assert covered(lambda items: over_items([x for item in items for x in item]), draw, 0.5) < 0.92


# Coverage: 93 to 97 % at the sizes of AIME (30), GPQA-Diamond (198) and MATH-500 (500)

SETS, SIZES = 2000, (30, 198, 500)  # the standard error of 95 % is half a point


def beta(a: float, b: float, shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Beta(a, b) as a ratio of gamma variables."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x, y = (torch._standard_gamma(torch.full(shape, c, dtype=torch.float64)) for c in (a, b))
    return x / (x + y)


def right(shares: torch.Tensor, samples: int, seed: int) -> torch.Tensor:
    return torch.binomial(torch.full_like(shares, samples), shares, torch.Generator().manual_seed(seed))


def coverage(interval, data: torch.Tensor, truth: float) -> float:
    """Of the columns of [n, SETS], the share whose interval holds the truth; each quarter has its own resamples."""
    ends = [torch.tensor(interval(part, seed)) for seed, part in enumerate(data.chunk(4, dim=1))]
    low, high = torch.cat(ends, dim=1)
    return ((low <= truth) & (truth <= high)).double().mean().item()


def shares_interval(data: torch.Tensor, seed: int) -> tuple:
    return statistics.bounded_bootstrap(data, SHARES, seed)


@pytest.fixture
def fewer_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 2000)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("a", "b", "samples"), [(0.15, 0.15, 64), (0.1, 0.3, 64), (0.5, 0.05, 64), (1, 1, 4)])
def test_means_of_unequal_items_hold_the_truth_in_95_of_100(n, a, b, samples, fewer_resamples):
    # difficulties as AIME has them: Beta(0.15, 0.15) puts half of the items below 0.02 or above 0.98
    means = right(beta(a, b, (n, SETS), n), samples, 1) / samples
    assert 0.93 <= coverage(shares_interval, means, a / (a + b)) <= 0.97


def test_the_plain_percentile_bootstrap_would_be_too_narrow(fewer_resamples):
    easy = right(beta(0.5, 0.05, (30, SETS), 30), 64, 1) / 64
    assert coverage(lambda data, seed: percentiles(data, 0.025), easy, 0.5 / 0.55) < 0.91
    assert coverage(statistics.bootstrap, easy, 0.5 / 0.55) < 0.93  # nor is the expanded one enough: hence the bounds


def percentiles(data: torch.Tensor, level: float) -> list:
    drawn = torch.randint(len(data), (2000, len(data)), generator=torch.Generator().manual_seed(0))
    counts = torch.stack([row.bincount(minlength=len(data)) for row in drawn]).double()
    levels = torch.tensor([level, 1 - level], dtype=torch.float64)
    return (counts @ data / len(data)).quantile(levels, dim=0).tolist()


@pytest.mark.parametrize("n", SIZES)
def test_pass_at_k_holds_the_truth_in_95_of_100(n, fewer_resamples):
    a, b, k = 0.15, 0.3, 8
    table = torch.tensor([pass_at_k(64, c, k) for c in range(65)], dtype=torch.float64)
    values = table[right(beta(a, b, (n, SETS), n), 64, 1).long()]
    # E[1 - (1 - p)^k] of Beta(a, b): 1 - B(a, b + k) / B(a, b)
    truth = 1 - math.exp(math.lgamma(b + k) + math.lgamma(a + b) - math.lgamma(a + b + k) - math.lgamma(b))
    assert 0.93 <= coverage(shares_interval, values, truth) <= 0.97


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("samples", [4, 64])
def test_fractional_differences_hold_the_truth_in_95_of_100(n, samples, fewer_resamples):
    hard, up, down = beta(0.3, 0.3, (n, SETS), n), beta(1, 1, (n, SETS), 1), beta(1, 3, (n, SETS), 2)
    trained = hard + 0.3 * up * (1 - hard) - 0.3 * down * hard  # each item gains a part of what is left, or loses some
    differences = (right(trained, samples, 3) - right(hard, samples, 4)) / samples
    assert 0.93 <= coverage(statistics.bootstrap, differences, 0.3 * (0.5 * 0.5 - 0.25 * 0.5)) <= 0.97


@pytest.mark.parametrize("n", SIZES)
def test_shares_hold_the_truth_in_93_to_97_of_100(n):
    # exact, no simulation; at a single share the coverage of zeros and ones swings about its mean over shares
    intervals, log_choose = [statistics.wilson(k, n) for k in range(n + 1)], [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(n + 1)]
    found = []
    for share in (i / 100 for i in range(5, 96)):
        found.append(sum(math.exp(c + k * math.log(share) + (n - k) * math.log(1 - share))
                         for k, (c, (low, high)) in enumerate(zip(log_choose, intervals, strict=True))
                         if low <= share <= high))  # fmt: skip
    assert 0.945 <= sum(found) / len(found) <= 0.955 and 0.92 <= min(found) <= max(found) <= 0.985


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("up", "down"), [(0.25, 0.15), (0.3, 0.05)])
def test_differences_of_zeros_and_ones_hold_the_truth_in_93_to_97_of_100(n, up, down):
    draws = torch.rand(SETS, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    counts = Counter(zip((draws < up).sum(1).tolist(), (draws > 1 - down).sum(1).tolist(), strict=True))
    held = 0
    for (better, worse), times in counts.items():
        a = dict(enumerate([0] * better + [1] * worse + [0] * (n - better - worse)))
        estimate = paired_difference(a, a | {i: 1 - a[i] for i in range(better + worse)})
        held += times * (estimate.low <= up - down <= estimate.high)
    assert 0.93 <= held / SETS <= 0.97


# Differences


def test_a_paired_difference_uses_the_items_that_both_have():
    a = {"x": 0.2, "y": [0.0, 1.0], "only a": 5.0, "z": 0.9}
    b = {"z": [1.0, 0.7], "only b": -7.0, "y": 0.75, "x": 0.2}
    estimate = paired_difference(a, b)
    assert estimate.n == 3 and estimate.over == "pairs"
    assert estimate.mean == pytest.approx((0.0 + 0.25 - 0.05) / 3)
    assert paired_difference(b, a).mean == pytest.approx(-estimate.mean)


def test_pairing_removes_what_differs_between_items():
    rng = random.Random(2)
    a = {i: 10 * rng.random() for i in range(100)}
    b = {i: value + 0.3 + 0.1 * rng.random() for i, value in a.items()}
    estimate = paired_difference(a, b)
    assert 0.33 < estimate.low < estimate.mean < estimate.high < 0.36 and estimate.excludes_zero
    assert over_items(b.values()).low < over_items(a.values()).high  # unpaired, nothing would show
    assert paired_difference(b, a).excludes_zero and not paired_difference(a, a).excludes_zero


def test_zeros_and_ones_get_a_difference_by_bonett_and_price():
    a = dict(enumerate([0] * 9 + [1] * 2 + [1] * 5 + [0] * 24))  # 9 become right, 2 become wrong, 29 stay
    b = dict(enumerate([1] * 9 + [0] * 2 + [1] * 5 + [0] * 24))
    up, down, n = 10 / 42, 3 / 42, 42  # one more of each sign
    half = 1.959963984540054 * math.sqrt((up + down - (up - down) ** 2) / n)
    assert paired_difference(a, b)[:4] == pytest.approx((7 / 40, up - down - half, up - down + half, 40))
    equal = paired_difference(a, a)  # a bootstrap would be sure that there is no difference
    assert equal.low == pytest.approx(-equal.high) and 0.05 < equal.high < 0.1
    assert paired_difference({0: 0}, {0: 1}).high == 1.0  # and not more


@pytest.mark.parametrize("shares", [(0.5, 0.6), (0.95, 0.98)])
def test_differences_of_zeros_and_ones_hold_the_truth_in_95_of_100(shares):
    def draw(rng):
        hard = [rng.random() for _ in range(50)]  # shared, so that the sides are correlated
        return [{i: int(h < share) if rng.random() < 0.7 else int(rng.random() < share) for i, h in enumerate(hard)}
                for share in shares]  # fmt: skip

    assert 0.92 < covered(lambda ab: paired_difference(*ab), draw, shares[1] - shares[0]) <= 1


def test_bad_differences_are_refused():
    with pytest.raises(ValueError, match="both"):
        paired_difference({"x": 1}, {"y": 1})
    with pytest.raises(ValueError, match="'x' of b"):
        paired_difference({"x": 1}, {"x": None})


# Runs

T_TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228,
           15: 2.131, 20: 2.086, 25: 2.060, 30: 2.042, 40: 2.021, 60: 2.000, 120: 1.980}  # fmt: skip


@pytest.mark.parametrize("df", T_TABLE)
def test_t_quantiles_equal_the_table_and_the_integrated_density(df):
    t = student_t(df)
    assert t == pytest.approx(T_TABLE[df], abs=5e-4)
    x = torch.linspace(0, t, 100_001, dtype=torch.float64)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    assert 2 * torch.trapezoid(scale * (1 + x**2 / df) ** (-(df + 1) / 2), x).item() == pytest.approx(0.95, abs=1e-7)


def test_runs_get_students_interval_and_say_so():
    estimate = over_seeds([0.70, 0.74, 0.78])  # deviation 0.04
    half = 4.302653 * 0.04 / math.sqrt(3)
    assert estimate[:4] == pytest.approx((0.74, 0.74 - half, 0.74 + half, 3)) and estimate.over == "runs"
    assert over_seeds([0.5]) == (0.5, None, None, 1, "runs") and not over_seeds([0.5]).excludes_zero
    for bad in ([], [0.5, None], [math.nan, 1.0]):
        with pytest.raises(ValueError, match="runs"):
            over_seeds(bad)


def test_three_runs_hold_the_truth_in_95_of_100():
    assert 0.93 < covered(over_seeds, lambda rng: [rng.gauss(0.3, 2) for _ in range(3)], 0.3, trials=2000) < 0.97


# pass@k, AUC


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_equals_all_subsets(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_of_a_benchmark():
    estimate = over_items([pass_at_k(4, 1, 2), pass_at_k(5, 5, 2), pass_at_k(4, 0, 2)], bounds=SHARES)
    assert estimate.mean == pytest.approx((0.5 + 1 + 0) / 3) and estimate.n == 3
    assert pass_at_k(1000, 300, 1) == pytest.approx(0.3)  # numbers of 300 digits
    for n, c, k in [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5), (1, 1, 2)]:
        with pytest.raises(ValueError, match="pass@"):
            pass_at_k(n, c, k)


def test_auc_equals_all_pairs():
    rng = random.Random(4)
    positive, negative = ([rng.randint(shift, 9) / 3 for _ in range(size)] for shift, size in ((2, 37), (0, 23)))
    pairs = [(p > q) + (p == q) / 2 for p in positive for q in negative]
    assert auc(positive, negative) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12) != 0.5
    assert auc([2, 3], [0, 1]) == 1 and auc([0], [1, 2]) == 0 and auc([1, 1], [1]) == 0.5
    for bad in ([], [math.nan], [None]):
        with pytest.raises(ValueError, match="scores"):
            auc([1.0], bad)


@pytest.mark.parametrize(("value", "m", "n"), [(0.5, 10, 10), (0.8, 30, 12), (0.97, 200, 100)])
def test_an_aucs_interval_ends_where_its_score_test_rejects(value, m, n):
    low, high = auc_interval(value, m, n)
    assert 0 < low < value < high < 1
    for x in (low, high):
        # Hanley and McNeil (1982), equation 1, with both sample sizes their mean in the sums
        q1, q2, mean = x / (2 - x), 2 * x * x / (1 + x), (m + n) / 2
        variance = (x * (1 - x) + (mean - 1) * (q1 - x * x) + (mean - 1) * (q2 - x * x)) / (m * n)
        assert abs(value - x) == pytest.approx(1.959964 * math.sqrt(variance))
    assert auc_interval(1 - value, m, n) == pytest.approx((1 - high, 1 - low))
    assert auc_interval(1.0, m, n)[0] < 1 == auc_interval(1.0, m, n)[1] and auc_interval(0.0, m, n)[0] == 0


@pytest.mark.parametrize(("shift", "m", "n"), [(0.5, 30, 30), (1.5, 30, 60), (2.5, 40, 25), (1.0, 12, 12)])
def test_an_aucs_interval_holds_the_truth_in_95_of_100(shift, m, n):
    generator, held = torch.Generator().manual_seed(1), 0
    truth = 0.5 * math.erfc(-shift / 2)  # Phi(shift / sqrt 2)
    for _ in range(1000):
        positive, negative = (torch.randn(size, generator=generator, dtype=torch.float64) for size in (m, n))
        low, high = auc_interval(auc((positive + shift).tolist(), negative.tolist()), m, n)
        held += low <= truth <= high
    assert 930 <= held <= 980
