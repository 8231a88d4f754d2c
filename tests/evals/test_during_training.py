"""The watch over a training run: warnings, table and what it recalls, on measurements written by hand."""

import math

import pytest
import torch

from nanosafe.evals.during_training import Watch, reward_accuracy
from nanosafe.evals.results import BenchmarkResult, Result, Score, write_result
from nanosafe.evals.statistics import Z
from nanosafe.parallel import Ranks
from nanosafe.text.data import Pair


def seen(safe: list[float], refused: list[float], right: list[float], rewards: list[float] | None = None,
         categories: list[str] | None = None) -> Result:
    """A measurement; question i of each benchmark came to the i-th value."""
    rewards, categories = rewards or [0.0] * len(safe), categories or ["violence"] * len(safe)
    parts = {}
    for about, metric, scores, kinds in (("safety", "safe", safe, categories),
                                         ("over-refusal", "over_refusal", refused, ["violence"] * len(refused)),
                                         ("reasoning", "right", right, ["2 steps"] * len(right))):  # fmt: skip
        found = [Score(f"{about}-{i}", kind, False, x) for i, (x, kind) in enumerate(zip(scores, kinds, strict=True))]
        parts[about] = BenchmarkResult(about, metric, "", "", scores={metric: found}, shown=[])
    parts["safety"].scores["reward"] = [
        score._replace(value=x) for score, x in zip(parts["safety"].scores["safe"], rewards, strict=True)]
    return Result("", parts)


def ones(count: int, of: int = 100) -> list[float]:
    return [1.0] * count + [0.0] * (of - count)


def watch(tmp_path, base: Result, now: Result) -> Watch:
    one = Watch([], None, None, "", tmp_path, Ranks("cpu"))
    one.base, one.now = base, now
    return one


def warnings(tmp_path, base: Result, now: Result) -> list[str]:
    return watch(tmp_path, base, now).warnings()


def bonett_price(changed: int, n: int, sign: int) -> str:
    """A paired difference of `changed` of n items, all of one sign, as printed: Wald's interval after +1 and -1."""
    mean, square = sign * changed / (n + 2), (changed + 2) / (n + 2)
    half = Z * math.sqrt((square - mean**2) / (n + 2))
    return f"{sign * changed / n:.3f} [{max(-1, mean - half):z.3f}, {min(1, mean + half):z.3f}]"


BASE = seen(ones(30), ones(10), ones(100))


def test_nothing_new_warns_of_nothing(tmp_path):
    assert warnings(tmp_path, BASE, BASE) == []
    assert warnings(tmp_path, BASE, seen(ones(90), ones(2), ones(100), rewards=[1.0] * 100)) == [], "all is better"


@pytest.mark.parametrize("lost, limit, chance", [(2, None, None), (3, "2%", True), (5, "2%", True), (6, "5%", False),
                                                 (9, "5%", False), (40, "5%", False)])  # fmt: skip
def test_reasoning_that_falls(tmp_path, lost, limit, chance):
    found = warnings(tmp_path, BASE, seen(ones(30), ones(10), ones(100 - lost)))
    expected = f"reasoning is down by more than {limit}: {bonett_price(lost, 100, -1)}"
    assert found == ([] if limit is None else [expected + ", which may be chance" * chance])


def test_over_refusal_that_rises(tmp_path):
    assert warnings(tmp_path, BASE, seen(ones(30), ones(13), ones(100))) == [], "within chance"
    found = warnings(tmp_path, BASE, seen(ones(30), ones(25), ones(100)))
    assert found == [f"over-refusal is up: {bonett_price(15, 100, 1)}"]
    assert warnings(tmp_path, BASE, seen(ones(30), ones(0), ones(100))) == [], "it fell"


def test_reward_up_while_the_judge_is_flat(tmp_path):
    rewards = [0.5, 1.5] * 50  # +1 on average, surely above 0
    [found] = warnings(tmp_path, BASE, seen(ones(30), ones(10), ones(100), rewards=rewards))
    assert found.startswith("the reward is up (1.000 [") and "while the judge sees no gain in safety (0.000 [" in found
    [found] = warnings(tmp_path, BASE, seen(ones(33), ones(10), ones(100), rewards=rewards))
    assert f"({bonett_price(3, 100, 1)})" in found, "a gain that may be chance is none"
    assert len(warnings(tmp_path, BASE, seen(ones(10), ones(10), ones(100), rewards=rewards))) == 1, "safety fell"
    assert warnings(tmp_path, BASE, seen(ones(60), ones(10), ones(100), rewards=rewards)) == [], "the judge agrees"
    unsure = [10.0, -9.9] * 50  # +0.05 on average, with a wide interval
    assert warnings(tmp_path, BASE, seen(ones(30), ones(10), ones(100), rewards=unsure)) == []
    assert warnings(tmp_path, BASE, seen(ones(30), ones(10), ones(100), rewards=[-1.0] * 100)) == []


def test_categories_that_disagree(tmp_path):
    categories = ["deception"] * 40 + ["violence"] * 40 + ["personal data"] * 20

    def measured(*safe: int) -> Result:
        values = ones(safe[0], 40) + ones(safe[1], 40) + ones(safe[2], 20)
        return seen(values, ones(10), ones(100), categories=categories)

    base = measured(20, 20, 10)
    assert warnings(tmp_path, base, measured(35, 35, 17)) == []
    assert warnings(tmp_path, base, measured(22, 18, 10)) == [], "intervals overlap"
    expected = ("categories disagree about safety: violence " + bonett_price(18, 40, -1)
                + ", deception " + bonett_price(18, 40, 1))
    assert warnings(tmp_path, base, measured(38, 2, 10)) == [expected]
    assert warnings(tmp_path, base, measured(40, 21, 10))[0].startswith("categories disagree about safety: ")
    one = seen([1.0], [0.0], [1.0])
    assert warnings(tmp_path, one, one) == [], "a single question says nothing of the spread"


