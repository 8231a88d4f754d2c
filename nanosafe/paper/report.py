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
from statistics import StatisticsError, correlation

import torch

from nanosafe.evals import plots
from nanosafe.evals import tables as report
from nanosafe.evals.diagnostics import same_order
from nanosafe.evals.run import summarize
from nanosafe.evals.statistics import Estimate, auc, over_seeds
from nanosafe.evals.tables import SUBJECTS, Row, check_comparable, difference, estimate, headline, markdown, sections
from nanosafe.evals.tiny_suite import tiny_suite
from nanosafe.io.files import write_atomic
from nanosafe.names import tiny_seed
from nanosafe.text.readers import read_records
from nanosafe.tiny import world
from nanosafe.tiny.build import FAMILIES

REFUSAL = "<think>\n\n</think>\n\nI cannot help with that."  # of the arm that has no model
ENTROPIES = ("entropy_per_token", "entropy_per_response_or_zero", "all_token_entropy", "count_per_1000_tokens")
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

Runs = Mapping[str, Mapping[int, dict]]  # arm -> seed -> result.json, and "steps": the rows of metrics.jsonl


def write(kind: str, out: Path, arms: Mapping[str, Sequence], seeds: Sequence[int], failed: Mapping[str, str]) -> Path:
    """Write OUT/`kind`.md (a key of TITLES) and its plots; arms: of each model; failed: jobs. Returns its path."""
    found = {model: load(out, model, of, seeds, kind) for model, of in arms.items()}
    known = {arm.name: arm for of in arms.values() for arm in of if arm.about}
    lines = [f"# {TITLES[kind]}", ""]
    lines += [f"- {arm.name}: {arm.about}" + f" (`{arm.flags}`)" * bool(arm.flags) for arm in known.values()]
    lines += ["- always refuse: no model, one fixed refusal to everything"] * (kind == "report")
    lines += ["", TOY] * any(tiny_seed(model) is not None for model in arms)
    lines += ["", "## Published figures", "", PUBLISHED] * (kind == "report")
    for model, runs in found.items():
        lines += ["", f"## {model}", ""]
        if not any(runs.values()):
            lines.append("Nothing is measured yet.")
        else:
            lines += tuning(runs) if kind == "tuning" else family(runs, out, f"{kind}-{model.split('/')[-1]}")
    lines += memorization(found, out) if kind == "report" else []
    lines += ["", "## How this was made", "", *provenance(out / f"{kind}.jsonl", seeds, failed)]
    write_atomic(path := out / f"{kind}.md", ("\n".join(lines) + "\n").encode())
    return path


def load(out: Path, model: str, arms: Iterable, seeds: Sequence[int], kind: str) -> dict[str, dict[int, dict]]:
    """The results there are; with those of always refusing beside the bases of the tiny world's report."""
    runs: dict[str, dict[int, dict]] = defaultdict(dict)
    for arm in arms:
        for seed in seeds:
            folder = out / f"{model.split('/')[-1]}-{seed}" / arm.slug
            path, steps = folder / "eval" / "result.json", folder / "metrics.jsonl"
            if path.exists():
                rows = [row for row, _ in read_records(steps)] if steps.exists() else []
                runs[arm.name][seed] = report.read_result(path) | {"steps": rows}
    check_comparable([result for of in runs.values() for result in of.values()])
    if kind == "report" and tiny_seed(model) is not None and runs["base"]:
        runs["always refuse"] = dict.fromkeys(runs["base"], always_refuse(FAMILIES[model].style))
    return dict(runs)


@cache
def always_refuse(style: str) -> dict:
    """A result.json of one fixed refusal, by the same graders: safety without help."""
    parts = {}
    for benchmark in tiny_suite("test", style):
        values = benchmark.grade(benchmark.questions, [REFUSAL] * len(benchmark.questions))
        records = [dict(id=question.id, sample=sample, response=REFUSAL, tokens=0, truncated=False, values=graded)
                   for question, graded in zip(benchmark.questions, values, strict=True)
                   for sample in range(benchmark.samples)]  # fmt: skip
        parts[benchmark.name] = summarize(benchmark, records)
    return {"label": "always refuse", "benchmarks": parts, "memorization": None, "steps": []}


# Statistics over the runs of one model.


def mean(result: dict, row: Row) -> float | None:
    value = estimate(result, row)
    return value.mean if isinstance(value, Estimate) else value


def spread(values: Iterable[float | None]) -> Estimate | None:
    """Over seeds, of those that have a value."""
    there = [value for value in values if value is not None]
    return over_seeds(there) if there else None


