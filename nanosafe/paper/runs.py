"""What the runs of one model come to: statistics over the seeds of an arm, and between two arms seed by seed."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import StatisticsError, correlation

from nanosafe.evals import plots
from nanosafe.evals.statistics import Estimate, auc, over_seeds
from nanosafe.evals.tables import SUBJECTS, Row, estimate, headline, values

# Arm -> seed -> result.json, and "steps": the rows of metrics.jsonl
Runs = Mapping[str, Mapping[int, dict]]


def all_results(runs: Runs) -> list[dict]:
    return [result for by_seed in runs.values() for result in by_seed.values()]


def mean(result: dict, row: Row) -> float | None:
    value = estimate(result, row)
    return value.mean if isinstance(value, Estimate) else value


def spread(values: Iterable[float | None]) -> Estimate | None:
    """Over seeds, of those that have a value."""
    known = [value for value in values if value is not None]
    return over_seeds(known) if known else None


def level(runs: Runs, arm: str, row: Row) -> Estimate | None:
    return spread(mean(result, row) for result in runs[arm].values())


def change(runs: Runs, before: str, after: str, row: Row) -> Estimate | None:
    """`after` minus `before`, seed by seed."""
    changes = []
    for seed in common(runs, before, after):
        a, b = mean(runs[before][seed], row), mean(runs[after][seed], row)
        changes.append(None if a is None or b is None else b - a)
    return spread(changes)


def common(runs: Runs, *arms: str) -> list[int]:
    return sorted(set.intersection(*(set(runs.get(arm, ())) for arm in arms)))


def comparisons(runs: Runs) -> list[tuple[str, str]]:
    """(before, after): every arm with the base; RL with SFT or, where there is no SFT, every arm with RL."""
    arms = [arm for arm in runs if arm not in ("base", "always refuse")]
    pairs = [("base", arm) for arm in arms]
    if "SFT" in runs:
        pairs.append(("SFT", "RL"))
    else:
        pairs += [("RL", arm) for arm in arms if arm != "RL"]
    return [pair for pair in pairs if common(runs, *pair)]


def headlines(runs: Runs) -> dict[str, Row]:
    """about -> the row that stands for it, in the first result that has one."""
    heads = {}
    for about in SUBJECTS:
        for arm, by_seed in runs.items():
            for result in by_seed.values() if arm != "always refuse" else ():
                if about not in heads and headline(result, about):
                    heads[about] = headline(result, about)
    return heads


def parts_of(runs: Runs, arm: str, row: Row) -> list[dict]:
    """The row's benchmark in every result of the arm that has it."""
    parts = [result["benchmarks"].get(row.benchmark) for result in runs[arm].values()]
    return [part for part in parts if part is not None]


def by_category(runs: Runs, arm: str, row: Row) -> dict[str, Estimate]:
    names = set()
    for part in parts_of(runs, arm, row):
        names |= part["categories"].keys()
    estimates = {}
    for name in sorted(names):
        value = level(runs, arm, row._replace(category=name))
        if value is not None:
            estimates[name] = value
    return estimates


def reflections(runs: Runs, arm: str, row: Row) -> list[float]:
    """The entropy at every reflection token, of all seeds."""
    return [entropy for part in parts_of(runs, arm, row) for entropy in part["reflection"]["values"]]


def curve(runs: Runs, arm: str, key: str) -> list[tuple[int, Estimate]]:
    """(step, over seeds) of a metric of training."""
    values: dict[int, list[float | None]] = defaultdict(list)
    for result in runs[arm].values():
        for row in result["steps"]:
            values[row["step"]].append(row.get(key))
    points = []
    for step in sorted(values):
        value = spread(values[step])
        if value is not None:
            points.append((step, value))
    return points


def points(runs: Runs, x: Row, ys: Sequence[Row]) -> dict[str,
                                                          list[tuple[str, Estimate, Estimate]]]:
    """Panels of plots.plot_points: a point for each arm and seed."""
    results = []
    for arm, by_seed in runs.items():
        results += [result | {"label": arm} for result in by_seed.values()]
    return plots.points(results, x, ys)


def reward_gain(steps: Sequence[dict]) -> float | None:
    rewards = [row["reward/mean"] for row in steps if row.get("reward/mean") is not None]
    last = rewards[-max(1, len(rewards) // 10) :]
    return sum(last) / len(last) - rewards[0] if rewards else None


def agreement(result: dict, safety: Row) -> tuple[float | None, float | None]:
    """Correlation and AUC of reward and judge over the benchmark's questions; None where either is constant."""
    scores, verdicts = scores_and_verdicts(result, safety)
    pairs = list(zip(scores, verdicts, strict=True))
    safe = [score for score, verdict in pairs if verdict == 1]
    unsafe = [score for score, verdict in pairs if verdict != 1]
    try:
        return correlation(scores, verdicts), auc(safe, unsafe)
    except (StatisticsError, ValueError):
        return None, None


def reward_judge_gap(base: dict, result: dict, safety: Row) -> float | None:
    """Share of `result` above the threshold at which reward and judge agree on the base's share, minus the judge's."""
    scores, verdicts = scores_and_verdicts(base, safety)
    new_scores, new_verdicts = scores_and_verdicts(result, safety)
    if not scores or not new_scores:
        return None
    safe = round(sum(verdicts))
    threshold = sorted(scores, reverse=True)[safe - 1] if safe else float("inf")
    return (sum(score >= threshold for score in new_scores) - sum(new_verdicts)) / len(new_scores)


def scores_and_verdicts(result: dict, safety: Row) -> tuple[list[float], list[float]]:
    rewards = values(result, Row(safety.benchmark, "reward"))
    verdicts = values(result, safety)
    return list(rewards.values()), [verdicts[question] for question in rewards]