def test_several_warnings_come_together(tmp_path):
    found = warnings(tmp_path, BASE, seen(ones(30), ones(40), ones(70), rewards=[1.0, 2.0] * 50))
    assert [line.split(" ")[0] for line in found] == ["reasoning", "the", "over-refusal"]
    assert not any("kl" in line.lower() for line in found), "they recommend nothing"


def test_table_and_summary(tmp_path):
    one = watch(tmp_path, BASE, seen(ones(60), ones(10), ones(99), rewards=[1.0, 3.0] * 50))
    head, safety, refusal, reasoning, reward = one.table().splitlines()
    assert head.split() == ["before", "after", "change,", "same", "questions"]
    assert safety.startswith("safety (safe answers)") and safety.endswith(f"{bonett_price(30, 100, 1)} *")
    assert safety.split()[3] == "0.300" and "0.600 [" in safety
    assert refusal.startswith("over-refusal (refused)") and not refusal.endswith("*")
    wilson = f"{1 / (1 + Z**2 / 100):.3f}"  # the lower end of 100 of 100
    assert reasoning.startswith("reasoning (right answers)") and f"1.000 [{wilson}, 1.000]" in reasoning
    assert reasoning.endswith(bonett_price(1, 100, -1))
    assert reward.split()[:2] == ["reward", "0.000"] and " 2.000 [" in reward and reward.endswith("*")
    assert one.summary().startswith("safety (safe answers) 0.600 [")
    assert "over-refusal (refused) 0.100 [" in one.summary()
    assert ", reward 2.000 [" in one.summary()


def test_the_table_fits_100_columns_whatever_the_rewards(tmp_path):
    for scale in (1.0, 25.0, 990.0):
        before = seen(ones(98), ones(0), ones(99), rewards=[scale, 1.2 * scale] * 50)
        after = seen(ones(2), ones(99), ones(5), rewards=[-1.1 * scale, -scale] * 50)
        lines = watch(tmp_path, before, after).table().splitlines()
        assert max(map(len, lines)) <= 100 and all(line[50] == line[74] == " " for line in lines[1:])
        assert all(line.endswith("] *") for line in lines[1:])


def test_a_resumed_run_recalls_its_base_and_its_last_measurement(tmp_path):
    kept = {step: seen(ones(30 + step), ones(10), ones(100)) for step in (0, 10, 20)}
    for step, values in kept.items():
        write_result(tmp_path / f"evals/step-{step:06d}.json", values)
    for step, last in ((5, 0), (10, 10), (19, 10), (20, 20), (25, 20)):  # what lies beyond the step will come again
        one = watch(tmp_path, None, None)
        one.recall(step)
        assert one.base == kept[0] and one.now == kept[last]
    assert one.table() == watch(tmp_path, kept[0], kept[20]).table()


PAIRS = [Pair([{"role": "user", "content": "?"}], *texts) for texts in (
    ("1", "0", "violence"), ("0", "1", "violence"), ("2", "1", "deception"), ("1", "1", "deception"), ("5", "-5", None),
)]  # fmt: skip
# by hand: right, wrong, right, a tie is wrong, right
EXPECTED = {"all": 3 / 5, "deception": 1 / 2, "violence": 1 / 2}


def number(conversations, rows) -> torch.Tensor:
    """A reward that reads its value from the response; conversations must be whole."""
    assert [len(c) for c in conversations] == [2] * len(rows) and not any(row.columns for row in rows)
    return torch.tensor([float(c[-1]["content"]) for c in conversations])


def test_reward_accuracy_by_hand():
    found = reward_accuracy(number, PAIRS, Ranks("cpu"))
    assert {name: estimate.mean for name, estimate in found.items()} == pytest.approx(EXPECTED)
    assert [found[name].n for name in ("all", "deception", "violence")] == [5, 2, 2]


def test_pairs_that_are_too_long_are_left_out_and_a_reward_that_is_nan_is_named():
    long = [Pair(PAIRS[0].prompt, "2", "-inf", None), Pair(PAIRS[0].prompt, "-inf", "1", None)]
    found = reward_accuracy(number, [*long, *PAIRS], Ranks("cpu"))
    assert found["all"].mean == pytest.approx(EXPECTED["all"]) and found["all"].n == len(PAIRS)
    with pytest.raises(ValueError, match="owner/rm gives a reward that is not a number to 'nan'"):
        reward_accuracy(number, [*PAIRS, Pair(PAIRS[0].prompt, "1", "nan", None)], Ranks("cpu"), "owner/rm")


@pytest.mark.parametrize("world", [2, 3, 7])
def test_reward_accuracy_over_ranks_is_that_of_one(world):
    parts: dict[int, list] = {}

    def gather(rank: int):
        def call(items: list) -> list:
            parts[rank] = items
            return [item for r in range(world) for item in parts.get(r, [])]

        return call

    for rank in reversed(range(world)):  # rank 0 comes last, when it can gather all parts
        ranks = Ranks("cpu")
        ranks.rank, ranks.world, ranks.gather = rank, world, gather(rank)
        try:
            found = reward_accuracy(number, PAIRS, ranks)
        except ValueError:  # of the other ranks' parts it knows nothing here
            assert rank
    assert found == reward_accuracy(number, PAIRS, Ranks("cpu"))
