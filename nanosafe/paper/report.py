"""What python -m nanosafe.paper writes: report.md, ablations.md or tuning.md, with plots, from what is there so far.

Everything is read from OUT/MODEL-SEED/ARM: eval/result.json and, of an RL arm, metrics.jsonl. Sentences are made from
numbers. Intervals are over seeds (would another training come out alike?) but for those of plots with a point for each
seed, and of the settings that are tried: these are over questions (would other questions?).
"""

import platform
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch

from nanosafe.evals.diagnostics import same_order
from nanosafe.evals.results import POOLED, SUBJECTS, Metric, Result, check_comparable, estimate, headlines, read_result
from nanosafe.evals.scores import summarize
from nanosafe.evals.statistics import Estimate
from nanosafe.evals.tables import label, markdown, sections, show
from nanosafe.evals.tiny_suite import tiny_suite
from nanosafe.io.files import write_atomic
from nanosafe.io.machine import cpu_name
from nanosafe.names import tiny_seed
from nanosafe.paper.findings import ENTROPY, NOTE, findings
from nanosafe.paper.pictures import arms_picture, categories_picture, entropies_picture, training_picture
from nanosafe.paper.runs import (
    REFUSING,
    Run,
    Runs,
    agreement,
    change,
    comparisons,
    level,
    over_known,
    results_of,
    reward_gain,
    reward_judge_gap,
)
from nanosafe.text.readers import read_records
from nanosafe.tiny import world
from nanosafe.tiny.build import FAMILIES

REFUSAL = "<think>\n\n</think>\n\nI cannot help with that."  # of the arm that has no model
TITLES = {
    "report": "SFT and RL for safety, side by side",
    "ablations": "What each part of RL does",
    "tuning": "Settings tried on the validation split",
}
CRITERION = ("mean of the share of safe answers, 1 − over-refusal and the share of right answers in "
             "arithmetic")
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


def write(kind: str, out: Path, arms: Mapping[str, Sequence], seeds: Sequence[int],
          failed: Mapping[str, str]) -> Path:
    """Write OUT/`kind`.md (a key of TITLES) and its plots; arms: of each model; failed: jobs. Returns its path."""
    found = {model: load(out, model, of_model, seeds, kind) for model, of_model in arms.items()}
    lines = [f"# {TITLES[kind]}"]
    if kind == "report":
        lines += ["", "## Findings", "", NOTE, "", *findings(found)]
    if kind != "tuning":
        lines += [*arms_picture(found, out / f"{kind}-arms.png"), "", "## Arms"]
    lines += ["", *legend(kind, arms)]
    if any(tiny_seed(model) is not None for model in arms):
        lines += ["", TOY]
    if kind == "report":
        lines += ["", "## Published figures", "", PUBLISHED]
    for model, runs in found.items():
        lines += ["", f"## {model}", ""]
        if not any(runs.values()):
            lines.append("Nothing is measured yet.")
        elif kind == "tuning":
            lines += tuning(runs)
        else:
            lines += family(runs, out, f"{kind}-{model.split('/')[-1]}")
    if kind == "report":
        lines += memorization(found)
    lines += ["", "## How this was made", "", *provenance(out / f"{kind}.jsonl", seeds, failed)]
    path = out / f"{kind}.md"
    write_atomic(path, ("\n".join(lines) + "\n").encode())
    return path


def legend(kind: str, arms: Mapping[str, Sequence]) -> list[str]:
    """A line for every arm, whichever models have it."""
    lines: dict[str, str] = {}
    for of_model in arms.values():
        for arm in of_model:
            if arm.about:
                flags = f" (`{arm.flags}`)" if arm.flags else ""
                lines[arm.name] = f"- {arm.name}: {arm.about}{flags}"
    if kind == "report":
        lines[REFUSING] = f"- {REFUSING}: no model, one fixed refusal to everything"
    return list(lines.values())


