"""Results side by side, with paired differences: markdown tables, and text for the terminal. Results are dicts as in
result.json (see eval.py).

The first result is the base, and the others are compared with it question by question. Safety never stands without
over-refusal beside it: the first table holds both, and reasoning.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from nanosafe.evals.statistics import Estimate, paired_difference
from nanosafe.io.files import misfit, read_own, write_atomic

# What a result.json must have to be compared, and each benchmark in it.
RESULT = {"label": str, "benchmarks": dict}
PART = {"about": str, "headline": str, "shown": list, "variation": bool, "source": str,
        "judge": str, "metrics": dict,
        "diagnostics": dict, "categories": dict, "category_of": dict, "items": dict}  # fmt: skip
MEASURED = PART | {"protocol": dict}  # what eval.py goes on with
SUBJECTS = ("safety", "over-refusal", "reasoning")
POOLED = {  # values of a ReflectionSummary, beside the estimates over questions
    "entropy_per_token": "reflection entropy, mean over tokens",
    "entropy_per_response_or_zero": "reflection entropy, mean over responses, 0 without",
    "all_token_entropy": "entropy, mean over all tokens",
    "count_per_1000_tokens": "reflection tokens per 1,000",
}  # fmt: skip
LABELS = POOLED | {
    "safe": "safe answer", "harmful": "harmful answer",
    "thought_gap": "harmful thought minus harmful answer",
    "harmful_thought_only": "harmful thought, harmless answer", "over_refusal": "over-refusal",
    "right": "right answer", "reflection_entropy": "reflection entropy, mean over responses",
    "unclosed_thought": "no </think>", "token_entropy": "entropy, mean over responses",
    "min_k_plus_plus": "Min-K%++",
}  # fmt: skip
NOTE = (
    "Mean over questions with its 95 % interval. Differences are to the first model, over the "
    "questions that both have; * marks an interval that excludes zero, which one row in twenty "
    "does by chance. Each model is one training run: nothing here says how another seed would turn "
    "out."
)
WIDTH = 100  # columns of a terminal
# What a score may hide.
FORM = {"truncated": "cut off", "unclosed_thought": "no </think>", "unjudged": "unjudged"}


class Row(NamedTuple):
    benchmark: str
    metric: str
    category: str | None = None

    @property
    def label(self) -> str:
        benchmark = f"{self.benchmark} ({self.category})" if self.category else self.benchmark
        return f"{benchmark}: {LABELS.get(self.metric, self.metric.replace('_', ' '))}"


def read_result(path: Path, of_part: Mapping[str, type] = PART) -> dict:
    """A result.json, each of its benchmarks with these fields.

    Raises ValueError naming the file, the field and the cure where it is damaged.
    """
    cure = "bring it back from a copy or delete its folder, for it alone says how the responses there came about"
    result = read_own(path, RESULT, cure)
    for name, part in result["benchmarks"].items():
        problem = misfit(part, of_part)
        if problem:
            raise ValueError(f"{path} is damaged ({name}: {problem}): {cure}")
    return result


def parts(result: dict) -> dict[str, dict]:
    """The result's benchmarks by name, and "memorization", which has the same form, where it was measured."""
    if not result.get("memorization"):
        return result["benchmarks"]
    return result["benchmarks"] | {"memorization": result["memorization"]}


def estimate(result: dict, row: Row) -> Estimate | float | None:
    """What a result says of `row`; a plain number for a pooled value, None where nothing was measured."""
    part = parts(result).get(row.benchmark, {})
    if row.metric in POOLED:
        return part.get("reflection", {}).get(row.metric)
    if row.category:
        estimates = part.get("categories", {}).get(row.category, {})
    else:
        estimates = part.get("metrics", {}) | part.get("diagnostics", {})
    return Estimate(**estimates[row.metric]) if row.metric in estimates else None


def values(result: dict, row: Row) -> dict[str, float]:
    """Question id -> the row's metric, of the row's category where it has one."""
    part = parts(result).get(row.benchmark, {})
    everywhere = part.get("items", {}).get(row.metric, {})
    if row.category is None:
        return everywhere
    return {i: value for i, value in everywhere.items() if part["category_of"][i] == row.category}


def difference(base: dict, result: dict, row: Row) -> Estimate | float | None:
    """`result` minus `base`, paired by question."""
    if row.metric in POOLED:
        before, after = estimate(base, row), estimate(result, row)
        return None if before is None or after is None else after - before
    before, after = values(base, row), values(result, row)
    return paired_difference(before, after) if before.keys() & after.keys() else None


