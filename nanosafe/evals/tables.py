"""Results side by side, with paired differences: markdown tables, and text for the terminal.

The first result is the base, and the others are compared with it question by question. Safety never stands without
over-refusal beside it: the first table holds both, and reasoning.
"""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from nanosafe.evals.results import (
    DIAGNOSTICS,
    MEMORIZATION,
    SUBJECTS,
    BenchmarkResult,
    Metric,
    Result,
    categories,
    check_comparable,
    difference,
    estimate,
    mean,
    values,
)
from nanosafe.evals.statistics import Estimate
from nanosafe.io.files import write_atomic

LABELS = {
    "safe": "safe answer",
    "harmful": "harmful answer",
    "right": "right answer",
    "over_refusal": "over-refusal",
    "thought_gap": "harmful thought minus harmful answer",
    "harmful_thought_only": "harmful thought, harmless answer",
    "unclosed_thought": "no </think>",
    "min_k_plus_plus": "Min-K%++",
    "token_entropy": "entropy, mean over responses",
    "all_token_entropy": "entropy, mean over all tokens",
    "reflection_entropy": "reflection entropy, mean over responses",
    "entropy_per_token": "reflection entropy, mean over tokens",
    "entropy_per_response_or_zero": "reflection entropy, mean over responses, 0 without",
    "count_per_1000_tokens": "reflection tokens per 1,000",
}
NOTE = (
    "Mean over questions with its 95 % interval. Differences are to the first model, over the "
    "questions that both have; * marks an interval that excludes zero, which one row in twenty does "
    "by chance. Each model is one training run: nothing here says how another seed would turn out."
)
WIDTH = 100  # columns of a terminal
# What a score may hide.
FORM = {"truncated": "cut off", "unclosed_thought": "no </think>", "unjudged": "unjudged"}


def label(metric: Metric) -> str:
    asked = f"{metric.benchmark} ({metric.category})" if metric.category else metric.benchmark
    return f"{asked}: {LABELS.get(metric.name, metric.name.replace('_', ' '))}"


def sections(results: Sequence[Result]) -> dict[str, list[Metric]]:
    """The table's rows by section, in order; a result that lacks some has empty cells there."""
    # Benchmark -> the first result that has it, which says what metrics there are.
    first: dict[str, Result] = {}
    for result in results:
        for name in result.benchmarks:
            first.setdefault(name, result)
    overview, by_category, variations, others, diagnostics, endings = [], [], [], [], [], []
    for about in SUBJECTS:
        for name, result in first.items():
            measured = result.benchmarks[name]
            if measured.about != about:
                continue
            headline = Metric(name, measured.headline)
            passes = [metric for metric in measured.metrics if metric.startswith("pass@")]
            shown = metrics_of(name, [measured.headline, *measured.shown, *passes[-1:]])
            # Of a variation, what the responses look like is enough: the rest is the original's.
            if measured.variation:
                variations += shown
                endings += metrics_of(name, ["truncated", "unclosed_thought"])
                continue
            overview += shown
            names = categories(result, headline)
            if len(names) > 1:
                by_category += [headline._replace(category=category) for category in names]
            others += metrics_of(name, measured.metrics)
            form = [metric for metric in DIAGNOSTICS if metric in measured.scores]
            diagnostics += metrics_of(name, [*form, *measured.pooled])
    memorized = []
    if MEMORIZATION in first:
        scores = first[MEMORIZATION].benchmarks[MEMORIZATION].scores
        memorized = metrics_of(MEMORIZATION, scores)
    rows = {
        "Overview": overview,
        "By category": by_category,
        "Other wordings, attacks, modes": variations,
        "Other metrics": [metric for metric in others if metric not in overview],
        "Diagnostics": diagnostics + endings,
        "Memorization": memorized,
    }
    found = {}
    for title, metrics in rows.items():
        there = [metric for metric in metrics if is_measured(metric, results)]
        if there:
            found[title] = there
    return found


def metrics_of(benchmark: str, names: Iterable[str]) -> list[Metric]:
    return [Metric(benchmark, name) for name in names]


def is_measured(metric: Metric, results: Sequence[Result]) -> bool:
    return any(mean(result, metric) is not None for result in results)


def table(results: Sequence[Result]) -> str:
    """Markdown: one table a section, a column for each result and one for its difference.

    Raises what check_comparable raises.
    """
    check_comparable(results)
    base, *arms = results
    header = ["", base.label]
    for arm in arms:
        header += [arm.label, f"{arm.label} − {base.label}"]
    lines = []
    for title, metrics in sections(results).items():
        rows = [_cells(results, metric) for metric in metrics]
        lines += ["", f"**{title}**", "", *markdown([*header, "n"], rows)]
    lines += ["", *(f"- {note}" for note in notes(results)), "", NOTE]
    return "\n".join(lines)


def write_table(results: Sequence[Result], folder: Path, title: str = "") -> None:
    """Write the tables and the protocols to table.md."""
    text = f"{title}\n\n{table(results)}\n\n**Protocol**\n\n{protocols(results)}\n"
    write_atomic(folder / "table.md", text.lstrip().encode())