def load(out: Path, model: str, arms: Iterable, seeds: Sequence[int],
         kind: str) -> dict[str, dict[int, Run]]:
    """The runs there are; in the tiny world's report with always refusing beside each base."""
    runs: dict[str, dict[int, Run]] = defaultdict(dict)
    for arm in arms:
        for seed in seeds:
            folder = out / f"{model.split('/')[-1]}-{seed}" / arm.slug
            path, steps = folder / "eval" / "result.json", folder / "metrics.jsonl"
            if path.exists():
                runs[arm.name][seed] = Run(read_result(path), read_rows(steps))
    check_comparable([result for _, result in results_of(runs)])
    if kind == "report" and tiny_seed(model) is not None and runs["base"]:
        refusing = Run(always_refuse(FAMILIES[model].style))
        runs[REFUSING] = dict.fromkeys(runs["base"], refusing)
    return dict(runs)


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSON-lines file that may be missing."""
    return [row for row, _ in read_records(path)] if path.exists() else []


@cache
def always_refuse(style: str) -> Result:
    """The result of one fixed refusal, by the same graders: safety without help."""
    benchmarks = {}
    for benchmark in tiny_suite("test", style):
        records = []
        graded = benchmark.grade(benchmark.questions, [REFUSAL] * len(benchmark.questions))
        for question, verdict in zip(benchmark.questions, graded, strict=True):
            record = dict(id=question.id, response=REFUSAL, tokens=0, truncated=False,
                          values=verdict)
            records += [record] * benchmark.samples
        benchmarks[benchmark.name] = summarize(benchmark, records)
    return Result(REFUSING, benchmarks)


# The sections of one model.


def family(runs: Runs, out: Path, image: str) -> list[str]:
    """Tables, sentences and plots; `image` starts the names of the plots."""
    # Always refusing has no entropies, rewards or thoughts, and so says nothing of the table's rows.
    trained = [result for arm, result in results_of(runs) if arm != REFUSING]
    heads = headlines(trained)
    harms = [heads[about] for about in ("safety", "over-refusal") if about in heads]
    lines = ["Mean over seeds (their number in brackets) with its 95 % interval over seeds. "
             "Entropies are in nats, at temperature 1. In pictures, an interval that leaves its axis is "
             "cut off there.", "", *levels(runs, sections(trained), heads)]
    compared = list(heads.values())
    for about, name in (("safety", "reward"), ("safety", "entropy_per_token"),
                        ("reasoning", "entropy_per_token")):
        if about in heads:
            compared.append(heads[about]._replace(name=name))
    lines += ["", "Differences with their 95 % intervals over seeds:", "", *facts(runs, compared)]

    lines += training_picture(runs, out / f"{image}-training.png")
    if harms:
        lines += categories_picture(runs, harms, out / f"{image}-categories.png")
    inner = [heads[about]._replace(name=ENTROPY) for about in ("safety", "reasoning") if about in heads]
    lines += entropies_picture(runs, inner, out / f"{image}-entropies.png")
    if "safety" in heads:
        lines += reward_table(runs, heads["safety"])
    return lines


def levels(runs: Runs, titled: Mapping[str, Sequence[Metric]],
           heads: Mapping[str, Metric]) -> list[str]:
    """The table of all arms: the overview, the headlines of variations, entropies.

    titled: the sections of the arms' results.
    """
    metrics = list(titled.get("Overview", ()))
    names = [head.name for head in heads.values()]
    for metric in titled.get("Other wordings, attacks, modes", ()):
        if metric.name in names:
            metrics.append(metric)
    for about in ("safety", "reasoning"):
        if about in heads:
            metrics += [heads[about]._replace(name=name) for name in POOLED]
    rows = []
    for metric in metrics:
        spec = "z.1f" if metric.name == "count_per_1000_tokens" else "z.3f"
        rows.append([label(metric), *(cell(level(runs, arm, metric), spec) for arm in runs)])
    header = ["", *(f"{arm} ({len(by_seed)})" for arm, by_seed in runs.items())]
    return markdown(header, rows)


def cell(value: Estimate | None, spec: str = "z.3f") -> str:
    """`show` where the number of runs is in the heading: a single one is not said in every cell again."""
    if value is not None and value.low is None:
        return format(value.mean, spec)
    return show(value, spec)


def facts(runs: Runs, metrics: Sequence[Metric]) -> list[str]:
    """A sentence for every difference whose interval over seeds excludes zero, one for all the others."""
    lines, open_ones, has_interval = [], [], False
    for a, b in comparisons(runs):
        for metric in metrics:
            delta = change(runs, a, b, metric)
            if delta is None:
                continue
            has_interval = has_interval or delta.low is not None
            if delta.excludes_zero:
                lines.append(f"- {b} − {a}, {label(metric)}: {delta:+z.3f}")
            else:
                open_ones.append(f"{b} − {a}, {label(metric)} ({delta:+z.3f})")
    count = len(lines) + len(open_ones)
    if not count:
        return ["- There is nothing to compare yet."]
    if not has_interval:
        return ["- There is one seed: by one, no difference can be told apart from another training's."]
    if open_ones:
        lines.append(f"- Not told apart from zero: {'; '.join(open_ones)}.")
    lines.append(f"- These are {count} differences, not corrected for their number: by chance, one "
                 "in twenty excludes zero.")
    return lines


def reward_table(runs: Runs, safety: Metric) -> list[str]:
    """What the reward model and the judge say of answers to unsafe requests, by arm."""
    reward = safety._replace(name="reward")
    header = ["", "own reward", "reward", "reward − base", label(safety), "correlation", "AUC",
              "gap"]
    rows = []
    for arm, by_seed in runs.items():
        if level(runs, arm, reward) is None:
            continue
        gains, correlations, areas, gaps = [], [], [], []
        for seed, run in by_seed.items():
            gains.append(reward_gain(run.steps))
            correlation, area = agreement(run.result, safety)
            correlations.append(correlation)
            areas.append(area)
            if seed in runs.get("base", {}):
                gaps.append(reward_judge_gap(runs["base"][seed].result, run.result, safety))
        cells = [
            over_known(gains),
            level(runs, arm, reward),
            None if arm == "base" else change(runs, "base", arm, reward),
            level(runs, arm, safety),
            over_known(correlations),
            over_known(areas),
            over_known(gaps),
        ]
        rows.append([arm, *map(cell, cells)])
    if not rows:
        return []
    return ["", REWARD_NOTE.format(benchmark=safety.benchmark), "", *markdown(header, rows)]


# What is not about one model.


def memorization(found: Mapping[str, Runs]) -> list[str]:
    """How well each base knows the SFT set's responses, beside what SFT changed."""
    rows, header = [], []
    orders: dict[str, dict[str, float]] = defaultdict(dict)  # metric -> model -> score
    for model, runs in found.items():
        bases = [result for arm, result in results_of(runs) if arm == "base"]
        scores = sections(bases).get("Memorization")
        if not scores:
            continue
        heads = headlines(bases).values()
        cells = [model]
        for score in scores:
            known = level(runs, "base", score)
            orders[score.name][model] = known.mean
            cells.append(show(known))
        for head in heads:
            cells.append(show(change(runs, "base", "SFT", head), "+z.3f"))
        rows.append(cells)
        header = ["", *map(label, scores), *(f"SFT − base, {label(head)}" for head in heads)]
    if not rows:
        return []
    lines = ["", "## Memorization of the SFT set by the bases", "", *markdown(header, rows)]
    if len(rows) > 1:
        alike = "alike" if same_order(orders) else "differently"
        lines += ["", f"The three scores order the models {alike}."]
    return lines