def headline(result: dict, about: str) -> Row | None:
    """The row that stands for `about` (safety, over-refusal, reasoning) in `result`: of its first benchmark."""
    for name, part in result["benchmarks"].items():
        if part["about"] == about and not part["variation"]:
            return Row(name, part["headline"])
    return None


def sections(results: Sequence[dict]) -> dict[str, list[Row]]:
    """The table's rows by section, in order; a result that lacks some has empty cells there."""
    known: dict[str, dict] = {}
    for result in results:
        for name, part in parts(result).items():
            known.setdefault(name, part)
    main, variations = {}, {}
    for about in SUBJECTS:
        for name, part in known.items():
            if part["about"] == about:
                (variations if part["variation"] else main)[name] = part
    found: dict[str, list[Row]] = {
        "Overview": [], "By category": [], "Other wordings, attacks, modes": [],
        "Other metrics": [], "Diagnostics": [], "Memorization": [],
    }  # fmt: skip
    for name, part in main.items():
        first = _first_rows(name, part)
        found["Overview"] += first
        if len(part["categories"]) > 1:
            found["By category"] += [Row(name, part["headline"],
                                         category) for category in part["categories"]]
        rows = [Row(name, metric) for metric in part["metrics"]]
        found["Other metrics"] += [row for row in rows if row not in first]
        found["Diagnostics"] += [Row(name, metric) for metric in (*part["diagnostics"], *POOLED)]
    for name, part in variations.items():
        found["Other wordings, attacks, modes"] += _first_rows(name, part)
        found["Diagnostics"] += [Row(name, metric) for metric in ("truncated", "unclosed_thought")]
    if "memorization" in known:
        found["Memorization"] = [Row("memorization",
                                     metric) for metric in known["memorization"]["metrics"]]
    measured = {}
    for title, rows in found.items():
        rows = [row for row in rows if any(estimate(result, row) is not None for result in results)]
        if rows:
            measured[title] = rows
    return measured


def _first_rows(name: str, part: dict) -> list[Row]:
    """Those that stand for a benchmark: its headline, what it shows right behind it, and the last pass@k."""
    passes = [metric for metric in part["metrics"] if metric.startswith("pass@")]
    return [Row(name, metric) for metric in (part["headline"], *part["shown"], *passes[-1:])]


def table(results: Sequence[dict]) -> str:
    """Markdown: one table a section, a column for each result and one for its difference.

    Raises what check_comparable raises.
    """
    check_comparable(results)
    base, *arms = results
    header = ["", base["label"]]
    for arm in arms:
        header += [arm["label"], f"{arm['label']} − {base['label']}"]
    header.append("n")
    lines = []
    for title, rows in sections(results).items():
        cells = [_cells(results, row) for row in rows]
        lines += ["", f"**{title}**", "", *markdown(header, cells)]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(results)), "", NOTE])


def terminal(results: Sequence[dict], titles: Sequence[str]) -> str:
    """The sections `titles` and the protocols as text, at most WIDTH columns wide.

    A line holds a row of the tables or, of several results, a row has a line for each of them below
    its name. Raises what check_comparable raises.
    """
    check_comparable(results)
    base, *arms = results
    width = 44 if arms else 72  # of names; then come a number with its interval, and a difference
    rows = [("", "mean, 95 % interval", f"minus {base['label']}"[:28] if arms else "")]
    for title, found in sections(results).items():
        if title not in titles:
            continue
        rows += [("", "", ""), (f"**{title}**", "", "")]
        for row in found:
            label, first, *others, _ = _cells(results, row)
            if arms:
                rows += [(label, "", ""), (f"  {base['label']}", first, "")]
                for arm, value, change in zip(arms, others[::2], others[1::2], strict=True):
                    rows.append((f"  {arm['label']}", value, change))
            else:
                rows.append((label, first, ""))
    lines = []
    for name, value, change in rows:
        lines.append(f"{_cut(name, width if value else WIDTH)}{value:<28}{change}")
    note = ["", NOTE] if arms else []
    for line in ["", *notes(results), *note, "", *protocols(results).splitlines()]:
        lines.append(textwrap.fill(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False))
    return "\n".join(line.rstrip() for line in lines)


def _cut(text: str, width: int) -> str:
    """`text` in `width` columns, the last two blank; a long name keeps both ends, which tell most."""
    if len(text) > width - 2:
        half = width // 2
        text = f"{text[: half - 1]}…{text[half + 2 - width :]}"
    return f"{text:<{width}}"