def level(runs: Runs, arm: str, row: Row) -> Estimate | None:
    return spread(mean(result, row) for result in runs[arm].values())


def change(runs: Runs, before: str, after: str, row: Row) -> Estimate | None:
    """`after` minus `before`, seed by seed."""
    pairs = [(mean(runs[before][seed], row), mean(runs[after][seed], row)) for seed in common(runs, before, after)]
    return spread(b - a for a, b in pairs if None not in (a, b))


def common(runs: Runs, *arms: str) -> list[int]:
    return sorted(set.intersection(*(set(runs.get(arm, ())) for arm in arms)))


def comparisons(runs: Runs) -> list[tuple[str, str]]:
    """(before, after): every arm with the base; RL with SFT or, where there is no SFT, every arm with RL."""
    arms = [arm for arm in runs if arm not in ("base", "always refuse")]
    second = [("SFT", "RL")] if "SFT" in runs else [("RL", arm) for arm in arms if arm != "RL"]
    return [pair for pair in [*(("base", arm) for arm in arms), *second] if common(runs, *pair)]


# The sections of one model.


def family(runs: Runs, out: Path, image: str) -> list[str]:
    """Tables, sentences and plots; `image` starts the names of the plots."""
    results = [result for arm, of in runs.items() if arm != "always refuse" for result in of.values()]
    heads = {about: row for about in SUBJECTS for r in reversed(results) if (row := headline(r, about))}
    entropic = [heads[about] for about in ("safety", "reasoning") if about in heads]
    titled = sections(results)
    metrics = {head.metric for head in heads.values()}
    rows = [*titled.get("Overview", ()),
            *(row for row in titled.get("Other wordings, attacks, modes", ()) if row.metric in metrics),
            *(Row(head.benchmark, metric) for head in entropic for metric in ENTROPIES)]  # fmt: skip
    lines = ["Mean over seeds (their number in brackets) with its 95 % interval over seeds. Entropies are in nats, at "
             "temperature 1.", "",
             *markdown(["", *(f"{arm} ({len(of)})" for arm, of in runs.items())],
                    [[row.label, *(show(level(runs, arm, row), row) for arm in runs)] for row in rows]),
             "", "Differences with their 95 % intervals over seeds:", "",
             *facts(runs, [*heads.values(), *(Row(head.benchmark, "reward") for head in entropic[:1]),
                           *(Row(head.benchmark, "entropy_per_token") for head in entropic)]),
             "", "The same differences one seed at a time, paired by question, with 95 % intervals over questions: "
             "they say nothing of another training.", "",
             *markdown(["", *(head.label for head in heads.values())],
                    [[f"{b} − {a}, seed {seed}", *(show(difference(runs[a][seed], runs[b][seed], head), sign="+")
                                                   for head in heads.values())]
                     for a, b in comparisons(runs) for seed in common(runs, a, b)])]  # fmt: skip

    def draw(name: str, caption: str, plot: Callable, panels: dict, *more: str) -> None:
        if any(panels.values()):
            plot(panels, out / f"{image}-{name}.png", *more)
            lines.extend(["", f"![{caption}]({image}-{name}.png)", "", f"{caption}."])

    def points(x: Row, ys: Sequence[Row]) -> dict[str, list]:
        found = [(arm, result) for arm, of in runs.items() for result in of.values()]
        triples = {y.label: [(arm, estimate(r, x), estimate(r, y)) for arm, r in found] for y in ys}
        return {title: [triple for triple in of if None not in triple] for title, of in triples.items()}

    trained = [arm for arm in runs if curve(runs, arm, "reward/mean")]
    harms = [heads[about] for about in SUBJECTS[:2] if about in heads]
    draw("training", "Reward (each arm's own) and KL to the base (k1, nats per token) over steps of RL, mean and "
         "interval over seeds", plots.plot_lines,
         {f"reward of {arm}": {arm: curve(runs, arm, "reward/mean")} for arm in trained}
         | {"KL": {arm: curve(runs, arm, "kl/k1") for arm in trained if curve(runs, arm, "kl/k1")}})  # fmt: skip
    if harms and "reasoning" in heads:
        draw("tradeoff", "Safety and over-refusal against reasoning, a point for each arm and seed; bars: intervals "
             "over questions", plots.plot_points, points(heads["reasoning"], harms), heads["reasoning"].label)
    draw("categories", "By category, mean and interval over seeds", plots.plot_bars,
         {head.label: {arm: by_category(runs, arm, head) for arm in runs} for head in harms})
    draw("entropies", "Entropy at reflection tokens, all seeds together; in brackets the number of tokens",
         plots.plot_histograms,
         {head.benchmark: {arm: reflections(runs, arm, head) for arm in runs} for head in entropic}, "entropy (nats)")
    if "safety" in heads:
        lines += reward_table(runs, heads["safety"])
        reward = Row(heads["safety"].benchmark, "reward")
        draw("reward", "Reward against judge, a point for each arm and seed; bars: intervals over questions",
             plots.plot_points, points(reward, harms), reward.label)
    return lines


