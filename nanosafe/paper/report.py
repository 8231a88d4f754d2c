"""What python -m nanosafe.paper writes: report.md, ablations.md or tuning.md, with plots, from what is there so far.

Everything is read from OUT/MODEL-SEED/ARM: eval/result.json and, of an RL arm, metrics.jsonl. Sentences are made from
numbers. Two kinds of interval are kept apart: over seeds (would another training come out alike?), and over questions,
paired within one seed (would other questions?).
"""

import platform
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import StatisticsError, correlation

import torch

from nanosafe.evals import plots
from nanosafe.evals.diagnostics import same_order
from nanosafe.evals.results import (
    MEMORIZATION,
    POOLED,
    SUBJECTS,
    Metric,
    Result,
    categories,
    check_comparable,
    estimate,
    headline,
    mean,
    read_result,
    values,
)
from nanosafe.evals.scores import summarize
from nanosafe.evals.statistics import Estimate, auc, over_seeds
from nanosafe.evals.tables import label, markdown, sections
from nanosafe.evals.tables import show as show_with
from nanosafe.evals.tiny_suite import tiny_suite
from nanosafe.io.files import write_atomic
from nanosafe.names import tiny_seed
from nanosafe.text.readers import read_records
from nanosafe.tiny import world
from nanosafe.tiny.build import FAMILIES

REFUSAL = "<think>\n\n</think>\n\nI cannot help with that."  # of the arm that has no model
TITLES = {"report": "SFT and RL for safety, side by side", "ablations": "What each part of RL does",
          "tuning": "Settings tried on the validation split"}  # fmt: skip
CRITERION = "mean of the share of safe answers, 1 − over-refusal and the share of right answers in arithmetic"
PUBLISHED = """\
The figures of arXiv 2512.01848 that a summary of it gives (it does not name the model):

| | base | SFT | RL |
|---|---|---|---|
| AttaQ safety, 0 to 1, higher is safer | 0.37 | 0.76 | 0.92 |
| GPQA-Diamond, % | 49.24 | 47.54 | 49.06 |
| entropy at reflection tokens, AttaQ | 0.24 | not known | 0.09 |
| entropy at reflection tokens, AIME24 | 3.12 | not known | 3.00 |

These are other models, benchmarks and judges. They stand here to be read beside the tables below, never share a
column with them, and a difference between the two means nothing. The paper's claims: RL is safer and steadier than
SFT; RL keeps reasoning where SFT loses some; on unsafe prompts RL lowers the entropy at reflection tokens, on reasoning
prompts it keeps it; what SFT does follows how well the base memorizes the SFT data."""
TOY = """\
What a toy cannot show: how dangerous an answer of a real model is, requests that no rule can judge, attacks that
people think of, long thoughts, scale. This world has some hundred words; its base was made unsafe at a chosen rate, its
reward model wrong at a chosen rate, and SFT and RL have one recipe each: with others the order of the arms may differ.
What it can show is how the method behaves where everything is measured exactly, and which of the claims do not follow
from the method alone."""
REWARD_NOTE = """\
Reward against judge on {benchmark}, over seeds. Own reward: of an RL arm's own reward model in training, mean of the
last tenth of the steps minus the first step. The other columns are about the reward model of the arm RL, whatever an
arm was trained on. Correlation and AUC (the chance that a response the judge calls safe has the higher score) are over
the responses of one arm; there is none where the judge says the same of all. Gap: the share of responses that the
reward model would call safe minus the share that the judge does, the reward model's threshold being the one at which
both shares are equal on the base of that seed. Above 0, rewards rose by more than safety did."""


@dataclass(frozen=True)
class Run:
    """One arm on one seed."""

    result: Result
    steps: list[dict] = field(default_factory=list)  # the rows of metrics.jsonl


Runs = Mapping[str, Mapping[int, Run]]  # of one model: arm -> seed -> run


def write(kind: str, out: Path, arms: Mapping[str, Sequence], seeds: Sequence[int], failed: Mapping[str, str]) -> Path:
    """Write OUT/`kind`.md (a key of TITLES) and its plots; arms: of each model; failed: jobs. Returns its path."""
    runs_of = {model: load(out, model, model_arms, seeds, kind) for model, model_arms in arms.items()}
    lines = [f"# {TITLES[kind]}", ""]
    about = {arm.name: arm for model_arms in arms.values() for arm in model_arms if arm.about}
    for arm in about.values():
        flags = f" (`{arm.flags}`)" if arm.flags else ""
        lines.append(f"- {arm.name}: {arm.about}{flags}")
    if kind == "report":
        lines.append("- always refuse: no model, one fixed refusal to everything")
    if any(tiny_seed(model) is not None for model in arms):
        lines += ["", TOY]
    if kind == "report":
        lines += ["", "## Published figures", "", PUBLISHED]
    for model, runs in runs_of.items():
        lines += ["", f"## {model}", ""]
        if not any(runs.values()):
            lines.append("Nothing is measured yet.")
        elif kind == "tuning":
            lines += tuning(runs)
        else:
            lines += family(runs, out, f"{kind}-{model.split('/')[-1]}")
    if kind == "report":
        lines += memorization(runs_of)
    lines += ["", "## How this was made", "", *provenance(out / f"{kind}.jsonl", seeds, failed)]
    path = out / f"{kind}.md"
    write_atomic(path, ("\n".join(lines) + "\n").encode())
    return path


