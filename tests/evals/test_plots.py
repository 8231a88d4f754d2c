"""Pictures: the numbers they are given, axes that enlarge no noise, arms that can be told apart, two columns."""

import pytest
from matplotlib.figure import Figure

from nanosafe.evals import plots
from nanosafe.evals.plots import Panel, lowest, message, panel_of, plot_dots, plot_lines
from nanosafe.evals.results import Metric
from nanosafe.evals.statistics import Estimate

SAFE, REFUSED = Metric("safety", "safe"), Metric("look-alikes", "over_refusal")
SHARE = Estimate(0.02, 0.0, 0.05, 9, "items")
ONE_RUN = Estimate(0.2, None, None, 1, "runs")


@pytest.fixture
def kept(monkeypatch) -> list[Figure]:
    """The figures that are saved."""
    figures, save = [], plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, *rest: (figures.append(figure), save(figure, *rest)))
    return figures


def curve(*values: float) -> list[tuple[int, Estimate]]:
    return [(step, Estimate(y, None, None, 1, "runs")) for step, y in enumerate(values)]


def dots_of(axes) -> list[float]:
    """The means, of the markers; other lines are none."""
    return [line.get_xdata()[0] for line in axes.lines]


def test_dots_and_intervals_are_the_numbers_given(kept, tmp_path):
    value = Estimate(0.5, 0.4, 0.8, 9, "items")
    rows = {"x": {"base": value, "RL": value}, "y": {"base": ONE_RUN}}
    assert plot_dots("a title", [panel_of(SAFE, rows)], tmp_path / "a.png")
    [axes] = kept[0].axes
    assert dots_of(axes) == [0.5, 0.5, 0.2]
    ends = [collection.get_segments()[0][:, 0].tolist() for collection in axes.collections]
    assert ends == [[0.4, 0.8], [0.4, 0.8]], "a single run has no interval"
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["x", "y"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_title_is_the_message_and_the_axis_says_interval_n_and_which_way_is_better(kept, tmp_path):
    title = message("safety", {"base": 0.3, "RL": 0.98})
    assert title == "safety: base 0.30; RL 0.98"
    many = Estimate(0.5, 0.4, 0.8, 12, "items")
    plot_dots(title, [panel_of(SAFE, {"base": {"": SHARE}, "RL": {"": many}}),
                      panel_of(REFUSED, {"base": {"": ONE_RUN}, "RL": {"": ONE_RUN}})], tmp_path / "a.png")  # fmt: skip
    left, right = kept[0].axes
    assert kept[0].get_suptitle() == title
    assert left.get_xlabel() == "safety: safe answer\nhigher is better; 95 % interval, n = 9 to 12 questions"
    assert right.get_xlabel() == "look-alikes: over-refusal\nlower is better; n = 1 seed"
    plot_dots(title, [panel_of(SAFE, {"base": {"": ONE_RUN}, "RL": {"": SHARE}})], tmp_path / "b.png")
    assert kept[1].axes[0].get_xlabel().endswith("95 % interval, n = 1 seed or 9 questions")
    assert not kept[0].legends, "the rows name the arms"
    plot_dots(title, [panel_of(SAFE, {"base": {"tiny": SHARE}, "RL": {"tiny": SHARE}})], tmp_path / "c.png")
    assert [text.get_text() for text in kept[2].legends[0].get_texts()] == ["tiny"]


def test_of_many_arms_a_title_names_the_extremes_and_of_categories_the_lowest():
    assert message("x", {"a": 0.5, "b": 0.1, "c": 0.9, "d": 0.4, "e": 0.6}) == "x: b 0.10; c 0.90"
    rows = {"theft": {"base": SHARE, "RL": ONE_RUN}, "fraud": {"base": ONE_RUN, "RL": SHARE}}
    assert "base 0.02 in theft; RL 0.02 in fraud" in lowest(SAFE, rows, ["base", "SFT", "RL"])


def test_the_axis_of_a_share_runs_from_0_to_1_and_every_other_holds_0(kept, tmp_path):
    small = {"base": {"": SHARE}, "RL": {"": Estimate(0.03, 0.01, 0.06, 9, "items")}}
    plot_dots("", [panel_of(REFUSED, small)], tmp_path / "a.png")
    assert kept[0].axes[0].get_xlim() == (0, 1)
    plot_lines("", [panel_of(SAFE, {"RL": [[(0, SHARE), (1, SHARE)]]})], tmp_path / "b.png")
    assert kept[1].axes[0].get_ylim() == (0, 1)
    rewards = {"base": {"": Estimate(4.0, 3.9, 4.1, 9, "items")}, "RL": {"": Estimate(4.1, 4.0, 90.0, 2, "runs")}}
    plot_dots("", [Panel("reward", rewards)], tmp_path / "c.png")
    low, high = kept[2].axes[0].get_xlim()
    assert low < 0 and 4.1 < high < 10, "0 is there, and a wide interval does not squeeze the means"
    nats = Panel("nats", {"RL": [curve(0.1, 0.2)]}, bounds=(0, None))
    plot_lines("", [Panel("reward", {"RL": [curve(-2.0, -1.9)]}), nats], tmp_path / "d.png")
    assert kept[3].axes[0].get_ylim()[1] > 0 and kept[3].axes[0].get_ylim()[0] < -2
    assert kept[3].axes[1].get_ylim()[0] == 0


def test_panels_whose_numbers_are_compared_have_one_scale(kept, tmp_path):
    def panel(mean: float) -> Panel:
        return Panel("nats", {arm: {"": Estimate(mean, mean / 2, mean * 2, 3, "runs")} for arm in ("base", "RL")})

    plot_dots("", [panel(0.3), panel(0.01)], tmp_path / "a.png", one_scale=True)
    left, right = kept[0].axes
    assert left.get_xlim() == right.get_xlim() and right.get_xlim()[1] >= 0.6
    plot_dots("", [panel(0.3), panel(0.01)], tmp_path / "b.png")
    assert kept[1].axes[1].get_xlim()[1] < 0.1


def test_fourteen_arms_differ_in_colour_and_marker_together(kept, tmp_path):
    arms = [f"arm {i}" for i in range(14)]
    plot_dots("", [panel_of(SAFE, {"x": dict.fromkeys(arms, SHARE)})], tmp_path / "a.png")
    plot_lines("", [Panel("reward", {arm: [curve(0, 1)] for arm in arms})], tmp_path / "b.png")
    for figure in kept:
        pairs = [(line.get_color(), line.get_marker()) for line in figure.axes[0].lines]
        assert len(pairs) == len(set(pairs)) == 14


def test_a_panel_of_one_point_is_left_out(kept, tmp_path):
    two, one = {"base": {"": SHARE}, "RL": {"": SHARE}}, {"base": {"": SHARE}}
    assert plot_dots("", [panel_of(SAFE, two), panel_of(REFUSED, one)], tmp_path / "a.png")
    assert [axes.get_xlabel()[:6] for axes in kept[0].axes] == ["safety"]
    kl = Panel("kl", {"RL": [curve(0.1)], "SFT": []})
    assert plot_lines("", [kl, Panel("reward", {"RL": [curve(1, 2)]})], tmp_path / "b.png")
    assert [axes.get_ylabel()[:6] for axes in kept[1].axes] == ["reward"]
    assert not plot_dots("", [panel_of(SAFE, one)], tmp_path / "c.png")
    assert not plot_lines("", [kl], tmp_path / "d.png")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("count, rows, columns", [(1, 1, 1), (2, 1, 2), (3, 2, 2), (5, 3, 2)])
def test_at_most_two_panels_stand_in_a_row(kept, tmp_path, count, rows, columns):
    two = {"base": {"": SHARE}, "RL": {"": SHARE}}
    plot_dots("", [panel_of(Metric(f"b{i}", "safe"), two) for i in range(count)], tmp_path / "a.png")
    assert len(kept[0].axes) == count
    assert kept[0].axes[0].get_subplotspec().get_gridspec().get_geometry() == (rows, columns)
    assert kept[0].get_size_inches()[0] == plots.WIDTH


def test_seeds_are_thin_lines_below_their_thick_mean(kept, tmp_path):
    lines = {"base": [], "RL": [curve(0, 1, 2), curve(0, 3)], "exact": [curve(0, 5)]}
    plot_lines("", [Panel("reward", lines, "higher")], tmp_path / "a.png")
    [axes] = kept[0].axes
    first, second, mean, single = axes.lines
    assert first.get_ydata().tolist() == [0, 1, 2] and second.get_ydata().tolist() == [0, 3]
    assert mean.get_ydata().tolist() == [0, 2, 2] and single.get_ydata().tolist() == [0, 5]
    assert first.get_linewidth() < 1 < 2 < mean.get_linewidth() == single.get_linewidth()
    assert not axes.collections and axes.get_ylabel() == "reward\nhigher is better; thin: seeds, thick: mean, n = 2"
    assert mean.get_color() == first.get_color() == plots.COLOURS[1], "arms without lines count among the colours"
    assert [text.get_text() for text in kept[0].legends[0].get_texts()] == ["RL", "exact"]
