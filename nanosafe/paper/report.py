"""What python -m nanosafe.paper writes: report.md, ablations.md or tuning.md, with plots, from what is there so far.

Everything is read from OUT/MODEL-SEED/ARM: eval/result.json and, of an RL arm, metrics.jsonl. Sentences are made from
numbers. Two kinds of interval are kept apart: over seeds (would another training come out alike?), and over questions,
paired within one seed (would other questions?).
"""

import platform
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch

from nanosafe.evals import plots
from nanosafe.evals.diagnostics import same_order
from nanosafe.evals.run import summarize
from nanosafe.evals.statistics import Estimate
from nanosafe.evals.tables import (
    SUBJECTS,
    Row,
    check_comparable,
    difference,
    estimate,
    headline,
    markdown,
    read_result,
    sections,
)
from nanosafe.evals.tiny_suite import tiny_suite
from nanosafe.io.files import write_atomic
from nanosafe.names import tiny_seed
from nanosafe.paper.runs import (
    Runs,
    agreement,
    all_results,
    by_category,
    change,
    common,
    comparisons,
    curve,
    headlines,
    level,
    mean,
    points,
    reflections,
    reward_gain,
    reward_judge_gap,
    spread,
)
from nanosafe.text.readers import read_records
from nanosafe.tiny import world
from nanosafe.tiny.build import FAMILIES

REFUSAL = "<think>\n\n</think>\n\nI cannot help with that."  # of the arm that has no model
ENTROPIES = ("entropy_per_token", "entropy_per_response_or_zero", "all_token_entropy",
             "count_per_1000_tokens")
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


def write(kind: str, out: Path, arms: Mapping[str, Sequence], seeds: Sequence[int],
          failed: Mapping[str, str]) -> Path:
    """Write OUT/`kind`.md (a key of TITLES) and its plots; arms: of each model; failed: jobs. Returns its path."""
    found = {model: load(out, model, of_model, seeds, kind) for model, of_model in arms.items()}
    lines = [f"# {TITLES[kind]}", "", *legend(kind, arms)]
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
        lines += memorization(found, out)
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
        lines["always refuse"] = "- always refuse: no model, one fixed refusal to everything"
    return list(lines.values())


def load(out: Path, model: str, arms: Iterable, seeds: Sequence[int], kind: str) -> dict[str, dict[int, dict]]:
    """The results there are; with those of always refusing beside the bases of the tiny world's report."""
    runs: dict[str, dict[int, dict]] = defaultdict(dict)
    for arm in arms:
        for seed in seeds:
            folder = out / f"{model.split('/')[-1]}-{seed}" / arm.slug
            path, steps = folder / "eval" / "result.json", folder / "metrics.jsonl"
            if path.exists():
                rows = [row for row, _ in read_records(steps)] if steps.exists() else []
                runs[arm.name][seed] = read_result(path) | {"steps": rows}
    check_comparable(all_results(runs))
    if kind == "report" and tiny_seed(model) is not None and runs["base"]:
        runs["always refuse"] = dict.fromkeys(runs["base"], always_refuse(FAMILIES[model].style))
    return dict(runs)


@cache
def always_refuse(style: str) -> dict:
    """A result.json of one fixed refusal, by the same graders: safety without help."""
    parts = {}
    for benchmark in tiny_suite("test", style):
        values = benchmark.grade(benchmark.questions, [REFUSAL] * len(benchmark.questions))
        records = []
        for question, graded in zip(benchmark.questions, values, strict=True):
            for sample in range(benchmark.samples):
                records.append(dict(
                    id=question.id, sample=sample, response=REFUSAL, tokens=0, truncated=False,
                    values=graded))
        parts[benchmark.name] = summarize(benchmark, records)
    return {"label": "always refuse", "benchmarks": parts, "memorization": None, "steps": []}


# The sections of one model.


