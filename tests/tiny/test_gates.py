"""The gates against a base policy that is made up: what it answers is decided here, so every measure is known."""

from random import Random
from types import SimpleNamespace

import pytest

from nanosafe.evals.statistics import over_items
from nanosafe.tiny import gates, world

GOOD = dict(right=0.95, plain=0.1, banned=0.7, safe=0.35, spread=0.4, helpful=0.95, regretted=0.15, preferred=0.86)


@pytest.fixture
def measured(monkeypatch):
    """measured(**shares) -> what -> (Estimate, passed) of a base with those shares instead of GOOD's."""

    def measure(**changes: float) -> dict[str, tuple]:
        shares, names = GOOD | changes, list(world.CATEGORIES)

        def respond(model, tokenizer, benchmark, *, banned_token_ids=(), **options):
            rng = Random(f"{benchmark.name}{bool(banned_token_ids)}")

            def drawn(share: float) -> float:
                return float(rng.random() < share)

            for question in benchmark.questions:
                for _ in range(benchmark.samples):
                    values = {
                        "right": drawn(shares["plain" if benchmark.variation else
                                              "banned" if banned_token_ids else "right"]),
                        "helpful": drawn(shares["helpful"]), "harmful_thought_only": drawn(shares["regretted"]),
                    }  # fmt: skip
                    if benchmark.about == "safety":  # from the first category to the last it rises by `spread`
                        slope = names.index(question.category) / (len(names) - 1) - 0.5
                        values["safe"] = drawn(shares["safe"] + shares["spread"] * slope)
                    yield {"id": question.id, "values": values}

        config = SimpleNamespace(raw={"nanosafe_world": "okay"})
        monkeypatch.setattr(gates, "load_model", lambda name, dtype: SimpleNamespace(config=config))
        monkeypatch.setattr(gates, "load_tokenizer", lambda name: None)
        monkeypatch.setattr(gates, "reflection_words", lambda tokenizer: [1])
        monkeypatch.setattr(gates, "load_reward", lambda name, dtype: None)
        right = over_items([1.0] * round(1000 * shares["preferred"]) + [0.0] * round(1000 * (1 - shares["preferred"])))
        monkeypatch.setattr(gates, "reward_accuracy", lambda reward, pairs, ranks: {"all": right})
        monkeypatch.setattr(gates, "respond", respond)
        return {what: (estimate, passed) for what, estimate, _, passed in gates.measure("policy", "reward")}

    return measure


def test_a_good_base_passes_and_its_shares_are_found(measured):
    found = measured()
    assert all(passed for _, passed in found.values()), found
    expected = dict(zip(found, (0.95, 0.1 - 0.95, 0.7 - 0.95, 0.35, 0.95, 0.15, 0.86, 0.15, 0.55), strict=True))
    for what, (estimate, _) in found.items():
        assert estimate.mean == pytest.approx(expected[what], abs=0.1 if "category" in what else 0.04), what


@pytest.mark.parametrize(
    ("change", "fails"),
    [
        (dict(right=0.8), ["arithmetic, 2 to 4 steps"]),
        (dict(plain=0.75), ["without its thought, difference"]),
        (dict(banned=0.95), ["with reflection words banned, difference"]),
        (dict(safe=0.18), ["unsafe requests answered safely"]),
        (dict(safe=0.55), ["unsafe requests answered safely"]),
        (dict(regretted=0.05), ["unsafe thought before a harmless answer"]),
        (dict(preferred=0.78), ["reward model right on held-out pairs"]),
        (dict(preferred=0.98), ["reward model right on held-out pairs"]),
        (dict(spread=0.0), ["safest category"]),
    ],
    ids=str,
)
def test_each_gate_alone_stops_what_it_is_for(measured, change, fails):
    assert [what for what, (_, passed) in measured(**change).items() if not passed] == fails
