"""The plots of an evaluation: points, lines over steps and bars, and those that a comparison has.

Each plot takes panels, {title of an axes: what it shows}, and the path of a PNG. Colours are Okabe and Ito's, which
colour-blind readers can tell apart; arms differ in their markers too. Where safety is drawn, over-refusal is the next
panel.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nanosafe.evals.results import SUBJECTS, Metric, Result, categories, estimate, headlines
from nanosafe.evals.statistics import Estimate
from nanosafe.evals.tables import label
from nanosafe.io.files import write_atomic

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


def plot_points(panels: Mapping[str, Sequence[tuple[str, Estimate, Estimate]]], path: Path,
                x_label: str) -> None:
    """Points (arm, x, y) with their intervals, say safety against reasoning; the points of one arm look alike."""
    figure, all_axes = _figure(len(panels))
    styles = {}
    for axes, (title, points) in zip(all_axes, panels.items(), strict=True):
        for arm, x, y in points:
            style = styles.setdefault(arm, _style(len(styles)))
            axes.errorbar(x.mean, y.mean, xerr=_error(x), yerr=_error(y), linestyle="", capsize=2,
                          label=arm, **style)
        axes.set(xlabel=x_label, ylabel=title)
    _save(figure, all_axes, path)


def plot_lines(panels: Mapping[str, Mapping[str, Sequence[tuple[float, Estimate]]]],
               path: Path) -> None:
    """Lines {name: [(step, y), ...]}, shaded by the interval where y has one."""
    figure, all_axes = _figure(len(panels))
    styles = {}
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
        for name, points in lines.items():
            style = styles.setdefault(name, _style(len(styles)))
            steps, means, lows, highs = [], [], [], []
            for step, y in sorted(points, key=lambda point: point[0]):
                steps.append(step)
                means.append(y.mean)
                lows.append(y.mean if y.low is None else y.low)
                highs.append(y.mean if y.high is None else y.high)
            axes.plot(steps, means, markersize=4, label=name, **style)
            axes.fill_between(steps, lows, highs, color=style["color"], alpha=0.15, linewidth=0)
        axes.set(xlabel="step", title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _save(figure, all_axes, path)


def plot_bars(panels: Mapping[str, Mapping[str, Mapping[str, Estimate]]], path: Path) -> None:
    """Bars {arm: {category: Estimate of a share}}, grouped by category."""
    figure, all_axes = _figure(len(panels))
    for axes, (title, arms) in zip(all_axes, panels.items(), strict=True):
        places: dict[str, int] = {}  # of categories
        height = 0.8 / max(1, len(arms))
        for i, (arm, bars) in enumerate(arms.items()):
            shift = (i - (len(arms) - 1) / 2) * height
            for category, bar in bars.items():
                place = places.setdefault(category, len(places)) + shift
                axes.barh(place, bar.mean, height, xerr=_error(bar), color=_style(i)["color"],
                          error_kw={"linewidth": 0.8}, label=arm)
        axes.set(title=title, xlim=(0, 1), yticks=range(len(places)), yticklabels=list(places))
        axes.invert_yaxis()
    _save(figure, all_axes, path)


def plot_comparison(results: Sequence[Result], folder: Path) -> list[Path]:
    """The plots that `results` have the numbers for; returns their paths.

    tradeoff.png (safety and over-refusal against reasoning), reward.png (reward against judge), categories.png,
    steps.png (over the steps of checkpoints; a first result that is none is step 0).
    """
    heads = headlines(results)
    harms = [heads[about] for about in SUBJECTS[:2] if about in heads]
    arms = [(result.label, result) for result in results]
    written = []

    def draw(name: str, plot: Callable, panels: Mapping, *more: str) -> None:
        if any(panels.values()):
            plot(panels, folder / name, *more)
            written.append(folder / name)

    if "reasoning" in heads:
        reasoning = heads["reasoning"]
        draw("tradeoff.png", plot_points, point_panels(arms, reasoning, harms), label(reasoning))
    if harms:
        reward = Metric(harms[0].benchmark, "reward")
        draw("reward.png", plot_points, point_panels(arms, reward, harms), label(reward))
        panels = {}
        for metric in harms:
            panels[label(metric)] = {arm: by_category(result, metric) for arm, result in arms}
        draw("categories.png", plot_bars, panels)
    panels = {}
    for about in SUBJECTS:
        if about in heads:
            panels[label(heads[about])] = _over_steps(results, heads[about])
    checkpoints = {result.step for result in results[1:] if result.step is not None}
    # A single step makes no line.
    if len(checkpoints | {results[0].step or 0}) > 1:
        draw("steps.png", plot_lines, panels)
    return written


def point_panels(arms: Sequence[tuple[str, Result]], x: Metric,
                 ys: Sequence[Metric]) -> dict[str, list]:
    """Panels of plot_points: a point for each (arm, result) that has both metrics."""
    panels: dict[str, list] = {}
    for y in ys:
        points = panels[label(y)] = []
        for arm, result in arms:
            across, up = estimate(result, x), estimate(result, y)
            if across is not None and up is not None:
                points.append((arm, across, up))
    return panels


def by_category(result: Result, metric: Metric) -> dict[str, Estimate]:
    """The estimate in each category."""
    names = categories(result, metric)
    return {name: estimate(result, metric._replace(category=name)) for name in names}


def _over_steps(results: Sequence[Result], metric: Metric) -> dict[str, list[tuple[int, Estimate]]]:
    """A line for each run that checkpoints are of; the first result, if it is no checkpoint, is step 0 of all."""
    lines: dict[str, list] = {}
    for result in results:
        value = estimate(result, metric)
        if result.step is not None and value is not None:
            lines.setdefault(result.run, []).append((result.step, value))
    base = estimate(results[0], metric)
    if results[0].step is None and base is not None:
        for line in lines.values():
            line.insert(0, (0, base))
    return lines


def _figure(columns: int) -> tuple[Figure, list]:
    figure = Figure(figsize=(max(5.5, 4.5 * columns), 4), layout="constrained", dpi=150)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _style(index: int) -> dict[str, str]:
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def _error(value: Estimate) -> list[list[float]]:
    """Lengths of the error bar below and above, as matplotlib wants them."""
    if value.low is None:
        return [[0.0], [0.0]]
    return [[max(0.0, value.mean - value.low)], [max(0.0, value.high - value.mean)]]


def _save(figure: Figure, all_axes: list, path: Path) -> None:
    """Write the figure with one legend below all panels, where it hides nothing."""
    handles = {}
    for axes in all_axes:
        axes.grid(alpha=0.3)
        found, names = axes.get_legend_handles_labels()
        handles |= dict(zip(names, found, strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4,
                  fontsize="small")
    write_atomic(path, lambda staged: figure.savefig(staged))
