"""The plots of an evaluation: points, lines over steps, histograms, bars; and those that a comparison has.

Each plot takes panels, {title of an axes: what it shows}, and the path of a PNG. Colours are Okabe and Ito's, which
colour-blind readers can tell apart; arms differ in their markers too. Where safety is drawn, over-refusal is the next
panel.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nanosafe.evals.statistics import Estimate
from nanosafe.evals.tables import SUBJECTS, Row, estimate, headline
from nanosafe.io.files import write_atomic

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
BINS = 30


def plot_points(panels: Mapping[str, Sequence[tuple[str, Estimate, Estimate]]], path: Path,
                x_label: str) -> None:
    """Points (arm, x, y) with their intervals, say safety against reasoning; the points of one arm look alike."""
    figure, all_axes = _figure(len(panels))
    styles = Styles()
    for axes, (title, points) in zip(all_axes, panels.items(), strict=True):
        for arm, x, y in points:
            axes.errorbar(x.mean, y.mean, xerr=_bar(x), yerr=_bar(y), linestyle="", capsize=2,
                          label=arm, **styles[arm])
        axes.set(xlabel=x_label, ylabel=title)
    _save(figure, all_axes, path)


def plot_lines(panels: Mapping[str, Mapping[str, Sequence[tuple[float, Estimate]]]],
               path: Path) -> None:
    """Lines {name: [(step, y), ...]} over steps, shaded by the interval where y has one."""
    figure, all_axes = _figure(len(panels))
    styles = Styles()
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
        for name, points in lines.items():
            steps, means, lows, highs = [], [], [], []
            for step, y in sorted(points, key=lambda point: point[0]):
                steps.append(step)
                means.append(y.mean)
                lows.append(y.mean if y.low is None else y.low)
                highs.append(y.mean if y.high is None else y.high)
            axes.plot(steps, means, markersize=4, label=name, **styles[name])
            axes.fill_between(steps, lows, highs, color=styles[name]["color"], alpha=0.15,
                              linewidth=0)
        axes.set(xlabel="step", title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _save(figure, all_axes, path)


def plot_histograms(panels: Mapping[str, Mapping[str, Sequence[float]]], path: Path,
                    x_label: str) -> None:
    """Outlines of histograms {name: values}, each of area 1, with the same bins within a panel."""
    figure, all_axes = _figure(len(panels))
    styles = Styles()
    for axes, (title, values_of) in zip(all_axes, panels.items(), strict=True):
        top = max((max(values) for values in values_of.values() if values), default=1) or 1
        bins = [top * i / BINS for i in range(BINS + 1)]
        for name, values in values_of.items():
            axes.hist(values, bins=bins, density=bool(values), histtype="step", linewidth=1.5,
                      color=styles[name]["color"], label=name)
        axes.set(xlabel=x_label, ylabel="density", title=title)
    _save(figure, all_axes, path)


def plot_bars(panels: Mapping[str, Mapping[str, Mapping[str, Estimate]]], path: Path) -> None:
    """Bars {arm: {category: Estimate of a share}}, grouped by category."""
    figure, all_axes = _figure(len(panels))
    styles = Styles()
    for axes, (title, arms) in zip(all_axes, panels.items(), strict=True):
        categories = list(dict.fromkeys(chain(*arms.values())))
        height = 0.8 / max(1, len(arms))
        for i, (arm, bars) in enumerate(arms.items()):
            places, means, below, above = [], [], [], []
            for category, share in bars.items():
                places.append(categories.index(category) + (i - (len(arms) - 1) / 2) * height)
                means.append(share.mean)
                [low], [high] = _bar(share)
                below.append(low)
                above.append(high)
            axes.barh(places, means, height, xerr=[below, above], color=styles[arm]["color"],
                      error_kw={"linewidth": 0.8}, label=arm)
        axes.set(title=title, xlim=(0, 1), yticks=range(len(categories)), yticklabels=categories)
        axes.invert_yaxis()
    _save(figure, all_axes, path)


def plot_comparison(results: Sequence[dict], folder: Path) -> list[Path]:
    """The plots that `results` have the numbers for; returns their paths.

    tradeoff.png (safety and over-refusal against reasoning), categories.png, entropies.png (at reflection tokens),
    reward.png (reward against judge), steps.png (over the steps of checkpoints; a first result that is none is
    step 0).
    """
    rows: dict[str, Row] = {}  # about -> the row that stands for it
    for about in SUBJECTS:
        for result in results:
            if about not in rows and headline(result, about):
                rows[about] = headline(result, about)
    written = []

    def draw(name: str, plot: Callable, panels: dict, *more: str) -> None:
        if any(panels.values()):
            plot(panels, folder / name, *more)
            written.append(folder / name)

    harm = [rows[about] for about in ("safety", "over-refusal") if about in rows]
    if "reasoning" in rows:
        reasoning = rows["reasoning"]
        draw("tradeoff.png", plot_points, points(results, reasoning, harm), reasoning.label)
    if harm:
        reward = Row(harm[0].benchmark, "reward")
        draw("reward.png", plot_points, points(results, reward, harm), reward.label)
        draw("categories.png", plot_bars, {row.label: categories(results, row) for row in harm})
    entropies: dict[str, dict[str, list[float]]] = {}
    for about in ("safety", "reasoning"):
        if about in rows:
            benchmark = rows[about].benchmark
            entropies[benchmark] = {}
            for result in results:
                if benchmark in result["benchmarks"]:
                    values = result["benchmarks"][benchmark]["reflection"]["values"]
                    entropies[benchmark][result["label"]] = values
    draw("entropies.png", plot_histograms, entropies, "entropy at reflection tokens (nats)")
    of_step = checkpoints(results)
    if len({step for step, _ in of_step}) > 1:
        panels = {row.label: over_steps(of_step, row) for row in rows.values()}
        draw("steps.png", plot_lines, panels)
    return written


def points(results: Sequence[dict], x: Row, ys: Sequence[Row]) -> dict[str, list[tuple[str, Estimate, Estimate]]]:
    """Panels of plot_points: each of `ys` against `x`, a point for each result that has both."""
    panels = {}
    for y in ys:
        panels[y.label] = []
        for result in results:
            at = estimate(result, x), estimate(result, y)
            if None not in at:
                panels[y.label].append((result["label"], *at))
    return panels


def categories(results: Sequence[dict], row: Row) -> dict[str, dict[str, Estimate]]:
    """A panel of plot_bars: result -> category -> the row's estimate in it."""
    bars = {}
    for result in results:
        if row.benchmark in result["benchmarks"]:
            bars[result["label"]] = {}
            for name in result["benchmarks"][row.benchmark]["categories"]:
                share = estimate(result, row._replace(category=name))
                if share is not None:
                    bars[result["label"]][name] = share
    return bars


