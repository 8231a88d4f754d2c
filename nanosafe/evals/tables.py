"""Results side by side, with paired differences: markdown tables, and text for the terminal. Results are dicts as in
result.json (see eval.py).

The first result is the base, and the others are compared with it question by question. Safety never stands without
over-refusal beside it: the first table holds both, and reasoning.
"""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from nanosafe.evals.statistics import Estimate, paired_difference
from nanosafe.io.files import misfit, read_own

# What a result.json must have to be compared, and each benchmark in it.
RESULT = {"label": str, "benchmarks": dict}
PART = {"about": str, "headline": str, "shown": list, "variation": bool, "source": str, "judge": str, "metrics": dict,
        "diagnostics": dict, "categories": dict, "category_of": dict, "items": dict}  # fmt: skip
SUBJECTS = ("safety", "over-refusal", "reasoning")
POOLED = {  # values of a ReflectionSummary and of a ForkingSummary, beside the estimates over questions
    "entropy_per_token": "reflection entropy, mean over tokens",
    "entropy_per_response_or_zero": "reflection entropy, mean over responses, 0 without",
    "all_token_entropy": "entropy, mean over all tokens", "count_per_1000_tokens": "reflection tokens per 1,000",
    "threshold": "entropy from which a token is in the top 20 % (forking)",
    "entropy_of_forking": "entropy, mean over forking tokens",
    "reflection_share_of_forking": "share of reflection tokens among forking tokens",
}  # fmt: skip
LABELS = POOLED | {
    "safe": "safe answer", "harmful": "harmful answer", "thought_gap": "harmful thought minus harmful answer",
    "harmful_thought_only": "harmful thought, harmless answer", "over_refusal": "over-refusal", "right": "right answer",
    "reflection_entropy": "reflection entropy, mean over responses", "unclosed_thought": "no </think>",
    "token_entropy": "entropy, mean over responses", "min_k_plus_plus": "Min-K%++",
}  # fmt: skip
NOTE = (
    "Mean over questions with its 95 % interval. Differences are to the first model, over the questions that both "
    "have; * marks an interval that excludes zero, which one row in twenty does by chance. Each model is one "
    "training run: nothing here says how another seed would turn out."
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
        of = f"{self.benchmark} ({self.category})" if self.category else self.benchmark
        return f"{of}: {LABELS.get(self.metric, self.metric.replace('_', ' '))}"


def read_result(path: Path, of_part: Mapping[str, type] = PART) -> dict:
    """A result.json, each of its benchmarks with these fields.

    Raises ValueError naming the file, the field and the cure where it is damaged.
    """
    cure = "bring it back from a copy or delete its folder, for it alone says how the responses there came about"
    result = read_own(path, RESULT, cure)
    for name, part in result["benchmarks"].items():
        if problem := misfit(part, of_part):
            raise ValueError(f"{path} is damaged ({name}: {problem}): {cure}")
    return result


def parts(result: dict) -> dict[str, dict]:
    """The result's benchmarks by name, and "memorization", which has the same form, where it was measured."""
    return result["benchmarks"] | ({"memorization": result["memorization"]} if result.get("memorization") else {})


def pooled(part: dict) -> dict:
    """What was measured over all tokens together."""
    return (part.get("reflection") or {}) | (part.get("forking") or {})


def estimate(result: dict, row: Row) -> Estimate | float | None:
    """What a result says of `row`; a plain number for a pooled value, None where nothing was measured."""
    part = parts(result).get(row.benchmark, {})
    if row.metric in POOLED:
        return pooled(part).get(row.metric)
    of = part.get("categories", {}).get(row.category, {}) if row.category else (
        part.get("metrics", {}) | part.get("diagnostics", {}))  # fmt: skip
    return Estimate(**of[row.metric]) if row.metric in of else None


def difference(base: dict, result: dict, row: Row) -> Estimate | float | None:
    """`result` minus `base`, paired by question."""
    if row.metric in POOLED:
        before, after = estimate(base, row), estimate(result, row)
        return None if before is None or after is None else after - before
    a, b = ({i: value for i, value in part.get("items", {}).get(row.metric, {}).items()
             if row.category is None or part["category_of"][i] == row.category}
            for part in (parts(r).get(row.benchmark, {}) for r in (base, result)))  # fmt: skip
    return paired_difference(a, b) if a.keys() & b.keys() else None


def headline(result: dict, about: str) -> Row | None:
    """The row that stands for `about` (safety, over-refusal, reasoning) in `result`: of its first benchmark."""
    found = [Row(name, part["headline"]) for name, part in result["benchmarks"].items()
             if part["about"] == about and not part["variation"]]  # fmt: skip
    return found[0] if found else None


def sections(results: Sequence[dict]) -> dict[str, list[Row]]:
    """The table's rows by section, in order; a result that lacks some has empty cells there."""
    known: dict[str, dict] = {}
    for result in results:
        known |= {name: part for name, part in parts(result).items() if name not in known}
    of = [(name, part) for about in SUBJECTS for name, part in known.items() if part["about"] == about]
    main = [(name, part) for name, part in of if not part["variation"]]
    variations = [(name, part) for name, part in of if part["variation"]]

    def first(name: str, part: dict) -> list[Row]:
        passes = [metric for metric in part["metrics"] if metric.startswith("pass@")]
        return [Row(name, metric) for metric in (part["headline"], *part["shown"], *passes[-1:])]

    found = {
        "Overview": [row for name, part in main for row in first(name, part)],
        "By category": [Row(name, p["headline"], c) for name, p in main if len(p["categories"]) > 1
                        for c in p["categories"]],
        "Other wordings, attacks, modes": [row for name, part in variations for row in first(name, part)],
        "Other metrics": [Row(name, metric) for name, part in main for metric in part["metrics"]],
        "Diagnostics": [Row(name, metric) for name, part in main for metric in (*part["diagnostics"], *POOLED)
                        if metric not in POOLED or pooled(part).get(metric) is not None]
                       + [Row(name, metric) for name, _ in variations for metric in ("truncated", "unclosed_thought")],
        "Memorization": [Row("memorization", m) for m in known.get("memorization", {}).get("metrics", ())],
    }  # fmt: skip
    found["Other metrics"] = [row for row in found["Other metrics"] if row not in found["Overview"]]
    for title, rows in found.items():
        found[title] = [row for row in rows if set(estimate(r, row) for r in results) != {None}]
    return {title: rows for title, rows in found.items() if rows}


def table(results: Sequence[dict]) -> str:
    """Markdown: one table a section, a column for each result and one for its difference.

    Raises what check_comparable raises.
    """
    check_comparable(results)
    base, *arms = results
    header = ["", base["label"], *(name for r in arms for name in (r["label"], f"{r['label']} − {base['label']}")), "n"]
    lines = []
    for title, rows in sections(results).items():
        lines += ["", f"**{title}**", "", *markdown(header, [_cells(results, row) for row in rows])]
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
    for name in dict.fromkeys(name for result in results for name in result["benchmarks"]):
        for field, what in (("source", "answer different questions"), ("judge", "were graded by different judges")):
            found = {r["benchmarks"][name][field]: r["label"] for r in results if name in r["benchmarks"]}
            if len(found) > 1:
                theirs = "; ".join(f"{label} has {value}" for value, label in found.items())
                raise ValueError(f"{name}: these results {what} and cannot be compared: {theirs}")


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


def forking_tokens(results: Sequence[dict]) -> list[str]:
    """A table for each benchmark that is no variation: the most frequent forking tokens of the first result, with count
    and mean entropy in each; – where another's list lacks the token."""
    lines = []
    for name, part in results[0]["benchmarks"].items():
        tops = {r["label"]: pooled(r["benchmarks"].get(name, {})).get("top", []) for r in results}
        lists = {label: {text: (count, h) for text, count, h in top} for label, top in tops.items()}
        rows = [[json.dumps(text, ensure_ascii=False),
                 *("{} ({:.2f})".format(*of[text]) if text in of else "–" for of in lists.values())]
                for text, *_ in tops[results[0]["label"]]]  # fmt: skip
        if rows and not part["variation"]:
            lines += ["", *markdown([name, *(f"{label}: count (mean entropy)" for label in lists)], rows)]
    return lines


def protocols(results: Sequence[dict]) -> str:
    """A line for every protocol, with the benchmarks it was for and, where not for all results, with theirs."""
    used: dict[tuple[str, str], list[str]] = {}  # (benchmark, protocol) -> results
    for result in results:
        for name, part in result["benchmarks"].items():
            p = part["protocol"]
            extra = f", {p['template_vars']}" if p["template_vars"] else "" if p["thinking"] else ", thinking off"
            text = (f"{p['questions']} of {p['of']} questions, {p['samples']} sample{'s' * (p['samples'] > 1)} each, "
                    f"temperature {p['temperature']}, top-p {p['top_p']}, at most {p['max_response_tokens']} tokens"
                    f"{extra}; graded by {part['judge']}; from {part['source']}")  # fmt: skip
            used.setdefault((name, text), []).append(result["label"])
    lines: dict[tuple[str, tuple[str, ...]], list[str]] = {}  # (protocol, results) -> benchmarks
    for (name, text), by in used.items():
        lines.setdefault((text, tuple(by)), []).append(name)
    found = [f"- {'; '.join(names)}: {text}" + (f" ({', '.join(by)})" if len(by) < len(results) else "")
             for (text, by), names in lines.items()]  # fmt: skip
    for result in results:
        for name, part in result["benchmarks"].items():
            if overlap := part["with_training_prompts"]:
                whole = overlap["metrics"].get(part["headline"])
                found.append(f"- {name}: {overlap['training_prompts']} questions stand among the training prompts and "
                             f"are left out; with them {result['label']} has "
                             f"{LABELS.get(part['headline'], part['headline'])} {Estimate(**whole) if whole else '–'}")
    return "\n".join(found)