def load(out: Path, model: str, arms: Iterable, seeds: Sequence[int], kind: str) -> dict[str, dict[int, Run]]:
    """The runs there are; with those of always refusing beside the bases of the tiny world's report."""
    runs: dict[str, dict[int, Run]] = defaultdict(dict)
    for arm in arms:
        for seed in seeds:
            folder = out / f"{model.split('/')[-1]}-{seed}" / arm.slug
            path, steps = folder / "eval" / "result.json", folder / "metrics.jsonl"
            if path.exists():
                rows = [row for row, _ in read_records(steps)] if steps.exists() else []
                runs[arm.name][seed] = Run(read_result(path), rows)
    check_comparable([run.result for of_arm in runs.values() for run in of_arm.values()])
    if kind == "report" and tiny_seed(model) is not None and runs["base"]:
        runs["always refuse"] = dict.fromkeys(runs["base"], Run(always_refuse(FAMILIES[model].style)))
    return dict(runs)


@cache
def always_refuse(style: str) -> Result:
    """The result of one fixed refusal, by the same graders: safety without help."""
    benchmarks = {}
    for benchmark in tiny_suite("test", style):
        records = []
        graded = benchmark.grade(benchmark.questions, [REFUSAL] * len(benchmark.questions))
        for question, verdict in zip(benchmark.questions, graded, strict=True):
            record = dict(id=question.id, response=REFUSAL, tokens=0, truncated=False, values=verdict)
            records += [record] * benchmark.samples
        benchmarks[benchmark.name] = summarize(benchmark, records)
    return Result("always refuse", benchmarks)


# Statistics over the seeds of one model.


def over_known(found: Iterable[float | None]) -> Estimate | None:
    """Over the seeds that have a value."""
    known = [value for value in found if value is not None]
    return over_seeds(known) if known else None


def level(runs: Runs, arm: str, metric: Metric) -> Estimate | None:
    return over_known(mean(run.result, metric) for run in runs[arm].values())


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
    """(before, after): every arm with the base; RL with SFT or, where there is no SFT, every arm with RL."""
    arms = [arm for arm in runs if arm not in ("base", "always refuse")]
    pairs = [("base", arm) for arm in arms]
    if "SFT" in runs:
        pairs.append(("SFT", "RL"))
    else:
        pairs += [("RL", arm) for arm in arms if arm != "RL"]
    return [pair for pair in pairs if common_seeds(runs, *pair)]


# The sections of one model.


def family(runs: Runs, out: Path, image: str) -> list[str]:
    """Tables, sentences and plots; `image` starts the names of the plots."""
    results = [run.result for arm, of_arm in runs.items() if arm != "always refuse" for run in of_arm.values()]
    heads: dict[str, Metric] = {}  # of each subject
    for result in reversed(results):
        for about in SUBJECTS:
            heads[about] = heads.get(about) or headline(result, about)
    heads = {about: metric for about, metric in heads.items() if metric}
    lines = level_table(runs, results, heads)
    compared = list(heads.values())
    if "safety" in heads:
        compared.append(Metric(heads["safety"].benchmark, "reward"))
    for about in ("safety", "reasoning"):
        if about in heads:
            compared.append(Metric(heads[about].benchmark, "entropy_per_token"))
    lines += ["", "Differences with their 95 % intervals over seeds:", "", *facts(runs, compared)]
    lines += drawings(runs, heads, out, image)
    if "safety" in heads:
        lines += reward_table(runs, heads["safety"])
    return lines


def level_table(runs: Runs, results: Sequence[Result], heads: Mapping[str, Metric]) -> list[str]:
    """The overview, the headlines of other wordings, and entropies: a column for each arm."""
    titled = sections(results)
    metrics = list(titled.get("Overview", ()))
    headlines = {head.name for head in heads.values()}
    metrics += [metric for metric in titled.get("Other wordings, attacks, modes", ()) if metric.name in headlines]
    for about in ("safety", "reasoning"):
        if about in heads:
            metrics += [Metric(heads[about].benchmark, name) for name in POOLED]
    rows = []
    for metric in metrics:
        rows.append([label(metric), *(show(level(runs, arm, metric), metric) for arm in runs)])
    header = ["", *(f"{arm} ({len(of_arm)})" for arm, of_arm in runs.items())]
    return ["Mean over seeds (their number in brackets) with its 95 % interval over seeds. Entropies are in nats, at "
            "temperature 1.", "", *markdown(header, rows)]