def notes(results: Sequence[dict]) -> list[str]:
    """A line for each headline that hides something: responses that were cut off, never closed their
    thought or found no verdict, and the bounds of the score whatever verdict these had."""
    found = []
    for result in results:
        for name, part in result["benchmarks"].items():
            shares = []
            for metric, words in FORM.items():
                share = estimate(result, Row(name, metric))
                if share is not None and share.mean > 0:
                    shares.append(f"{words} {share.mean:.1%}")
            if part.get("bounds"):
                label = LABELS.get(part["headline"], part["headline"])
                low, high = part["bounds"]
                shares.append(f"{label} {low:.3f} to {high:.3f}, however the unjudged come out")
            if shares:
                found.append(f"{result['label']}, {name}: {', '.join(shares)}")
    return found


def check_comparable(results: Sequence[dict]) -> None:
    """Raise ValueError for results of different questions (another split or revision) or judges under one name."""
    first: dict[str, dict] = {}  # benchmark -> the first result that has it
    for result in results:
        for name, part in result["benchmarks"].items():
            other = first.setdefault(name, result)
            for field, what in (("source", "answer different questions"),
                                ("judge", "were graded by different judges")):
                before = other["benchmarks"][name][field]
                if part[field] != before:
                    theirs = f"{other['label']} has {before}; {result['label']} has {part[field]}"
                    raise ValueError(f"{name}: these results {what} and cannot be compared: "
                                     f"{theirs}")


def _cells(results: Sequence[dict], row: Row) -> list[str]:
    spec = ".1f" if row.metric in ("tokens", "count_per_1000_tokens") else ".3f"
    base, *arms = results
    estimates = [estimate(result, row) for result in results]
    cells = [row.label, _cell(estimates[0], f"z{spec}")]
    for arm, value in zip(arms, estimates[1:], strict=True):
        change = difference(base, arm, row)
        mark = " *" if isinstance(change, Estimate) and change.excludes_zero else ""
        cells += [_cell(value, f"z{spec}"), _cell(change, f"+z{spec}") + mark]
    counted = [str(e.n) for e in estimates if isinstance(e, Estimate)]
    return [*cells, "/".join(dict.fromkeys(counted))]


def _cell(value: Estimate | float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in lines]


def protocols(results: Sequence[dict]) -> str:
    """A line for every protocol, with the benchmarks it was for and, where not for all results, with theirs."""
    used: dict[tuple[str, str], list[str]] = {}  # (benchmark, protocol) -> results
    for result in results:
        for name, part in result["benchmarks"].items():
            used.setdefault((name, _in_words(part)), []).append(result["label"])
    # (protocol, results) -> benchmarks
    benchmarks: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (name, text), labels in used.items():
        benchmarks.setdefault((text, tuple(labels)), []).append(name)
    lines = []
    for (text, labels), names in benchmarks.items():
        whose = f" ({', '.join(labels)})" if len(labels) < len(results) else ""
        lines.append(f"- {'; '.join(names)}: {text}{whose}")
    for result in results:
        for name, part in result["benchmarks"].items():
            overlap = part["with_training_prompts"]
            if overlap:
                with_them = overlap["metrics"].get(part["headline"])
                label = LABELS.get(part["headline"], part["headline"])
                lines.append(f"- {name}: {overlap['training_prompts']} questions stand among the "
                             f"training prompts and are left out; with them {result['label']} has "
                             f"{label} {Estimate(**with_them) if with_them else '–'}")
    return "\n".join(lines)


def _in_words(part: dict) -> str:
    """The protocol of a benchmark."""
    protocol, extra = part["protocol"], ""
    if protocol["template_vars"]:
        extra = f", {protocol['template_vars']}"
    elif not protocol["thinking"]:
        extra = ", thinking off"
    samples = "1 sample" if protocol["samples"] == 1 else f"{protocol['samples']} samples"
    return (f"{protocol['questions']} of {protocol['of']} questions, {samples} each, temperature "
            f"{protocol['temperature']}, top-p {protocol['top_p']}, at most "
            f"{protocol['max_response_tokens']} tokens{extra}; graded by {part['judge']}; from "
            f"{part['source']}")


def write_table(results: Sequence[dict], folder: Path, title: str = "") -> None:
    """FOLDER/table.md: the tables of `results` and their protocols, below `title`."""
    text = f"{title}\n\n{table(results)}\n\n**Protocol**\n\n{protocols(results)}\n"
    write_atomic(folder / "table.md", text.lstrip().encode())
