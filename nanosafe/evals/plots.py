"""The pictures of an evaluation: dots with intervals, and lines over steps.

A figure has one message, which is its title. It has panels, at most two in a row, and each says on its axis what its
numbers are, which way is better, what the interval is and of how many. The axis of a share runs from 0 to 1, and any
other holds 0, so that noise is not enlarged into an effect; an interval that leaves its axis is cut off there. A panel
with a single point compares nothing and is left out. Colours are Okabe and Ito's, which colour-blind readers can tell
apart, and no two arms have both colour and marker alike. Where safety is drawn, over-refusal is the next panel.
"""

import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nanosafe.evals.results import DIAGNOSTICS, Metric
from nanosafe.evals.statistics import SHARES, Estimate
from nanosafe.evals.tables import label
from nanosafe.io.files import write_atomic

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
COLUMNS = 2  # of panels: more cannot be read at the width of a page
WIDTH = 8.0  # inches; shown 800 pixels wide, a point is 1.4 pixels
BETTER = {"safe": "higher", "right": "higher", "reward": "higher", "over_refusal": "lower"}
COUNTED = {"items": "questions", "pairs": "questions", "runs": "seeds"}  # what an Estimate's n is of

Rows = Mapping[str, Mapping[str, Estimate]]  # row, say a category -> arm -> value
Line = Sequence[tuple[float, Estimate]]  # (step, y)


@dataclass(frozen=True)
class Panel:
    """One axes of a figure."""

    label: str  # what the numbers of its axis are
    data: Rows | Mapping[str, Sequence[Line]]  # of plot_dots: rows; of plot_lines: arm -> its lines
    better: str = ""  # "higher" or "lower", where one is
    bounds: tuple[float | None, float | None] = (None, None)  # None: as far as the numbers and 0 go

    def describe(self, counted: str) -> str:
        """The label of the axis of numbers; counted: what is averaged, and of how many."""
        return f"{self.label}\n{f'{self.better} is better; ' if self.better else ''}{counted}"


def panel_of(metric: Metric, data: Mapping) -> Panel:
    """The panel of a metric; a share's axis has the bounds 0 and 1."""
    bounds = (None, None) if metric.name in DIAGNOSTICS else SHARES
    return Panel(label(metric), data, BETTER.get(metric.name, ""), bounds)


def plot_dots(title: str, panels: Sequence[Panel], path: Path, one_scale: bool = False) -> bool:
    """A dot with its interval for every row and arm; -> whether any panel has two, else nothing is drawn.

    one_scale: the axes of all panels are equally long, where their numbers are to be compared.
    """
    shown = [panel for panel in panels if len(_dots(panel.data)) > 1]
    if not shown:
        return False
    dots = [dot for panel in shown for dot in _dots(panel.data)]
    arms = list(dict.fromkeys(arm for arm, _ in dots))
    styles, everything = _styles(arms), [value for _, value in dots]
    # A row has a line for each arm and, of several arms, an empty one before the next row.
    pitch, edge, inches = len(arms) + 1, 1.0, 0.15  # lines of a row; lines above its first dot; height of a line
    if len(arms) == 1:
        pitch, edge, inches = 1, 0.5, 0.25
    rows = max(len(panel.data) for panel in shown)
    figure, all_axes = _figure(title, len(shown), 0.8 + inches * pitch * rows)
    for i, (axes, panel) in enumerate(zip(all_axes, shown, strict=True)):
        for row, values in enumerate(panel.data.values()):
            if row % 2:
                axes.axhspan(row * pitch - edge, (row + 1) * pitch - edge, color="0.95", zorder=0)
            for arm, value in values.items():
                y, style = row * pitch + arms.index(arm), styles[arm]
                if value.low is not None:
                    axes.hlines(y, value.low, value.high, color=style["color"], capstyle="butt")
                axes.plot(value.mean, y, linestyle="", label=arm, clip_on=False, zorder=3, **style)
        # The names of the left panel's rows serve the right one too, if it has the same.
        is_named = i % COLUMNS == 0 or list(panel.data) != list(shown[i - 1].data)
        axes.set_yticks([row * pitch + (len(arms) - 1) / 2 for row in range(len(panel.data))],
                        panel.data if is_named else [""] * len(panel.data))
        values = [value for _, value in _dots(panel.data)]
        of_scale = everything if one_scale else values
        axes.set(xlim=_limits(panel, of_scale), ylim=(len(panel.data) * pitch - edge, -edge),
                 xlabel=panel.describe(_counted(values)))
        axes.grid(axis="x", alpha=0.3)
    _save(figure, all_axes, path)
    return True