def tuning(runs: Runs) -> list[str]:
    """Every setting that was tried, and the base beside them."""
    rows, header = [], []
    for arm, result in results_of(runs):
        heads = headlines([result])
        if len(heads) == len(SUBJECTS):
            safe, refused, right = [estimate(result, head) for head in heads.values()]
            criterion = (safe.mean + 1 - refused.mean + right.mean) / 3
            rows.append([arm, *map(show, (safe, refused, right)), f"{criterion:.3f}"])
            header = ["", *map(label, heads.values()), "criterion"]
    note = (f"Criterion, fixed beforehand: {CRITERION}. Intervals are over questions. Nothing is "
            "chosen here.")
    return [note, "", *markdown(header, rows)]


def provenance(sessions: Path, seeds: Sequence[int], failed: Mapping[str, str]) -> list[str]:
    rows = read_rows(sessions)
    commits = dict.fromkeys(row.get("commit", "not known") for row in rows)
    minutes = sum(row["seconds"] for row in rows) / 60
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    lines = list(dict.fromkeys(f"- `{row['command']}`" for row in rows))
    lines += [
        f"- {minutes:.1f} minutes in {len(rows)} session(s); seeds {', '.join(map(str, seeds))}",
        f"- nanosafe at commit {', '.join(commits)}, tiny world version {world.VERSION}, "
        f"PyTorch {torch.__version__}, Python {platform.python_version()}",
        f"- {cpu_name()}, {gpu}, {platform.system()}",
    ]
    for name, why in failed.items():
        lines.append(f"- failed: {name}: {why.splitlines()[0]}")
    return lines


def commit() -> str:
    """Of this code, "-dirty" where files differ from it."""
    describe = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or "not known"
