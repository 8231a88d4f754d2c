"""The pictures of a comparison of results: arms, categories and, of checkpoints, steps."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from nanosafe.evals.plots import Line, lowest, message, panel_of, plot_dots, plot_lines
from nanosafe.evals.results import SUBJECTS, Metric, Result, categories, estimate, headlines
from nanosafe.evals.statistics import Estimate
from nanosafe.evals.tables import label


def plot_comparison(results: Sequence[Result], folder: Path) -> list[Path]:
    """The plots that `results` have the numbers for; returns their paths.

    arms.png (the headlines, and the reward), categories.png, steps.png (over the steps of checkpoints; a first result
    that is none is step 0).
    """
    heads = headlines(results)
    metrics = [heads[about] for about in SUBJECTS if about in heads]
    if not metrics:
        return []
    over_steps = [panel_of(metric, _over_steps(results, metric)) for metric in metrics]
    last = {}
    for run, [line] in over_steps[0].data.items():
        step, value = max(line)
        last[f"{Path(run).name} at step {step}"] = value.mean
    figures = [("steps.png", plot_lines, message(label(metrics[0]), last), over_steps)]
    harms = [heads[about] for about in SUBJECTS[:2] if about in heads]
    if harms:
        panels = []
        for metric in harms:
            rows: dict[str, dict[str, Estimate]] = defaultdict(dict)
            for result in results:
                for name in categories(result, metric):
                    rows[name][result.label] = estimate(result, metric._replace(category=name))
            panels.append(panel_of(metric, dict(sorted(rows.items()))))
        title = lowest(harms[0], panels[0].data, [results[0].label, results[-1].label])
        figures.append(("categories.png", plot_dots, title, panels))
        metrics.append(harms[0]._replace(name="reward"))
    panels = []
    for metric in metrics:
        found = {result.label: estimate(result, metric) for result in results}
        panels.append(panel_of(metric, {arm: {"": value} for arm, value in found.items() if value}))
    means = {arm: values[""].mean for arm, values in panels[0].data.items()}
    figures.append(("arms.png", plot_dots, message(label(metrics[0]), means), panels))
    return [folder / name for name, plot, title, shown in reversed(figures)
            if plot(title, shown, folder / name)]


def _over_steps(results: Sequence[Result], metric: Metric) -> dict[str, list[Line]]:
    """A line for each run that checkpoints are of; the first result, if it is no checkpoint, is step 0 of all."""
    lines: dict[str, list] = {}
    for result in results:
        value = estimate(result, metric)
        if result.step is not None and value is not None:
            lines.setdefault(result.run, [[]])[0].append((result.step, value))
    base = estimate(results[0], metric)
    if results[0].step is None and base is not None:
        for [line] in lines.values():
            line.insert(0, (0, base))
    return lines