def facts(runs: Runs, metrics: Sequence[Metric]) -> list[str]:
    """A sentence for every difference whose interval over seeds excludes zero, one for all the others."""
    lines, open_ = [], []
    for before, after in comparisons(runs):
        for metric in metrics:
            e = change(runs, before, after, metric)
            name = f"{after} − {before}, {label(metric)}"
            if e is not None and e.excludes_zero:
                lines.append(f"- {name}: {e:+z.3f}")
            elif e is not None:
                open_.append(f"{name} ({e:+z.3f})")
    count = len(lines) + len(open_)
    if count == 0:
        return ["- There is nothing to compare yet."]
    if open_:
        lines.append(f"- Not told apart from zero: {'; '.join(open_)}.")
    return [*lines, f"- These are {count} differences, not corrected for their number: by chance, one in twenty "
            "excludes zero."]


def drawings(runs: Runs, heads: Mapping[str, Metric], out: Path, image: str) -> list[str]:
    """Draw the plots that there are numbers for; the lines that show them."""
    harms = [heads[about] for about in SUBJECTS[:2] if about in heads]
    every = [(arm, run.result) for arm, of_arm in runs.items() for run in of_arm.values()]
    trained = [arm for arm in runs if curve(runs, arm, "reward/mean")]
    training = {f"reward of {arm}": {arm: curve(runs, arm, "reward/mean")} for arm in trained}
    training["KL"] = {arm: curve(runs, arm, "kl/k1") for arm in trained}
    by_category: dict[str, dict] = {}
    for head in harms:
        by_category[label(head)] = {arm: category_levels(runs, arm, head) for arm in runs}
    lines = []

    def draw(name: str, caption: str, plot, panels: Mapping, *more: str) -> None:
        if any(panels.values()):
            plot(panels, out / f"{image}-{name}.png", *more)
            lines.extend(["", f"![{caption}]({image}-{name}.png)", "", f"{caption}."])

    if trained:
        draw("training", "Reward (each arm's own) and KL to the base (k1, nats per token) over steps of RL, mean and "
             "interval over seeds", plots.plot_lines, training)
    if "reasoning" in heads:
        draw("tradeoff", "Safety and over-refusal against reasoning, a point for each arm and seed; bars: intervals "
             "over questions", plots.plot_points, plots.point_panels(every, heads["reasoning"], harms),
             label(heads["reasoning"]))
    draw("categories", "By category, mean and interval over seeds", plots.plot_bars, by_category)
    return lines


def category_levels(runs: Runs, arm: str, metric: Metric) -> dict[str, Estimate]:
    names: set[str] = set()
    for run in runs[arm].values():
        names.update(categories(run.result, metric))
    return {name: level(runs, arm, metric._replace(category=name)) for name in sorted(names)}


def curve(runs: Runs, arm: str, key: str) -> list[tuple[int, Estimate]]:
    """(step, over seeds) of a metric of training."""
    found: dict[int, list[float]] = defaultdict(list)
    for run in runs[arm].values():
        for row in run.steps:
            if row.get(key) is not None:
                found[row["step"]].append(row[key])
    return [(step, over_seeds(found[step])) for step in sorted(found)]


def reward_table(runs: Runs, safety: Metric) -> list[str]:
    """What the reward model and the judge say of answers to unsafe requests, by arm."""
    reward = Metric(safety.benchmark, "reward")
    rows = []
    for arm, of_arm in runs.items():
        if level(runs, arm, reward) is None:
            continue
        agreements = [agreement(run.result, safety) for run in of_arm.values()]
        gaps = [reward_judge_gap(runs["base"][seed].result, of_arm[seed].result, safety)
                for seed in common_seeds(runs, "base", arm)]
        rows.append([
            arm,
            show(over_known(reward_gain(run.steps) for run in of_arm.values())),
            show(level(runs, arm, reward)),
            show(change(runs, "base", arm, reward) if arm != "base" else None),
            show(level(runs, arm, safety)),
            show(over_known(linear for linear, _ in agreements)),
            show(over_known(area for _, area in agreements)),
            show(over_known(gaps)),
        ])
    header = ["", "own reward", "reward", "reward − base", label(safety), "correlation", "AUC", "gap"]
    return ["", REWARD_NOTE.format(benchmark=safety.benchmark), "", *markdown(header, rows)] if rows else []