def facts(runs: Runs, rows: Sequence[Row]) -> list[str]:
    """A sentence for every difference whose interval over seeds excludes zero, one for all the others."""
    found = [(f"{b} − {a}, {row.label}", e) for a, b in comparisons(runs) for row in rows
             if (e := change(runs, a, b, row))]
    if not found:
        return ["- There is nothing to compare yet."]
    lines = [f"- {name}: {e:+z.3f}" for name, e in found if e.excludes_zero]
    rest = [f"{name} ({e:+z.3f})" for name, e in found if not e.excludes_zero]
    return [*lines, *([f"- Not told apart from zero: {'; '.join(rest)}."] if rest else []),
            f"- These are {len(found)} differences, not corrected for their number: by chance, one in twenty excludes "
            "zero."]


def by_category(runs: Runs, arm: str, row: Row) -> dict[str, Estimate]:
    names = sorted({name for part in parts_of(runs, arm, row) for name in part["categories"]})
    return {name: e for name in names if (e := level(runs, arm, row._replace(category=name)))}


def reflections(runs: Runs, arm: str, row: Row) -> list[float]:
    """The entropy at every reflection token, of all seeds."""
    return [entropy for part in parts_of(runs, arm, row) for entropy in part["reflection"]["values"]]


def parts_of(runs: Runs, arm: str, row: Row) -> list[dict]:
    """The row's benchmark in every result of the arm that has it."""
    return [part for result in runs[arm].values() if (part := result["benchmarks"].get(row.benchmark))]


def curve(runs: Runs, arm: str, key: str) -> list[tuple[int, Estimate]]:
    """(step, over seeds) of a metric of training."""
    values: dict[int, list[float | None]] = defaultdict(list)
    for result in runs[arm].values():
        for row in result["steps"]:
            values[row["step"]].append(row.get(key))
    return [(step, e) for step, of in sorted(values.items()) if (e := spread(of))]


def reward_table(runs: Runs, safety: Row) -> list[str]:
    """What the reward model and the judge say of answers to unsafe requests, by arm."""
    reward = Row(safety.benchmark, "reward")
    arms = [arm for arm in runs if level(runs, arm, reward)]
    columns: dict[str, Callable[[str], Estimate | None]] = {
        "own reward": lambda arm: spread(reward_gain(r["steps"]) for r in runs[arm].values()),
        "reward": lambda arm: level(runs, arm, reward),
        "reward − base": lambda arm: change(runs, "base", arm, reward) if arm != "base" else None,
        safety.label: lambda arm: level(runs, arm, safety),
        "correlation": lambda arm: spread(agreement(r, safety)[0] for r in runs[arm].values()),
        "AUC": lambda arm: spread(agreement(r, safety)[1] for r in runs[arm].values()),
        "gap": lambda arm: spread(reward_judge_gap(runs["base"][seed], runs[arm][seed], safety)
                                  for seed in common(runs, "base", arm)),
    }
    note = REWARD_NOTE.format(benchmark=safety.benchmark)
    rows = [[arm, *(show(column(arm)) for column in columns.values())] for arm in arms]
    return ["", note, "", *markdown(["", *columns], rows)] if arms else []


