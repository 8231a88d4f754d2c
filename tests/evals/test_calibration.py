"""Calibration against all pairs, and texts whose scores are made up to mislead."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch

from nanosafe.evals.calibration import Text, load_texts, main, measure, separation


def asked(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


def test_rows_and_pairs_are_read(tmp_path):
    rows = [{"prompt": "q", "response": "no", "label": "safe", "category": "c", "model": "m"},
            {"question": "r", "response": "yes", "label": "unsafe"}]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_texts(str(tmp_path / "rows.jsonl")) == [
        Text(asked("q"), "no", True, "c", "m"), Text(asked("r"), "yes", False)]
    (tmp_path / "pairs.json").write_text(json.dumps([{"prompt": "q", "chosen": "a", "rejected": "b", "category": "c"}]))
    assert load_texts(str(tmp_path / "pairs.json")) == [
        Text(asked("q"), "a", True, "c"), Text(asked("q"), "b", False, "c")]


@pytest.mark.parametrize(("row", "message"), [
    ({"prompt": "q", "label": "safe"}, r"line 2: .*'response'"),
    ({"prompt": "q", "response": "a"}, r"line 2: field 'label' must be safe or unsafe, not None"),
    ({"prompt": "q", "response": "a", "label": "harmful"}, "'harmful'"),
    ({"response": "a", "label": "safe"}, "line 2: .*'prompt'"),
])  # fmt: skip
def test_a_row_that_lacks_something_is_named(row, message, tmp_path):
    good = {"prompt": "q", "response": "no", "label": "safe"}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n")
    with pytest.raises(ValueError, match=message):
        load_texts(str(tmp_path / "rows.jsonl"))


def made_up(shift: dict[str, float], seed: int = 0, prompts: int = 60) -> tuple[list[Text], list[float]]:
    """Texts of several writers, whose rewards are all higher by the writer's shift; safe ones by 3."""
    rng, texts, scores = random.Random(seed), [], []
    for i in range(prompts):
        for writer in shift:
            safe = rng.random() < 0.5
            texts.append(Text(asked(f"q{i}"), "text", safe, f"c{i % 2}", writer))
            scores.append(rng.gauss(3 * safe + shift[writer], 1))
    return texts, scores


def test_a_separation_equals_all_pairs_and_counts_prompts():
    texts, scores = made_up({"a": 0, "b": 0.5, "c": 1})
    estimate = separation(texts, scores)
    of = {label: [s for t, s in zip(texts, scores, strict=True) if t.safe == label] for label in (True, False)}
    pairs = [x > y for x in of[True] for y in of[False]]
    assert estimate.mean == pytest.approx(sum(pairs) / len(pairs)) and estimate[3:] == (180, "texts")
    few = separation([replace(text, prompt=asked("one")) for text in texts], scores)
    assert few.low < estimate.low - 0.2 and few.mean == estimate.mean  # one prompt, however many texts
    assert separation([text for text in texts if text.safe], of[True]) is None


def test_each_category_and_writer_has_its_own_auc():
    texts, scores = made_up({"a": 0, "b": 0})
    scores = [s if t.category == "c0" else -s for t, s in zip(texts, scores, strict=True)]
    found = measure(texts, scores)
    assert found["categories"]["c0"].low > 0.8 and found["categories"]["c1"].high < 0.2
    of_a = [i for i, text in enumerate(texts) if text.writer == "a"]
    assert found["writers"]["a"] == separation([texts[i] for i in of_a], [scores[i] for i in of_a])


def test_all_texts_are_told_apart_worse_where_a_writers_rewards_mean_something_else():
    found = measure(*made_up({"a": 0, "b": 6}))
    assert found["all"]["all"].mean < 0.85 < min(within.mean for within in found["writers"].values())


@pytest.mark.parametrize("shared", [0.0, 0.7])
def test_an_interval_holds_the_truth_where_each_prompt_has_both(shared):
    # shared: part of a score's variance that belongs to its prompt; the interval leaves it out, and so is wider
    generator, held, trials = torch.Generator().manual_seed(2), 0, 600
    truth = 0.5 * math.erfc(-1.5 / 2)
    for _ in range(trials):
        own, prompt = torch.randn(2, 40, generator=generator), torch.randn(40, generator=generator)
        scores = math.sqrt(1 - shared) * own + math.sqrt(shared) * prompt + torch.tensor([[1.5], [0.0]])
        texts = [Text(asked(str(i)), "", safe) for safe in (True, False) for i in range(40)]
        estimate = separation(texts, scores.flatten().tolist())
        held += estimate.low <= truth <= estimate.high
    assert 0.93 <= held / trials <= (0.98 if shared == 0 else 1)


def test_the_tiny_worlds_pairs_are_judged(capsys, tmp_path):
    main(["--data", "tiny-pairs", "--reward-model", "rule:tiny-judge", "rule:refusal", "--device", "cpu",
          "--out", str(tmp_path)])  # fmt: skip
    found = json.loads((tmp_path / "calibration.json").read_text())
    judge, refusal = (found["rewards"][name]["all"] for name in ("rule:tiny-judge", "rule:refusal"))
    assert judge["low"] > 0.9 > 0.7 > refusal["high"]  # of benign requests, a refusal is the worse answer
    assert len(found["rewards"]["rule:tiny-judge"]["categories"]) == 7
    printed = capsys.readouterr().out
    assert "| all | " in printed and f"{judge['mean']:.3f} [" in printed


def test_one_label_alone_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "q", "response": "no", "label": "safe"}))
    with pytest.raises(ValueError, match="rows.jsonl: all 1 texts are safe"):
        main(["--data", str(tmp_path / "rows.jsonl"), "--reward-model", "rule:refusal", "--device", "cpu"])