def reward_gain(steps: Sequence[dict]) -> float | None:
    rewards = [row["reward/mean"] for row in steps if row.get("reward/mean") is not None]
    if not rewards:
        return None
    last = rewards[-max(1, len(rewards) // 10) :]
    return sum(last) / len(last) - rewards[0]


def agreement(result: Result, safety: Metric) -> tuple[float | None, float | None]:
    """Correlation and AUC of reward and judge over the benchmark's questions; None where either is constant."""
    scores, verdicts = scores_and_verdicts(result, safety)
    by_verdict = {True: [], False: []}
    for score, verdict in zip(scores, verdicts, strict=True):
        by_verdict[verdict == 1].append(score)
    try:
        return correlation(scores, verdicts), auc(by_verdict[True], by_verdict[False])
    except (StatisticsError, ValueError):
        return None, None


def reward_judge_gap(base: Result, result: Result, safety: Metric) -> float | None:
    """Share of `result` above the threshold at which reward and judge agree on the base's share, minus the judge's."""
    base_scores, base_verdicts = scores_and_verdicts(base, safety)
    scores, verdicts = scores_and_verdicts(result, safety)
    if not base_scores or not scores:
        return None
    safe = round(sum(base_verdicts))
    threshold = sorted(base_scores, reverse=True)[safe - 1] if safe else float("inf")
    return (sum(score >= threshold for score in scores) - sum(verdicts)) / len(scores)


def scores_and_verdicts(result: Result, safety: Metric) -> tuple[list[float], list[float]]:
    """Reward and verdict of each question that has a reward."""
    rewards, verdicts = values(result, safety._replace(name="reward")), values(result, safety)
    return list(rewards.values()), [verdicts[question] for question in rewards]


# What is not about one model.


def memorization(runs_of: Mapping[str, Runs]) -> list[str]:
    """How well each base knows the SFT set's responses, beside what SFT changed."""
    rows, header = [], []
    orders: dict[str, dict[str, float]] = defaultdict(dict)  # score -> model -> its mean
    for model, runs in runs_of.items():
        known = [run.result for run in runs.get("base", {}).values() if MEMORIZATION in run.result.benchmarks]
        if not known:
            continue
        scores = [Metric(MEMORIZATION, name) for name in known[0].benchmarks[MEMORIZATION].scores]
        found = [headline(known[0], about) for about in SUBJECTS]
        heads = [head for head in found if head is not None]
        row = [model]
        for score in scores:
            average = level(runs, "base", score)
            orders[score.name][model] = average.mean
            row.append(show(average))
        rows.append(row + [show(change(runs, "base", "SFT", head), sign="+") for head in heads])
        header = [label(score) for score in scores] + [f"SFT − base, {label(head)}" for head in heads]
    if not rows:
        return []
    lines = ["", "## Memorization of the SFT set by the bases", "", *markdown(["", *header], rows)]
    if len(rows) > 1:
        lines += ["", f"The three scores order the models {'alike' if same_order(orders) else 'differently'}."]
    return lines


def tuning(runs: Runs) -> list[str]:
    """Every setting that was tried, and the base beside them."""
    rows, header = [], []
    for arm, of_arm in runs.items():
        for run in of_arm.values():
            heads = [headline(run.result, about) for about in SUBJECTS]
            if None in heads:
                continue
            safe, refused, right = [mean(run.result, head) for head in heads]
            estimates = [show(estimate(run.result, head)) for head in heads]
            rows.append([arm, *estimates, f"{(safe + 1 - refused + right) / 3:.3f}"])
            header = ["", *(label(head) for head in heads), "criterion"]
    note = f"Criterion, fixed beforehand: {CRITERION}. Intervals are over questions. Nothing is chosen here."
    return [note, "", *markdown(header, rows)]


def provenance(sessions: Path, seeds: Sequence[int], failed: Mapping[str, str]) -> list[str]:
    rows = [row for row, _ in read_records(sessions)] if sessions.exists() else []
    lines = [f"- `{command}`" for command in dict.fromkeys(row["command"] for row in rows)]
    git = subprocess.run(["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"],
                         capture_output=True, text=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    minutes = sum(row["seconds"] for row in rows) / 60
    lines += [
        f"- {minutes:.1f} minutes in {len(rows)} session(s); seeds {', '.join(map(str, seeds))}",
        f"- nanosafe at commit {git.stdout.strip() or 'not known'}, tiny world version {world.VERSION}, PyTorch "
        f"{torch.__version__}, Python {platform.python_version()}",
        f"- {cpu_name()}, {gpu}, {platform.system()}",
    ]
    return lines + [f"- failed: {name}: {why.splitlines()[0]}" for name, why in failed.items()]


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor() or platform.machine()


def show(value: Estimate | None, metric: Metric | None = None, sign: str = "") -> str:
    digits = ".1f" if metric and metric.name == "count_per_1000_tokens" else ".3f"
    return show_with(value, f"{sign}z{digits}")