def plot_lines(title: str, panels: Sequence[Panel], path: Path) -> bool:
    """Lines over steps: an arm's seeds thin, their mean thick; -> whether any has two points, else nothing is drawn.

    An arm without lines is not drawn but has a style: so an arm looks alike in all figures of a report.
    """
    shown = []
    for panel in panels:
        lengths = [len(line) for lines in panel.data.values() for line in lines]
        if max(lengths, default=0) > 1:
            shown.append(panel)
    if not shown:
        return False
    styles = _styles(dict.fromkeys(arm for panel in shown for arm in panel.data))
    figure, all_axes = _figure(title, len(shown), 3.2)
    for axes, panel in zip(all_axes, shown, strict=True):
        values: list[Estimate] = []
        for arm, lines in panel.data.items():
            by_step, colour = defaultdict(list), styles[arm]["color"]
            for line in lines:
                for step, y in line:
                    by_step[step].append(y.mean)
                    values.append(y)
                    if y.low is not None:
                        axes.vlines(step, y.low, y.high, color=colour)
                if len(lines) > 1:
                    thin = [(step, y.mean) for step, y in sorted(line)]
                    axes.plot(*zip(*thin, strict=True), color=colour, linewidth=0.7, alpha=0.6)
            if lines:
                thick = [(step, fmean(by_step[step])) for step in sorted(by_step)]
                axes.plot(*zip(*thick, strict=True), linewidth=2.2, label=arm,
                          markevery=max(1, len(thick) // 8), **styles[arm])
        seeds = max(map(len, panel.data.values()))
        counted = f"thin: seeds, thick: mean, n = {seeds}" if seeds > 1 else _counted(values)
        axes.set(xlabel="step", ylim=_limits(panel, values), ylabel=panel.describe(counted))
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _save(figure, all_axes, path)
    return True


def message(words: str, means: Mapping[str, float]) -> str:
    """A title that says what arms come to: "safety: safe answer: base 0.30; RL 0.98"; of many, the extremes."""
    shown = list(means)
    if len(shown) > 4:
        shown = [min(means, key=means.get), max(means, key=means.get)]
    return f"{words}: " + "; ".join(f"{arm} {means[arm]:z.2f}" for arm in shown)


def lowest(metric: Metric, rows: Rows, arms: Iterable[str]) -> str:
    """A title that says in which row, a category, each of these arms has its lowest share."""
    parts = []
    for arm in arms:
        shares = {category: values[arm].mean for category, values in rows.items() if arm in values}
        if shares:
            category = min(shares, key=shares.get)
            parts.append(f"{arm} {shares[category]:z.2f} in {category}")
    return f"{label(metric)}, lowest category: {'; '.join(parts)}"


def _dots(rows: Rows) -> list[tuple[str, Estimate]]:
    return [dot for values in rows.values() for dot in values.items()]


def _styles(arms: Iterable[str]) -> dict[str, dict[str, str]]:
    """Colour and marker of each arm: the next of both and, once the colours begin anew, other markers with them."""
    styles = {}
    for i, arm in enumerate(arms):
        marker = MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]
        styles[arm] = {"color": COLOURS[i % len(COLOURS)], "marker": marker, "markersize": 5}
    return styles


def _limits(panel: Panel, values: Sequence[Estimate]) -> tuple[float, float]:
    """Of the axis: the panel's bounds or, where it has none, 0 and all means, and intervals up to as much again."""
    means = [0.0, *(value.mean for value in values)]
    room = (max(means) - min(means)) or 1.0
    lows = means + [value.low for value in values if value.low is not None]
    highs = means + [value.high for value in values if value.high is not None]
    low = max(min(lows), min(means) - room) - room / 20
    high = min(max(highs), max(means) + room) + room / 20
    return tuple(end if bound is None else bound
                 for end, bound in zip((low, high), panel.bounds, strict=True))


def _counted(values: Sequence[Estimate]) -> str:
    """What the intervals are, and n: one number or the range, of seeds or questions."""
    by_kind = defaultdict(set)
    for value in values:
        by_kind[COUNTED[value.over]].add(value.n)
    parts = []
    for kind, counts in by_kind.items():
        n = " to ".join(str(count) for count in dict.fromkeys((min(counts), max(counts))))
        parts.append(f"{n} {kind.removesuffix('s') if n == '1' else kind}")
    interval = "95 % interval, " if any(value.low is not None for value in values) else ""
    return f"{interval}n = {' or '.join(parts)}"


def _figure(title: str, panels: int, height: float) -> tuple[Figure, list]:
    """The figure and its axes; height: of a row of panels, in inches."""
    columns = min(panels, COLUMNS)
    rows = -(-panels // columns)
    figure = Figure(figsize=(WIDTH, rows * height + 0.8), layout="constrained", dpi=150)
    figure.suptitle(textwrap.fill(title, 88), x=0.01, ha="left", fontsize=11, fontweight="bold")
    all_axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in all_axes[panels:]:
        axes.remove()
    return figure, all_axes[:panels]


def _save(figure: Figure, all_axes: list, path: Path) -> None:
    """Write the figure; where arms have names, with one legend below all panels, where it hides nothing."""
    handles = {}
    for axes in all_axes:
        axes.tick_params(labelsize=9)
        axes.xaxis.label.set_size(9)
        axes.yaxis.label.set_size(9)
        found, names = axes.get_legend_handles_labels()
        handles |= dict(zip(names, found, strict=True))
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4,
                      fontsize=9)
    write_atomic(path, lambda staged: figure.savefig(staged))
