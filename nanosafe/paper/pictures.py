"""The report's pictures. Each has one message, its title, made from the numbers that it shows.

Each function draws to `path` and returns the markdown lines that show it: none where there is nothing to draw.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

from nanosafe.evals.plots import Panel, lowest, message, panel_of, plot_dots, plot_lines
from nanosafe.evals.results import Metric, headlines
from nanosafe.evals.tables import show
from nanosafe.paper.runs import (
    MAIN,
    REFUSING,
    Runs,
    category_levels,
    curves,
    hardest_variation,
    over_known,
    results_of,
    reward_gain,
    shown,
)


def arms_picture(found: Mapping[str, Runs], path: Path) -> list[str]:
    """Safety, over-refusal, reasoning and the hardest variation of safety, of all arms and models."""
    rows: dict[Metric, dict] = {}  # of each panel: arm -> model -> Estimate
    safe: dict[str, dict[str, float]] = defaultdict(dict)  # arm -> model -> mean
    for model, runs in found.items():
        heads = headlines([result for _, result in results_of(runs)])
        for metric in filter(None, [*heads.values(), hardest_variation(runs)]):
            for arm in runs:
                value = shown(runs, arm, metric)
                if value is not None:
                    rows.setdefault(metric, {}).setdefault(arm, {})[model] = value
                    if metric == heads.get("safety"):
                        safe[arm][model] = value.mean
    named = [arm for arm in safe if arm in MAIN]
    others = {arm: fmean(means.values()) for arm, means in safe.items() if arm not in (*MAIN, REFUSING)}
    if "SFT" not in named and others:
        named.append(min(others, key=others.get))  # of ablations, what costs most
    said = []
    for arm in named:
        means = " / ".join(show(safe[arm].get(model), "z.2f") for model in found)
        said.append(f"{arm} {means}")
    title = f"Safe answers, {' / '.join(found)}: {'; '.join(said)}"
    return draw(plot_dots, title, [panel_of(metric, data) for metric, data in rows.items()], path)


def training_picture(runs: Runs, path: Path) -> list[str]:
    """Each RL arm's own reward, less its first step's so that all begin at 0, and the KL."""
    rewards = {arm: curves(runs, arm, "reward/mean", gained=True) for arm in runs}
    kl = {arm: curves(runs, arm, "kl/k1") for arm in runs}
    gains = {}
    for arm, by_seed in runs.items():
        gain = over_known(reward_gain(run.steps) for run in by_seed.values())
        if gain is not None:
            gains[arm] = gain.mean
    panels = [Panel("own reward minus its first step's", rewards, "higher"),
              Panel("KL to the base, k1, nats a token", kl)]
    return draw(plot_lines, message("Reward gained in training", gains), panels, path)


def categories_picture(runs: Runs, metrics: Sequence[Metric], path: Path) -> list[str]:
    panels = []
    for metric in metrics:
        rows: dict[str, dict] = defaultdict(dict)
        for arm in runs:
            # The fixed refusal is the same in all categories.
            if arm != REFUSING:
                for name, value in category_levels(runs, arm, metric).items():
                    rows[name][arm] = value
        panels.append(panel_of(metric, rows))
    return draw(plot_dots, lowest(metrics[0], panels[0].data, MAIN), panels, path)


def entropies_picture(runs: Runs, metrics: Sequence[Metric], path: Path) -> list[str]:
    """At reflection words; metrics: of safety and reasoning, on one scale, for one may have a tenth of the other's."""
    panels, said = [], []
    for metric in metrics:
        rows = {}
        for arm in runs:
            value = shown(runs, arm, metric)
            if value is not None:
                rows[arm] = {"": value}
        panels.append(Panel(f"{metric.benchmark}: nats at reflection words", rows, bounds=(0, None)))
        said.append(message(metric.benchmark, {arm: rows[arm][""].mean for arm in MAIN if arm in rows}))
    plot = partial(plot_dots, one_scale=True)
    return draw(plot, f"Entropy at reflection words, {'; '.join(said)}", panels, path)


def draw(plot: Callable, title: str, panels: Sequence[Panel], path: Path) -> list[str]:
    return ["", f"![{title}]({path.name})"] if plot(title, panels, path) else []
