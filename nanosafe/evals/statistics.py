"""Means with 95 % intervals, and the few other statistics of the evaluation.

Two sources of chance are kept apart, and each Estimate says which one its interval is about: which items a benchmark
happens to have (`over_items`, `paired_difference`), and how an independent training run happens to turn out
(`over_seeds`). An item, say a prompt, may have several samples. They are averaged first, every item weighs the same and
only items are resampled: samples of one prompt resemble each other, and counting them as independent would make
intervals too narrow.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Z = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
SHARES = (0.0, 1.0)  # bounds of what is a share: right or wrong, safe or unsafe, pass@k
RESAMPLES = 10_000
CHUNK = 1 << 20  # values drawn at a time

Item = float | Sequence[float]  # one value, or one for each sample


class Estimate(NamedTuple):
    """A mean and its 95 % interval; prints as 0.412 [0.371, 0.455], or in another format: f"{estimate:.1%}"."""

    mean: float
    # None: a single run, or a single item without bounds, says nothing of the spread
    low: float | None
    high: float | None
    n: int
    over: str  # what n counts: "items", "pairs" (items that both sides have) or "runs"

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and (self.low > 0 or self.high < 0)

    def __format__(self, spec: str) -> str:
        # Z: no "-0.000"
        mean, low, high = (None if x is None else format(x, spec or "z.3f") for x in self[:3])
        return f"{mean} (one {self.over[:-1]})" if low is None else f"{mean} [{low}, {high}]"

    def __str__(self) -> str:
        return format(self, "")


def over_items(values: Iterable[Item], *, bounds: tuple[float, float] | None = None,
               seed: int = 0) -> Estimate:
    """The mean over items, each the mean of its samples. bounds: SHARES for shares; None for lengths, rewards and such.

    Interval: Wilson's where every item's mean is 0 or 1; else bounded_bootstrap with bounds; else bootstrap, which has
    width 0 if all items are equal. Raises ValueError without items, for an item that is empty, None or not finite
    (leave out what was not judged), and for one beyond its bounds.
    """
    means = [_mean(item, f"item {i}") for i, item in enumerate(values)]
    if not means:
        raise ValueError("no items: nothing was judged, or nothing was left after filtering")
    mean = math.fsum(means) / len(means)
    if set(means) <= {0, 1}:
        interval = wilson(sum(means), len(means))
    elif bounds is None:
        interval = bootstrap(means, seed)
    elif outside := [x for x in means if not bounds[0] <= x <= bounds[1]]:
        raise ValueError(f"an item's mean is {outside[0]}: beyond {bounds[0]} to {bounds[1]}")
    else:
        low, high = bounded_bootstrap(means, bounds, seed)
        # Of nearly equal items at a bound, the mean lies at an end
        interval = min(low, mean), max(high, mean)
    return Estimate(mean, *interval, len(means), "items")


def paired_difference(a: Mapping[Hashable, Item], b: Mapping[Hashable, Item], *,
                      seed: int = 0) -> Estimate:
    """The mean of b - a over the items (by id) that both have; `n` counts those.

    Interval: bootstrap over items; where every item's mean is 0 or 1 on both sides, Wald's after one item of each sign
    is added (Bonett and Price, J. Educ. Behav. Stat. 37 (2012)), whose width is not 0 where all differences are equal.
    Raises ValueError without a common item, and for items as over_items does.
    """
    means, differences = set(), []
    for i in a:
        if i in b:
            before, after = _mean(a[i], f"item {i!r} of a"), _mean(b[i], f"item {i!r} of b")
            means |= {before, after}
            differences.append(after - before)
    if not differences:
        raise ValueError("no item is in both sets: a difference needs the same ids in both")
    if means <= {0, 1}:
        added = torch.tensor([*differences, 1, -1], dtype=torch.float64)
        center, half = added.mean().item(), Z * added.std(correction=0).item() / math.sqrt(len(added))
        interval = max(-1.0, center - half), min(1.0, center + half)
    else:
        interval = bootstrap(differences, seed)
    return Estimate(math.fsum(differences) / len(differences), *interval, len(differences), "pairs")


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
        raise ValueError(f"pass@{k} needs at least {k} samples and 0 to n right ones, found {c} "
                         f"right of n = {n}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """The chance that a random `positive` score exceeds a random `negative` one, ties counting half.

    The area under the ROC curve, Mann-Whitney's U over the number of pairs.
    """
    high, low = (torch.tensor(_numbers(x, "the scores"),
                              dtype=torch.float64) for x in (positive, negative))
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


def auc_interval(value: float, positives: int, negatives: int) -> tuple[float, float]:
    """The score interval of an AUC of that many independent scores; like Wilson's it has a width at 0 and 1 too.

    The AUCs whose distance to `value` is at most Z standard errors, by Hanley and McNeil's variance (Radiology 143
    (1982)) made symmetric: R. G. Newcombe, Stat. Med. 25 (2006) 559, method 5.
    """

    def inside(x: float) -> bool:
        more = (positives + negatives) / 2 - 1
        variance = x * (1 - x) * (1 + more * (1 - x) / (2 - x) + more * x / (1 + x)) / (positives * negatives)
        return (value - x) ** 2 <= Z**2 * variance

    def end(within: float, without: float) -> float:
        for _ in range(60):
            middle = (within + without) / 2
            within, without = (middle, without) if inside(middle) else (within, middle)
        return within

    return end(value, 0.0), end(value, 1.0)


def bootstrap(values: Sequence[float] | Tensor, seed: int) -> tuple[float, float] | tuple[None, None]:
    """Interval of the mean of n values, or of each column of [n, B]: the bootstrap's expanded percentile interval.

    Percentiles of resampled means are too narrow for few items, for they lack the factor n / (n - 1) of the variance
    and know no t; further out by just these they match Student's t where values are symmetric: T. Hesterberg, Am. Stat.
    69 (2015) 371. Of a few very skewed values (lengths, say), and where hardly any value differs, still too narrow.
    """
    n = len(values)
    if n == 1:
        return None, None
    level = math.erfc(math.sqrt(n / (n - 1)) * student_t(n - 1) / math.sqrt(2)) / 2

    # How often each item is drawn, [size, n]
    def counts(size: int, generator: torch.Generator) -> Tensor:
        drawn = torch.randint(n, (size, n), generator=generator)
        return torch.zeros(size, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())

    return _quantiles(counts, torch.as_tensor(values, dtype=torch.float64), level, seed)


def bounded_bootstrap(values: Sequence[float] | Tensor, bounds: tuple[float, float],
                      seed: int) -> tuple[float, float]:
    """Interval of the mean of n values that cannot leave `bounds`, or of each column of [n, B].

    A few items that are nearly all at one bound do not show the rare others, and any bootstrap of them alone is far too
    narrow. The Bayesian bootstrap (Rubin, Ann. Stat. 9 (1981)) weighs items by random weights; here half an item stands
    at each bound besides, a Dirichlet process prior (Ferguson, Ann. Stat. 1 (1973)). For zeros and ones that is
    Jeffreys' interval; too wide for few items that are all nearly equal and far from both bounds.
    """
    data = torch.as_tensor(values, dtype=torch.float64)
    ends = torch.tensor(bounds, dtype=torch.float64).view(2, *[1] * (data.dim() - 1)).expand(2, *data.shape[1:])

    # gamma(1) of each item, gamma(1/2) of each bound
    def weights(size: int, generator: torch.Generator) -> Tensor:
        items = torch.empty(size, len(data), dtype=torch.float64).exponential_(generator=generator)
        return torch.cat((items, torch.randn(size, 2, dtype=torch.float64,
                                             generator=generator) ** 2 / 2), dim=1)

    return _quantiles(weights, torch.cat((data, ends)), 0.025, seed)


def _quantiles(draw: Callable[[int, torch.Generator], Tensor], data: Tensor, level: float,
               seed: int) -> tuple:
    """Quantiles `level` and 1 - `level` of weighted means of `data` [n] or [n, B]; draw: weights [size, n]."""
    generator, rows, means = torch.Generator().manual_seed(seed), max(1, CHUNK // len(data)), []
    for start in range(0, RESAMPLES, rows):
        weights = draw(min(rows, RESAMPLES - start), generator)
        means.append((weights / weights.sum(dim=1, keepdim=True)) @ data)
    low, high = torch.cat(means).quantile(torch.tensor([level, 1 - level], dtype=torch.float64),
                                          dim=0).tolist()
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
        raise ValueError(f"{name}: finite numbers needed, found {found}; leave out what was not "
                         "judged")
    return values