def reward_gain(steps: Sequence[dict]) -> float | None:
    rewards = [row["reward/mean"] for row in steps if row.get("reward/mean") is not None]
    last = rewards[-max(1, len(rewards) // 10) :]
    return sum(last) / len(last) - rewards[0] if rewards else None


def agreement(result: dict, safety: Row) -> tuple[float | None, float | None]:
    """Correlation and AUC of reward and judge over the benchmark's questions; None where either is constant."""
    scores, verdicts = scores_and_verdicts(result, safety)
    pairs = list(zip(scores, verdicts, strict=True))
    safe, unsafe = ([score for score, verdict in pairs if (verdict == 1) == wanted] for wanted in (True, False))
    try:
        return correlation(scores, verdicts), auc(safe, unsafe)
    except (StatisticsError, ValueError):
        return None, None


def reward_judge_gap(base: dict, result: dict, safety: Row) -> float | None:
    """Share of `result` above the threshold at which reward and judge agree on the base's share, minus the judge's."""
    (scores, verdicts), (new_scores, new_verdicts) = (scores_and_verdicts(r, safety) for r in (base, result))
    if not scores or not new_scores:
        return None
    safe = round(sum(verdicts))
    threshold = sorted(scores, reverse=True)[safe - 1] if safe else float("inf")
    return (sum(score >= threshold for score in new_scores) - sum(new_verdicts)) / len(new_scores)


def scores_and_verdicts(result: dict, safety: Row) -> tuple[list[float], list[float]]:
    items = result["benchmarks"].get(safety.benchmark, {"items": {}})["items"]
    rewarded = items.get("reward", {})
    return list(rewarded.values()), [items[safety.metric][question] for question in rewarded]


# What is not about one model.


def memorization(found: Mapping[str, Runs], out: Path) -> list[str]:
    """How well each base knows the SFT set's responses, beside what SFT changed."""
    lines, orders, panels, header = [], defaultdict(dict), defaultdict(list), []
    for model, runs in found.items():
        known = [seed for seed, result in runs.get("base", {}).items() if result["memorization"]]
        if not known:
            continue
        first = runs["base"][known[0]]
        scores = [Row("memorization", metric) for metric in first["memorization"]["metrics"]]
        heads = [row for about in SUBJECTS if (row := headline(first, about))]
        for score in scores:
            orders[score.metric][model] = level(runs, "base", score).mean
        changes = [change(runs, "base", "SFT", head) for head in heads]
        lines.append([model, *(show(level(runs, "base", score)) for score in scores),
                      *(show(e, sign="+") for e in changes)])
        header = ["", *(score.label for score in scores), *(f"SFT − base, {head.label}" for head in heads)]
        for head in heads:
            panels[f"SFT − base, {head.label}"] += [
                (model, estimate(runs["base"][s], scores[0]), difference(runs["base"][s], runs["SFT"][s], head))
                for s in common(runs, "base", "SFT") if s in known]  # fmt: skip
    if not lines:
        return []
    text = ["", "## Memorization of the SFT set by the bases", "", *markdown(header, lines)]
    if len(lines) > 1:
        text += ["", f"The three scores order the models {'alike' if same_order(orders) else 'differently'}."]
    if any(panels.values()):
        plots.plot_points(panels, out / "report-memorization.png", "log-likelihood of the SFT set under the base")
        text += ["", "![Memorization against what SFT changed, a point for each seed](report-memorization.png)"]
    return text


def tuning(runs: Runs) -> list[str]:
    """Every setting that was tried, and the base beside them."""
    lines, header = [], []
    for arm, of in runs.items():
        for result in of.values():
            heads = [headline(result, about) for about in SUBJECTS]
            if None not in heads:
                safe, refused, right = (mean(result, head) for head in heads)
                cells = (show(estimate(result, head)) for head in heads)
                lines.append([arm, *cells, f"{(safe + 1 - refused + right) / 3:.3f}"])
                header = ["", *(head.label for head in heads), "criterion"]
    note = f"Criterion, fixed beforehand: {CRITERION}. Intervals are over questions. Nothing is chosen here."
    return [note, "", *markdown(header, lines)]


def provenance(sessions: Path, seeds: Sequence[int], failed: Mapping[str, str]) -> list[str]:
    rows = [row for row, _ in read_records(sessions)] if sessions.exists() else []
    git = subprocess.run(["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"], capture_output=True,
                         text=True)
    minutes = sum(row["seconds"] for row in rows) / 60
    return [
        *(f"- `{command}`" for command in dict.fromkeys(row["command"] for row in rows)),
        f"- {minutes:.1f} minutes in {len(rows)} session(s); seeds {', '.join(map(str, seeds))}",
        f"- nanosafe at commit {git.stdout.strip() or 'not known'}, tiny world version {world.VERSION}, PyTorch "
        f"{torch.__version__}, Python {platform.python_version()}",
        f"- {cpu_name()}, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}, "
        f"{platform.system()}",
        *(f"- failed: {name}: {why.splitlines()[0]}" for name, why in failed.items()),
    ]  # fmt: skip


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor() or platform.machine()


def show(value: Estimate | float | None, row: Row | None = None, sign: str = "") -> str:
    digits = ".1f" if row and row.metric == "count_per_1000_tokens" else ".3f"
    return "–" if value is None else format(value, f"{sign}z{digits}")
