"""Means with 95 % intervals, and the few other statistics of the evaluation.

Two sources of chance are kept apart, and each Estimate says which one its interval is about: which items a benchmark
happens to have (`over_items`, `paired_difference`), and how an independent training run happens to turn out
(`over_seeds`). An item, say a prompt, may have several samples. They are averaged first, every item weighs the same and
only items are resampled: samples of one prompt resemble each other, and counting them as independent would make
intervals too narrow.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

Z = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
RESAMPLES = 10_000
CHUNK = 1 << 20  # values drawn at a time

Item = float | Sequence[float]  # one value, or one for each sample


class Estimate(NamedTuple):
    """A mean and its 95 % interval; prints as 0.412 [0.371, 0.455], or in another format: f"{estimate:.1%}"."""

    mean: float
    low: float | None  # None: a single run, or a single item that is not 0 or 1, says nothing of the spread
    high: float | None
    n: int
    over: str  # what n counts: "items", "pairs" (items that both sides have) or "runs"

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and (self.low > 0 or self.high < 0)

    def __format__(self, spec: str) -> str:
        mean, low, high = (None if x is None else format(x, spec or "z.3f") for x in self[:3])  # z: no "-0.000"
        return f"{mean} (one {self.over[:-1]})" if low is None else f"{mean} [{low}, {high}]"

    def __str__(self) -> str:
        return format(self, "")


def over_items(values: Iterable[Item], *, seed: int = 0) -> Estimate:
    """The mean over items, each the mean of its samples.

    Interval: Wilson's where every item's mean is 0 or 1, for a bootstrap of equal values has width 0; otherwise the
    percentile bootstrap, which is somewhat too narrow below about 20 items, and of width 0 if all items are equal.
    Raises ValueError without items, and for an item that is empty, None or not finite: leave out what was not judged.
    """
    means = [_mean(item, f"item {i}") for i, item in enumerate(values)]
    if not means:
        raise ValueError("no items: nothing was judged, or nothing was left after filtering")
    interval = wilson(sum(means), len(means)) if set(means) <= {0, 1} else bootstrap(means, seed)
    return Estimate(math.fsum(means) / len(means), *interval, len(means), "items")


def paired_difference(a: Mapping[Hashable, Item], b: Mapping[Hashable, Item], *, seed: int = 0) -> Estimate:
    """The mean of b - a over the items (by id) that both have; `n` counts those.

    Interval: bootstrap over items; where every item's mean is 0 or 1 on both sides, Wald's after one item of each sign
    is added (Bonett and Price, J. Educ. Behav. Stat. 37 (2012)), whose width is not 0 where all differences are equal.
    Raises ValueError without a common item, and for items as over_items does.
    """
    pairs = [(_mean(a[i], f"item {i!r} of a"), _mean(b[i], f"item {i!r} of b")) for i in a if i in b]
    if not pairs:
        raise ValueError("no item is in both sets: a difference needs the same ids in both")
    differences = [after - before for before, after in pairs]
    if {x for pair in pairs for x in pair} <= {0, 1}:
        added = torch.tensor([*differences, 1, -1], dtype=torch.float64)
        center, half = added.mean().item(), Z * added.std(correction=0).item() / math.sqrt(len(added))
        interval = max(-1.0, center - half), min(1.0, center + half)
    else:
        interval = bootstrap(differences, seed)
    return Estimate(math.fsum(differences) / len(pairs), *interval, len(pairs), "pairs")


def over_seeds(values: Iterable[float]) -> Estimate:
    """The mean over independent runs with Student's t interval (1908) of n - 1 degrees of freedom; none for one run."""
    runs = _numbers(list(values), "the runs")
    n, mean = len(runs), math.fsum(runs) / len(runs)
    if n == 1:
        return Estimate(mean, None, None, n, "runs")
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in runs) / (n - 1))
    half = student_t(n - 1) * deviation / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n, "runs")


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that at least one of k samples is right, estimated without bias from c right ones of n.

    1 - C(n - c, k) / C(n, k): Chen et al. (2021), arXiv 2107.03374, equation 1.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples and 0 to n right ones, found {c} right of n = {n}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def pass_at_k_over_items(counts: Mapping[Hashable, tuple[int, int]], k: int, *, seed: int = 0) -> Estimate:
    """`over_items` of pass@k; counts: id -> (n samples, c right ones). Raises ValueError naming an item with n < k."""
    short = [item for item, (n, _) in counts.items() if n < k]
    if short:
        raise ValueError(f"item {short[0]!r} has {counts[short[0]][0]} samples: pass@{k} needs {k} of each item")
    return over_items([pass_at_k(n, c, k) for n, c in counts.values()], seed=seed)


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """The chance that a random `positive` score exceeds a random `negative` one, ties counting half.

    The area under the ROC curve, Mann-Whitney's U over the number of pairs.
    """
    high, low = (torch.tensor(_numbers(x, "the scores"), dtype=torch.float64) for x in (positive, negative))
    low = low.sort().values
    below, not_above = torch.searchsorted(low, high), torch.searchsorted(low, high, right=True)
    return (below + not_above).sum().item() / (2 * len(high) * len(low))


def wilson(successes: float, n: int) -> tuple[float, float]:
    """The score interval of a share: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927). Shares of 0 and 1 get a width too."""
    share, scale = successes / n, 1 + Z**2 / n
    center = (share + Z**2 / (2 * n)) / scale
    half = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)) / scale
    # the share itself is an end where it is 0 or 1, which rounding must not hide
    return min(share, max(0.0, center - half)), max(share, min(1.0, center + half))


def bootstrap(values: Sequence[float], seed: int) -> tuple[float, float] | tuple[None, None]:
    """Percentile interval of the mean: Efron, Ann. Stat. 7 (1979); Efron and Tibshirani (1993), chapter 13."""
    if len(values) == 1:
        return None, None
    data, n, generator = torch.tensor(values, dtype=torch.float64), len(values), torch.Generator().manual_seed(seed)
    rows = max(1, CHUNK // n)
    sizes = [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
    means = torch.cat([data[torch.randint(n, (size, n), generator=generator)].mean(dim=1) for size in sizes])
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def student_t(df: int) -> float:
    """The 97.5 % quantile of Student's t, by bisection of P(|T| < t), t = sqrt(df) tan(angle).

    For whole degrees of freedom that is a finite sum: Abramowitz and Stegun (1964), 26.7.3 and 26.7.4.
    """
    low, high, odd = 0.0, math.pi / 2, df % 2
    for _ in range(60):
        angle = (low + high) / 2
        total, term = 0.0, math.cos(angle) ** odd
        for power in range(odd, df - 1, 2):
            total, term = total + term, term * math.cos(angle) ** 2 * (power + 1) / (power + 2)
        inside = math.sin(angle) * total
        inside = (angle + inside) * 2 / math.pi if odd else inside
        low, high = (angle, high) if inside < 0.95 else (low, angle)
    return math.sqrt(df) * math.tan(low)


def _mean(item: Item, name: str) -> float:
    samples = _numbers(item if isinstance(item, Sequence) else [item], name)
    return math.fsum(samples) / len(samples)


def _numbers(values: Sequence[float], name: str) -> Sequence[float]:
    bad = [x for x in values if not isinstance(x, int | float) or not math.isfinite(x)]
    if bad or not values:
        found = repr(bad[0]) if bad else "none"
        raise ValueError(f"{name}: finite numbers needed, found {found}; leave out what was not judged")
    return values