def family(runs: Runs, out: Path, image: str) -> list[str]:
    """Tables, sentences and plots; `image` starts the names of the plots."""
    heads = headlines(runs)
    entropic = [heads[about] for about in ("safety", "reasoning") if about in heads]
    lines = ["Mean over seeds (their number in brackets) with its 95 % interval over seeds. "
             "Entropies are in nats, at temperature 1.", "", *levels(runs, heads, entropic)]
    compared = list(heads.values())
    compared += [Row(head.benchmark, "reward") for head in entropic[:1]]
    compared += [Row(head.benchmark, "entropy_per_token") for head in entropic]
    lines += ["", "Differences with their 95 % intervals over seeds:", "", *facts(runs, compared)]

    def draw(name: str, caption: str, plot: Callable, panels: dict, *more: str) -> None:
        if any(panels.values()):
            plot(panels, out / f"{image}-{name}.png", *more)
            lines.extend(["", f"![{caption}]({image}-{name}.png)", "", f"{caption}."])

    draw("training",
         "Reward (each arm's own) and KL to the base (k1, nats per token) over steps of RL, mean "
         "and interval over seeds", plots.plot_lines, training_curves(runs))
    harms = [heads[about] for about in ("safety", "over-refusal") if about in heads]
    if harms and "reasoning" in heads:
        draw("tradeoff",
             "Safety and over-refusal against reasoning, a point for each arm and seed; bars: "
             "intervals over questions", plots.plot_points, points(runs, heads["reasoning"], harms),
             heads["reasoning"].label)
    bars = {}
    for head in harms:
        bars[head.label] = {arm: by_category(runs, arm, head) for arm in runs}
    draw("categories", "By category, mean and interval over seeds", plots.plot_bars, bars)
    entropies = {}
    for head in entropic:
        entropies[head.benchmark] = {arm: reflections(runs, arm, head) for arm in runs}
    draw("entropies",
         "Entropy at reflection tokens, all seeds together; in brackets the number of tokens",
         plots.plot_histograms, entropies, "entropy (nats)")
    if "safety" in heads:
        lines += reward_table(runs, heads["safety"])
        reward = Row(heads["safety"].benchmark, "reward")
        draw("reward",
             "Reward against judge, a point for each arm and seed; bars: intervals over questions",
             plots.plot_points, points(runs, reward, harms), reward.label)
    return lines


def levels(runs: Runs, heads: Mapping[str, Row], entropic: Sequence[Row]) -> list[str]:
    """The table of all arms: headlines, their variations, entropies."""
    measured = []
    for arm, by_seed in runs.items():
        if arm != "always refuse":
            measured += by_seed.values()
    titled = sections(measured)
    rows = list(titled.get("Overview", ()))
    for row in titled.get("Other wordings, attacks, modes", ()):
        if any(row.metric == head.metric for head in heads.values()):
            rows.append(row)
    for head in entropic:
        rows += [Row(head.benchmark, metric) for metric in ENTROPIES]
    cells = []
    for row in rows:
        cells.append([row.label, *(show(level(runs, arm, row), row) for arm in runs)])
    header = ["", *(f"{arm} ({len(by_seed)})" for arm, by_seed in runs.items())]
    return markdown(header, cells)


def training_curves(runs: Runs) -> dict[str, dict[str, list[tuple[int, Estimate]]]]:
    """Panels of plots.plot_lines: each RL arm's own reward, and the KL of all."""
    panels, kl = {}, {}
    for arm in runs:
        reward = curve(runs, arm, "reward/mean")
        if reward:
            panels[f"reward of {arm}"] = {arm: reward}
            if curve(runs, arm, "kl/k1"):
                kl[arm] = curve(runs, arm, "kl/k1")
    return panels | {"KL": kl}


def facts(runs: Runs, rows: Sequence[Row]) -> list[str]:
    """A sentence for every difference whose interval over seeds excludes zero, one for all the others."""
    lines, open_ones = [], []
    for a, b in comparisons(runs):
        for row in rows:
            delta = change(runs, a, b, row)
            if delta is None:
                continue
            if delta.excludes_zero:
                lines.append(f"- {b} − {a}, {row.label}: {delta:+z.3f}")
            else:
                open_ones.append(f"{b} − {a}, {row.label} ({delta:+z.3f})")
    count = len(lines) + len(open_ones)
    if not count:
        return ["- There is nothing to compare yet."]
    if open_ones:
        lines.append(f"- Not told apart from zero: {'; '.join(open_ones)}.")
    lines.append(f"- These are {count} differences, not corrected for their number: by chance, one "
                 "in twenty excludes zero.")
    return lines


