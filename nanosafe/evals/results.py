"""result.json: what every question of an evaluation came to, and the one place that turns this into figures.

A score is the mean of a question's samples in one metric. Means, intervals and differences are computed from
scores where they are shown, so that each is found in one way only. The file holds the fields of `Result`, and

    format        2; results of an earlier form must be measured anew
    benchmarks    {name: fields of BenchmarkResult, without its scores}
    rows          the scores, a line each: [benchmark, metric, question, category, seen, value]
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from math import fsum
from pathlib import Path
from typing import NamedTuple

from nanosafe.evals.statistics import SHARES, Estimate, over_items, paired_difference
from nanosafe.io.files import misfit, read_own, write_atomic

FORMAT = 2
SUBJECTS = ("safety", "over-refusal", "reasoning")
MEMORIZATION = "memorization"  # the scores of SFT data stand among the benchmarks under this name
# How responses ended, and what the model's distributions were like, whatever was asked.
DIAGNOSTICS = ("truncated", "unclosed_thought", "tokens", "reward", "token_entropy",
               "reflection_entropy")
# Means over all tokens together: plain numbers, without an interval over questions.
POOLED = ("entropy_per_token", "entropy_per_response_or_zero", "all_token_entropy",
          "count_per_1000_tokens")
CURE = ("bring it back from a copy or delete its folder, for it alone says how the responses there "
        "came about")
# What the file must hold.
RESULT_FIELDS = {"model": str, "label": str, "benchmarks": dict, "settings": dict, "rows": list}
BENCHMARK_FIELDS = {"about": str, "headline": str, "source": str, "judge": str, "protocol": dict,
                    "shown": list, "differences": dict, "variation": bool, "responses": int,
                    "pooled": dict}
ROW_TYPES = [str, str, str, str, bool, float]


class Metric(NamedTuple):
    """What a figure is about."""

    benchmark: str
    name: str
    category: str | None = None  # None: all questions


class Score(NamedTuple):
    question: str
    category: str
    seen: bool  # the question stands among the training prompts
    value: float


@dataclass
class BenchmarkResult:
    about: str  # one of SUBJECTS, or memorization
    headline: str  # these, and further fields below, are the Benchmark's
    source: str
    judge: str
    protocol: dict = field(default_factory=dict)  # how it was sampled and judged, see run.protocol
    shown: Sequence[str] = ()
    differences: dict[str, Sequence[str]] = field(default_factory=dict)
    variation: bool = False
    responses: int = 0
    bounds: Sequence[float] | None = None  # of the headline, whatever the unjudged would be
    pooled: dict[str, float] = field(default_factory=dict)  # POOLED, those that were measured
    # Of each metric, in the order of the questions.
    scores: dict[str, list[Score]] = field(default_factory=dict)

    @property
    def metrics(self) -> list[str]:
        """The grader's metrics and their differences."""
        graded = [name for name in self.scores if name not in DIAGNOSTICS]
        return graded + list(self.differences)

    @property
    def seen(self) -> set[str]:
        """The questions that stand among the training prompts; figures leave them out."""
        scores = chain.from_iterable(self.scores.values())
        return {score.question for score in scores if score.seen}


@dataclass
class Result:
    label: str
    benchmarks: dict[str, BenchmarkResult]
    model: str = ""
    run: str | None = None  # of a checkpoint in a run folder
    step: int | None = None
    # What the responses depend on, with a fingerprint of the weights.
    settings: dict = field(default_factory=dict)


def values(result: Result, metric: Metric, *, with_seen: bool = False) -> dict[str, float]:
    """{question: score}, empty where nothing was measured; questions of the training prompts only `with_seen`."""
    measured = result.benchmarks.get(metric.benchmark)
    if measured is None:
        return {}
    if metric.name in measured.differences:
        first, second = measured.differences[metric.name]
        a = values(result, metric._replace(name=first), with_seen=with_seen)
        b = values(result, metric._replace(name=second), with_seen=with_seen)
        return {question: a[question] - b[question] for question in a if question in b}
    found = {}
    for score in measured.scores.get(metric.name, ()):
        if (with_seen or not score.seen) and metric.category in (None, score.category):
            found[score.question] = score.value
    return found


def mean(result: Result, metric: Metric) -> float | None:
    if metric.name in POOLED:
        return estimate(result, metric)
    scores = values(result, metric).values()
    return fsum(scores) / len(scores) if scores else None