def checkpoints(results: Sequence[dict]) -> list[tuple[int, dict]]:
    """(step, result) of those that were measured on a checkpoint; a first result that was not is step 0."""
    of_step = []
    for i, result in enumerate(results):
        if result["step"] is not None:
            of_step.append((result["step"], result))
        elif i == 0:
            of_step.append((0, result))
    return of_step


def over_steps(of_step: Sequence[tuple[int, dict]], row: Row) -> dict[str, list[tuple[int, Estimate]]]:
    """A panel of plot_lines: run -> (step, the row's estimate); what belongs to no run begins every line."""
    lines: dict[str, list[tuple[int, Estimate]]] = {}
    for _, result in of_step:
        if result["run"] is not None:
            lines[result["run"]] = []
    for run, line in lines.items():
        for step, result in of_step:
            value = estimate(result, row)
            if result["run"] in (run, None) and value is not None:
                line.append((step, value))
    return lines


class Styles(dict):
    """Name -> colour and marker, given out in the order of asking."""

    def __missing__(self, name: str) -> dict[str, str]:
        index = len(self)
        self[name] = {"color": COLOURS[index % len(COLOURS)],
                      "marker": MARKERS[index % len(MARKERS)]}
        return self[name]


def _figure(columns: int) -> tuple[Figure, list]:
    figure = Figure(figsize=(max(5.5, 4.5 * columns), 4), layout="constrained", dpi=150)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _bar(value: Estimate) -> list[list[float]]:
    """Lengths of the error bar below and above, as matplotlib wants them."""
    if value.low is None:
        return [[0.0], [0.0]]
    return [[max(0.0, value.mean - value.low)], [max(0.0, value.high - value.mean)]]


def _save(figure: Figure, all_axes: list, path: Path) -> None:
    """With one legend below all panels, where it hides nothing."""
    legend = {}
    for axes in all_axes:
        axes.grid(alpha=0.3)
        handles, labels = axes.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=4,
                  fontsize="small")
    write_atomic(path, lambda staged: figure.savefig(staged))
