"""The plots of an evaluation: points, lines over steps, histograms, bars; and those that a comparison has.

Each plot takes panels, {title of an axes: what it shows}, and the path of a PNG. Colours are Okabe and Ito's, which
colour-blind readers can tell apart; arms differ in their markers too. Where safety is drawn, over-refusal is the next
panel.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nanosafe.evals.statistics import Estimate
from nanosafe.evals.tables import SUBJECTS, Row, estimate, headline
from nanosafe.io.files import write_atomic

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
BINS = 30


def plot_points(panels: Mapping[str, Sequence[tuple[str, Estimate, Estimate]]], path: Path, x_label: str) -> None:
    """Points (arm, x, y) with their intervals, say safety against reasoning; the points of one arm look alike."""
    figure, all_axes = _figure(len(panels))
    names = list(dict.fromkeys(arm for points in panels.values() for arm, _, _ in points))
    for axes, (title, points) in zip(all_axes, panels.items(), strict=True):
        for arm, x, y in points:
            style = _style(names.index(arm))
            axes.errorbar(x.mean, y.mean, xerr=_bar(x), yerr=_bar(y), linestyle="", capsize=2, label=arm, **style)
        axes.set(xlabel=x_label, ylabel=title)
    _save(figure, all_axes, path)


def plot_lines(panels: Mapping[str, Mapping[str, Sequence[tuple[float, Estimate | float]]]], path: Path,
               x_label: str = "step", *, doubling: bool = False) -> None:
    """Lines {name: [(x, y), ...]} over steps, shaded by the interval where y has one; doubling: x is logarithmic."""
    figure, all_axes = _figure(len(panels))
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
        for name, points in lines.items():
            style, points = _style(names.index(name)), sorted(points, key=lambda point: point[0])
            ys = [y if isinstance(y, Estimate) else Estimate(y, None, None, 1, "runs") for _, y in points]
            xs = [x for x, _ in points]
            axes.plot(xs, [y.mean for y in ys], markersize=4, label=name, **style)
            low, high = ([y.mean if end is None else end for y, end in zip(ys, ends, strict=True)]
                         for ends in ([y.low for y in ys], [y.high for y in ys]))  # fmt: skip
            axes.fill_between(xs, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.set(xlabel=x_label, title=title)
        if doubling:
            axes.set_xscale("log", base=2)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _save(figure, all_axes, path)


def plot_histograms(panels: Mapping[str, Mapping[str, Sequence[float]]], path: Path, x_label: str) -> None:
    """Outlines of histograms {name: values}, each of area 1, with the same bins within a panel."""
    figure, all_axes = _figure(len(panels))
    names = list(dict.fromkeys(name for values in panels.values() for name in values))
    for axes, (title, values_of) in zip(all_axes, panels.items(), strict=True):
        top = max((max(values) for values in values_of.values() if values), default=1) or 1
        for name, values in values_of.items():
            axes.hist(values, bins=[top * i / BINS for i in range(BINS + 1)], density=bool(values), histtype="step",
                      linewidth=1.5, color=_style(names.index(name))["color"], label=name)  # fmt: skip
        axes.set(xlabel=x_label, ylabel="density", title=title)
    _save(figure, all_axes, path)


def plot_bars(panels: Mapping[str, Mapping[str, Mapping[str, Estimate]]], path: Path) -> None:
    """Bars {arm: {category: Estimate of a share}}, grouped by category."""
    figure, all_axes = _figure(len(panels))
    for axes, (title, arms) in zip(all_axes, panels.items(), strict=True):
        categories = list(dict.fromkeys(category for bars in arms.values() for category in bars))
        height = 0.8 / max(1, len(arms))
        for i, (arm, bars) in enumerate(arms.items()):
            there = [c for c in categories if c in bars]
            places = [categories.index(c) + (i - (len(arms) - 1) / 2) * height for c in there]
            errors = [[_bar(bars[c])[side][0] for c in there] for side in (0, 1)]
            axes.barh(places, [bars[c].mean for c in there], height, xerr=errors, color=_style(i)["color"],
                      error_kw={"linewidth": 0.8}, label=arm)  # fmt: skip
        axes.set(title=title, xlim=(0, 1), yticks=range(len(categories)), yticklabels=categories)
        axes.invert_yaxis()
    _save(figure, all_axes, path)


def plot_comparison(results: Sequence[dict], folder: Path) -> list[Path]:
    """The plots that `results` have the numbers for; returns their paths.

    tradeoff.png (safety and over-refusal against reasoning), categories.png, entropies.png (at reflection tokens),
    entropy-positions.png and entropy-progress.png (over the tokens of a response, and over the part of it that is
    written), reward.png (reward against judge), steps.png (over the steps of checkpoints; a first result that is none
    is step 0).
    """
    rows = {about: next((row for r in results if (row := headline(r, about))), None) for about in SUBJECTS}
    titles = {about: row.label for about, row in rows.items() if row}
    written = []

    def points(x: Row, ys: Sequence[Row]) -> dict[str, list]:
        triples = {y.label: [(r["label"], estimate(r, x), estimate(r, y)) for r in results] for y in ys}
        return {title: [t for t in found if None not in t] for title, found in triples.items()}

    def draw(name: str, plot: Callable, panels: dict, *more: str, **options: bool) -> None:
        if any(panels.values()):
            plot(panels, folder / name, *more, **options)
            written.append(folder / name)

    harm = [rows[about] for about in SUBJECTS[:2] if rows[about]]
    if rows["reasoning"]:
        draw("tradeoff.png", plot_points, points(rows["reasoning"], harm), titles["reasoning"])
    if harm:
        reward = Row(harm[0].benchmark, "reward")
        draw("reward.png", plot_points, points(reward, harm), reward.label)
        draw("categories.png", plot_bars, {row.label: {
            r["label"]: {c: Estimate(**of[row.metric]) for c, of in part["categories"].items()}
            for r in results if (part := r["benchmarks"].get(row.benchmark))} for row in harm})  # fmt: skip
    draw("entropies.png", plot_histograms, {
        row.benchmark: {r["label"]: part["reflection"]["values"] for r in results
                        if (part := r["benchmarks"].get(row.benchmark))}
        for row in (rows["safety"], rows["reasoning"]) if row}, "entropy at reflection tokens (nats)")  # fmt: skip
    measured = [row.benchmark for row in (rows["safety"], rows["reasoning"]) if row]
    for name, points_of, x_label in (("positions", by_number, "token of the response"),
                                     ("progress", by_progress, "% of the response")):
        panels = {f"{benchmark}: mean entropy (nats)": {
            r["label"]: points_of(part["entropy_curve"]) for r in results
            if (part := r["benchmarks"].get(benchmark)) and part["entropy_curve"]["starts"]} for benchmark in measured}
        draw(f"entropy-{name}.png", plot_lines, panels, x_label, doubling=name == "positions")
    steps = [(0 if i == 0 and r["step"] is None else r["step"], r) for i, r in enumerate(results)]
    steps = [(step, r) for step, r in steps if step is not None]
    if len({step for step, _ in steps}) > 1:
        runs = list(dict.fromkeys(r["run"] for step, r in steps if r["step"] is not None))
        draw("steps.png", plot_lines, {row.label: {run: [
            (step, e) for step, r in steps if r["run"] in (run, None) and (e := estimate(r, row))] for run in runs}
            for row in rows.values() if row})  # fmt: skip
    return written


def by_number(curve: dict) -> list[tuple[float, float]]:
    """Points of an EntropyCurve's dict, as far as a tenth of the responses goes: beyond, a few decide."""
    going = curve["still_going"]
    return [(start, h) for start, h, n in zip(curve["starts"], curve["by_number"], going, strict=True)
            if 10 * n >= going[0]]


def by_progress(curve: dict) -> list[tuple[float, float]]:
    """The same over percent of the response, each at its bin's middle."""
    width = 100 / len(curve["by_progress"])
    return [((i + 0.5) * width, h) for i, h in enumerate(curve["by_progress"]) if h is not None]


def _figure(columns: int) -> tuple[Figure, list]:
    figure = Figure(figsize=(max(5.5, 4.5 * columns), 4), layout="constrained", dpi=150)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _style(index: int) -> dict[str, str]:
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def _bar(value: Estimate) -> list[list[float]]:
    """Lengths of the error bar below and above, as matplotlib wants them."""
    if value.low is None:
        return [[0.0], [0.0]]
    return [[max(0.0, value.mean - value.low)], [max(0.0, value.high - value.mean)]]


def _save(figure: Figure, all_axes: list, path: Path) -> None:
    """With one legend below all panels, where it hides nothing."""
    handles = {}
    for axes in all_axes:
        axes.grid(alpha=0.3)
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize="small")
    write_atomic(path, lambda staged: figure.savefig(staged))