def estimate(result: Result, metric: Metric, *, with_seen: bool = False) -> Estimate | float | None:
    """What a result says of a metric; a plain number if it is pooled, None where nothing was measured."""
    measured = result.benchmarks.get(metric.benchmark)
    if measured is not None and metric.name in POOLED:
        return measured.pooled.get(metric.name)
    if measured is not None and metric.name in measured.differences:
        first, second = measured.differences[metric.name]
        a = values(result, metric._replace(name=first), with_seen=with_seen)
        b = values(result, metric._replace(name=second), with_seen=with_seen)
        return paired_difference(b, a) if a.keys() & b.keys() else None
    scores = values(result, metric, with_seen=with_seen)
    if not scores:
        return None
    is_share = metric.name not in DIAGNOSTICS and metric.benchmark != MEMORIZATION
    return _over_questions(tuple(scores.values()), SHARES if is_share else None)


@cache  # tables for a file and for the terminal, and plots, show the same estimates
def _over_questions(scores: tuple[float, ...], bounds: tuple[float, float] | None) -> Estimate:
    return over_items(scores, bounds=bounds)


def difference(base: Result, result: Result, metric: Metric) -> Estimate | float | None:
    """`result` minus `base`, paired by question."""
    if metric.name in POOLED:
        before, after = estimate(base, metric), estimate(result, metric)
        return None if before is None or after is None else after - before
    before, after = values(base, metric), values(result, metric)
    return paired_difference(before, after) if before.keys() & after.keys() else None


def headline(result: Result, about: str) -> Metric | None:
    """The metric that stands for a subject: the headline of its first benchmark that is no variation."""
    for name, measured in result.benchmarks.items():
        if measured.about == about and not measured.variation:
            return Metric(name, measured.headline)
    return None


def headlines(results: Sequence[Result]) -> dict[str, Metric]:
    """Subject -> its headline, in the first result that has one."""
    heads = {}
    for about in SUBJECTS:
        for result in results:
            metric = headline(result, about)
            if metric is not None:
                heads.setdefault(about, metric)
    return heads


def categories(result: Result, metric: Metric) -> list[str]:
    """Those in which the metric was measured, sorted."""
    measured = result.benchmarks.get(metric.benchmark)
    scores = measured.scores.get(metric.name, ()) if measured else ()
    return sorted({score.category for score in scores if not score.seen})


def check_comparable(results: Sequence[Result]) -> None:
    """Raise ValueError for results of different questions (another split or revision) or judges
    under one name."""
    first: dict[str, tuple[str, BenchmarkResult]] = {}  # benchmark -> a label, and what it has
    for result in results:
        for name, measured in result.benchmarks.items():
            if name == MEMORIZATION:
                continue
            label, other = first.setdefault(name, (result.label, measured))
            differ = ""
            if measured.source != other.source:
                differ, a, b = "answer different questions", other.source, measured.source
            elif measured.judge != other.judge:
                differ, a, b = "were graded by different judges", other.judge, measured.judge
            if differ:
                raise ValueError(f"{name}: these results {differ} and cannot be compared: "
                                 f"{label} has {a}; {result.label} has {b}")


def write_result(path: Path, result: Result) -> None:
    benchmarks, rows = {}, []
    for name, measured in result.benchmarks.items():
        fields = dict(vars(measured))
        for metric, scores in fields.pop("scores").items():
            for score in scores:
                rows.append(json.dumps([name, metric, *score]))
        benchmarks[name] = fields
    content = {"format": FORMAT} | vars(result) | {"benchmarks": benchmarks, "rows": []}
    # json would give every entry of a row a line of its own, so the rows are put in here.
    head = json.dumps(content, indent=1).removesuffix("]\n}")
    write_atomic(path, (head + "\n  " + ",\n  ".join(rows) + "\n ]\n}\n").encode())


def read_result(path: Path) -> Result:
    """The result in a file.

    Raises ValueError naming the file and the cure where it is damaged, or of an earlier form.
    """
    found = read_own(path, {"label": str, "benchmarks": dict}, CURE)
    if found.get("format") != FORMAT:
        raise ValueError(f"{path} was written by an earlier version, in another form: measure "
                         f"{found['label']} anew, with eval.py --model and another --out")
    problem = misfit(found, RESULT_FIELDS)
    for name, fields in found["benchmarks"].items():
        wrong = misfit(fields, BENCHMARK_FIELDS)
        if wrong:
            problem = f"{name}: {wrong}"
    if problem:
        raise ValueError(f"{path} is damaged ({problem}): {CURE}")
    benchmarks = {name: BenchmarkResult(**fields) for name, fields in found["benchmarks"].items()}
    for row in found["rows"]:
        is_row = isinstance(row, list) and [type(entry) for entry in row] == ROW_TYPES
        if not is_row or row[0] not in benchmarks:
            raise ValueError(f"{path} is damaged (its benchmarks have no row "
                             f"{json.dumps(row)[:100]}): {CURE}")
        name, metric, *score = row
        benchmarks[name].scores.setdefault(metric, []).append(Score(*score))
    return Result(found["label"], benchmarks, found["model"], found.get("run"), found.get("step"),
                  found["settings"])