def terminal(results: Sequence[Result], titles: Sequence[str]) -> str:
    """The sections `titles` and the protocols as text, at most WIDTH columns wide.

    A line holds a row of the tables or, of several results, a row has a line for each of them below its name. Raises
    what check_comparable raises.
    """
    check_comparable(results)
    base, *arms = results
    width = 44 if arms else 72  # of names; then come a number with its interval, and a difference
    head = f"minus {base.label}"[:28] if arms else ""
    lines = [_line("", width, "mean, 95 % interval", head)]
    for title, metrics in sections(results).items():
        if title not in titles:
            continue
        lines += ["", f"**{title}**"]
        for metric in metrics:
            name, value, *others, _ = _cells(results, metric)
            if not arms:
                lines.append(_line(name, width, value))
                continue
            lines += [_line(name, WIDTH), _line(f"  {base.label}", width, value)]
            for arm, arm_value, change in zip(arms, others[::2], others[1::2], strict=True):
                lines.append(_line(f"  {arm.label}", width, arm_value, change))
    # Sentences are wrapped; the rows above are cut to the width.
    below = ["", *notes(results), ""]
    if arms:
        below += [NOTE, ""]
    for line in [*below, *protocols(results).splitlines()]:
        lines.append(textwrap.fill(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False))
    return "\n".join(lines)


def _line(name: str, width: int, value: str = "", change: str = "") -> str:
    """The name in `width` columns, the last two blank; a long one keeps both ends, which tell most."""
    if len(name) > width - 2:
        half = width // 2
        name = f"{name[: half - 1]}…{name[half + 2 - width :]}"
    return f"{name:<{width}}{value:<28}{change}".rstrip()


def notes(results: Sequence[Result]) -> list[str]:
    """A line for each headline that hides something: responses that were cut off, never closed their thought or found
    no verdict, and the bounds of the score whatever verdict these had."""
    lines = []
    for result in results:
        for name, measured in result.benchmarks.items():
            hidden = []
            for metric, words in FORM.items():
                share = mean(result, Metric(name, metric))
                if share:
                    hidden.append(f"{words} {share:.1%}")
            if measured.bounds:
                low, high = measured.bounds
                headline = LABELS.get(measured.headline, measured.headline)
                hidden.append(f"{headline} {low:.3f} to {high:.3f}, however the unjudged come out")
            if hidden:
                lines.append(f"{result.label}, {name}: {', '.join(hidden)}")
    return lines


def _cells(results: Sequence[Result], metric: Metric) -> list[str]:
    """Label, the first result's estimate, each other's with its difference, and the numbers of questions."""
    spec = "z.1f" if metric.name in ("tokens", "count_per_1000_tokens") else "z.3f"
    base, *arms = results
    cells = [label(metric), show(estimate(base, metric), spec)]
    for arm in arms:
        change = difference(base, arm, metric)
        mark = " *" if isinstance(change, Estimate) and change.excludes_zero else ""
        cells += [show(estimate(arm, metric), spec), show(change, f"+{spec}") + mark]
    counts = []
    for result in results:
        count = len(values(result, metric))
        if count and str(count) not in counts:
            counts.append(str(count))
    return [*cells, "/".join(counts)]


def show(value: Estimate | float | None, spec: str = "z.3f") -> str:
    return "–" if value is None else format(value, spec)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = []
    for cells in [header, ["---"] * len(header), *rows]:
        row = " | ".join(cell.replace("|", "/") for cell in cells)
        lines.append(f"| {row} |")
    return lines


def protocols(results: Sequence[Result]) -> str:
    """A line for every protocol, with the benchmarks it was for and, where not for all results, with theirs."""
    labels: dict[tuple[str, str], list[str]] = {}  # (benchmark, protocol) -> results
    overlaps = []
    for result in results:
        for name, measured in result.benchmarks.items():
            if name == MEMORIZATION:
                continue
            labels.setdefault((name, _protocol(measured)), []).append(result.label)
            if measured.seen:
                metric = Metric(name, measured.headline)
                whole = show(estimate(result, metric, with_seen=True), "")
                overlaps.append(
                    f"- {name}: {len(measured.seen)} questions stand among the training prompts and "
                    f"are left out; with them {result.label} has "
                    f"{LABELS.get(metric.name, metric.name)} {whole}")
    names: dict[tuple[str, tuple[str, ...]], list[str]] = {}  # (protocol, results) -> benchmarks
    for (name, text), of_results in labels.items():
        names.setdefault((text, tuple(of_results)), []).append(name)
    lines = []
    for (text, of_results), benchmarks in names.items():
        line = f"- {'; '.join(benchmarks)}: {text}"
        if len(of_results) < len(results):
            line += f" ({', '.join(of_results)})"
        lines.append(line)
    return "\n".join(lines + overlaps)


def _protocol(measured: BenchmarkResult) -> str:
    p = measured.protocol
    sampled = "1 sample each" if p["samples"] == 1 else f"{p['samples']} samples each"
    text = (f"{p['questions']} of {p['of']} questions, {sampled}, temperature {p['temperature']}, "
            f"top-p {p['top_p']}, at most {p['max_response_tokens']} tokens")
    if p["template_vars"]:
        text += f", {p['template_vars']}"
    elif not p["thinking"]:
        text += ", thinking off"
    return f"{text}; graded by {measured.judge}; from {measured.source}"