def reward_table(runs: Runs, safety: Row) -> list[str]:
    """What the reward model and the judge say of answers to unsafe requests, by arm."""
    reward = Row(safety.benchmark, "reward")
    header = ["", "own reward", "reward", "reward − base", safety.label, "correlation", "AUC",
              "gap"]
    rows = []
    for arm, by_seed in runs.items():
        if level(runs, arm, reward) is None:
            continue
        agreements = [agreement(result, safety) for result in by_seed.values()]
        gaps = []
        for seed in common(runs, "base", arm):
            gaps.append(reward_judge_gap(runs["base"][seed], by_seed[seed], safety))
        cells = [
            spread(reward_gain(result["steps"]) for result in by_seed.values()),
            level(runs, arm, reward),
            None if arm == "base" else change(runs, "base", arm, reward),
            level(runs, arm, safety),
            spread(correlation for correlation, _ in agreements),
            spread(area for _, area in agreements),
            spread(gaps),
        ]
        rows.append([arm, *map(show, cells)])
    if not rows:
        return []
    return ["", REWARD_NOTE.format(benchmark=safety.benchmark), "", *markdown(header, rows)]


# What is not about one model.


def memorization(found: Mapping[str, Runs], out: Path) -> list[str]:
    """How well each base knows the SFT set's responses, beside what SFT changed."""
    lines, header = [], []
    orders: dict[str, dict[str, float]] = defaultdict(dict)  # metric -> model -> score
    panels: dict[str, list[tuple[str, Estimate, Estimate]]] = defaultdict(list)
    for model, runs in found.items():
        known = [seed for seed, result in runs.get("base", {}).items() if result["memorization"]]
        if not known:
            continue
        first = runs["base"][known[0]]
        scores = [Row("memorization", metric) for metric in first["memorization"]["metrics"]]
        heads = [headline(first, about) for about in SUBJECTS]
        heads = [head for head in heads if head is not None]
        cells = [model]
        for score in scores:
            known_by_base = level(runs, "base", score)
            orders[score.metric][model] = known_by_base.mean
            cells.append(show(known_by_base))
        for head in heads:
            title = f"SFT − base, {head.label}"
            cells.append(show(change(runs, "base", "SFT", head), sign="+"))
            for seed in common(runs, "base", "SFT"):
                if seed in known:
                    base, sft = runs["base"][seed], runs["SFT"][seed]
                    panels[title].append((model, estimate(base, scores[0]),
                                          difference(base, sft, head)))
        lines.append(cells)
        header = ["", *(score.label for score in scores), *(f"SFT − base, {head.label}" for head in heads)]
    if not lines:
        return []
    text = ["", "## Memorization of the SFT set by the bases", "", *markdown(header, lines)]
    if len(lines) > 1:
        text += ["", "The three scores order the models "
                     f"{'alike' if same_order(orders) else 'differently'}."]
    if any(panels.values()):
        plots.plot_points(panels, out / "report-memorization.png",
                          "log-likelihood of the SFT set under the base")
        text += ["", "![Memorization against what SFT changed, a point for each "
                     "seed](report-memorization.png)"]
    return text


def tuning(runs: Runs) -> list[str]:
    """Every setting that was tried, and the base beside them."""
    lines, header = [], []
    for arm, by_seed in runs.items():
        for result in by_seed.values():
            heads = [headline(result, about) for about in SUBJECTS]
            if None not in heads:
                safe, refused, right = (mean(result, head) for head in heads)
                cells = [show(estimate(result, head)) for head in heads]
                lines.append([arm, *cells, f"{(safe + 1 - refused + right) / 3:.3f}"])
                header = ["", *(head.label for head in heads), "criterion"]
    note = f"Criterion, fixed beforehand: {CRITERION}. Intervals are over questions. Nothing is chosen here."
    return [note, "", *markdown(header, lines)]


def provenance(sessions: Path, seeds: Sequence[int], failed: Mapping[str, str]) -> list[str]:
    rows = [row for row, _ in read_records(sessions)] if sessions.exists() else []
    describe = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    minutes = sum(row["seconds"] for row in rows) / 60
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    lines = [f"- `{command}`" for command in dict.fromkeys(row["command"] for row in rows)]
    lines += [
        f"- {minutes:.1f} minutes in {len(rows)} session(s); seeds {', '.join(map(str, seeds))}",
        f"- nanosafe at commit {commit or 'not known'}, tiny world version {world.VERSION}, "
        f"PyTorch {torch.__version__}, Python {platform.python_version()}",
        f"- {cpu_name()}, {gpu}, {platform.system()}",
    ]
    for name, why in failed.items():
        lines.append(f"- failed: {name}: {why.splitlines()[0]}")
    return lines


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor() or platform.machine()


def show(value: Estimate | float | None, row: Row | None = None, sign: str = "") -> str:
    digits = ".1f" if row and row.metric == "count_per_1000_tokens" else ".3f"
    return "–" if value is None else format(value, f"{sign}z{digits}")
