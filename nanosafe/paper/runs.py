"""What the runs of one model come to: statistics over the seeds of an arm, and between two arms seed by seed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import StatisticsError, correlation

from nanosafe.evals.results import Metric, Result, categories, estimate, mean, values
from nanosafe.evals.statistics import Estimate, auc, over_seeds

MAIN = ("base", "SFT", "RL")  # the arms that the paper compares
REFUSING = "always refuse"  # the arm that has no model


@dataclass(frozen=True)
class Run:
    """One arm on one seed."""

    result: Result
    steps: list[dict] = field(default_factory=list)  # the rows of metrics.jsonl


Runs = Mapping[str, Mapping[int, Run]]  # arm -> seed -> run


def results_of(runs: Runs) -> list[tuple[str, Result]]:
    """(arm, result) of every run."""
    return [(arm, run.result) for arm, by_seed in runs.items() for run in by_seed.values()]


def over_known(numbers: Iterable[float | None]) -> Estimate | None:
    """Over the seeds that have a number."""
    known = [number for number in numbers if number is not None]
    return over_seeds(known) if known else None


def level(runs: Runs, arm: str, metric: Metric) -> Estimate | None:
    return over_known(mean(run.result, metric) for run in runs[arm].values())


def shown(runs: Runs, arm: str, metric: Metric) -> Estimate | None:
    """For pictures: the level over seeds, or a single run's over its questions, where these have an interval."""
    value = level(runs, arm, metric)
    if value is None or value.n > 1:
        return value
    [over_questions] = filter(None, (estimate(run.result, metric) for run in runs[arm].values()))
    return over_questions if isinstance(over_questions, Estimate) else value


def change(runs: Runs, before: str, after: str, metric: Metric) -> Estimate | None:
    """`after` minus `before`, seed by seed."""
    changes = []
    for seed in common_seeds(runs, before, after):
        a, b = mean(runs[before][seed].result, metric), mean(runs[after][seed].result, metric)
        changes.append(None if a is None or b is None else b - a)
    return over_known(changes)


def common_seeds(runs: Runs, first: str, second: str) -> list[int]:
    return sorted(runs.get(first, {}).keys() & runs.get(second, {}).keys())


def comparisons(runs: Runs) -> list[tuple[str, str]]:
    """(before, after): every arm with the base; RL with SFT or, without SFT, every arm with RL."""
    with_base, with_rl = [], []
    for arm in runs:
        if arm not in ("base", REFUSING):
            with_base.append(("base", arm))
            if arm != "RL":
                with_rl.append(("RL", arm))
    pairs = with_base + ([("SFT", "RL")] if "SFT" in runs else with_rl)
    return [pair for pair in pairs if common_seeds(runs, *pair)]


def category_levels(runs: Runs, arm: str, metric: Metric) -> dict[str, Estimate]:
    levels = {}
    for run in runs[arm].values():
        for name in categories(run.result, metric):
            levels[name] = shown(runs, arm, metric._replace(category=name))
    return dict(sorted(levels.items()))


def hardest_variation(runs: Runs) -> Metric | None:
    """The headline of that wording or attack of a safety benchmark in which RL has the lowest mean."""
    means = {}
    for run in runs.get("RL", {}).values():
        for name, measured in run.result.benchmarks.items():
            if measured.about == "safety" and measured.variation:
                metric = Metric(name, measured.headline)
                means[metric] = level(runs, "RL", metric).mean
    return min(means, key=means.get) if means else None


def curves(runs: Runs, arm: str, key: str, *, gained: bool = False) -> list[list[tuple[int, Estimate]]]:
    """A line [(step, value), ...] for each seed, of a metric of training; gained: minus its first value."""
    lines = []
    for run in runs[arm].values():
        rows = [row for row in run.steps if row.get(key) is not None]
        if rows:
            start = rows[0][key] if gained else 0.0
            lines.append([(row["step"], over_seeds([row[key] - start])) for row in rows])
    return lines


def reward_gain(steps: Sequence[dict]) -> float | None:
    """Mean of the last tenth of the steps minus the first step."""
    rewards = [row["reward/mean"] for row in steps if row.get("reward/mean") is not None]
    if not rewards:
        return None
    last = rewards[-max(1, len(rewards) // 10) :]
    return sum(last) / len(last) - rewards[0]


def agreement(result: Result, safety: Metric) -> tuple[float | None, float | None]:
    """Correlation and AUC of reward and judge over questions; None where either is constant."""
    rewards, verdicts = rewards_and_verdicts(result, safety)
    by_verdict = {True: [], False: []}
    for reward, verdict in zip(rewards, verdicts, strict=True):
        by_verdict[verdict == 1].append(reward)
    try:
        return correlation(rewards, verdicts), auc(by_verdict[True], by_verdict[False])
    except (StatisticsError, ValueError):
        return None, None


def reward_judge_gap(base: Result, result: Result, safety: Metric) -> float | None:
    """The share of `result` that the reward calls safe, minus the share that the judge does.

    The threshold of the reward is the one at which both shares are equal on the base.
    """
    base_rewards, base_verdicts = rewards_and_verdicts(base, safety)
    rewards, verdicts = rewards_and_verdicts(result, safety)
    if not base_rewards or not rewards:
        return None
    # The judge's number of safe responses to the base, taken from the top, ends at the threshold.
    safe = round(sum(base_verdicts))
    threshold = sorted(base_rewards, reverse=True)[safe - 1] if safe else float("inf")
    return (sum(reward >= threshold for reward in rewards) - sum(verdicts)) / len(rewards)


def rewards_and_verdicts(result: Result, safety: Metric) -> tuple[list[float], list[float]]:
    """Of each question that has a reward."""
    rewards, verdicts = values(result, safety._replace(name="reward")), values(result, safety)
    return list(rewards.values()), [verdicts[question] for question in rewards]
