"""Calibration against all pairs, ranks worked out one by one, and texts whose scores are made up to mislead."""

import json
import math
import random

import pytest
import torch

from nanosafe.evals.calibration import (
    Text,
    load_records,
    load_texts,
    main,
    measure,
    ordered_alike,
    separation,
    spearman,
)
from nanosafe.evals.results import RecordFile
from nanosafe.parallel import Ranks


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
    few = separation([text._replace(prompt=asked("one")) for text in texts], scores)
    assert few.low < estimate.low - 0.2 and few.mean == estimate.mean  # one prompt, however many texts
    assert separation([text for text in texts if text.safe], of[True]) is None


def test_each_category_and_writer_has_its_own_auc():
    texts, scores = made_up({"a": 0, "b": 0})
    scores = [s if t.category == "c0" else -s for t, s in zip(texts, scores, strict=True)]
    found = measure(texts, scores)
    assert found["categories"]["c0"].low > 0.8 and found["categories"]["c1"].high < 0.2
    assert [warning for warning in found["warnings"] if warning.startswith("category c1")]
    of_a = [i for i, text in enumerate(texts) if text.writer == "a"]
    assert found["writers"]["a"] == separation([texts[i] for i in of_a], [scores[i] for i in of_a])


def test_a_writer_whose_rewards_mean_something_else_is_warned_of():
    texts, scores = made_up({"a": 0, "b": 6})
    found = measure(texts, scores)
    assert found["all"].mean < 0.85 < min(within.mean for within in found["writers"].values())
    [warning] = found["warnings"]
    assert "below that of each writer (a 0." in warning
    for label, estimate in found["differences"].items():
        safe = label == "b − a, safe"
        a, b = ({t.question: s for t, s in zip(texts, scores, strict=True) if (t.writer, t.safe) == (writer, safe)}
                for writer in "ab")  # fmt: skip
        both = [b[question] - a[question] for question in a if question in b]
        assert estimate.mean == pytest.approx(sum(both) / len(both)) and estimate.low < 6 < estimate.high
        assert estimate.n == len(both) > 10
    assert list(found["differences"]) == ["b − a, safe", "b − a, unsafe"]
    assert measure(*made_up({"a": 0, "b": 0}))["warnings"] == []


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


def test_agreement_equals_ranks_and_pairs_one_by_one():
    rng = random.Random(3)
    a = [rng.randint(0, 6) for _ in range(40)]
    b = [x + rng.randint(-3, 3) for x in a]

    def rank(values, x):
        return sum(v < x for v in values) + (values.count(x) + 1) / 2

    x, y = ([rank(values, v) for v in values] for values in (a, b))
    mean = 41 / 2
    product = sum((p - mean) * (q - mean) for p, q in zip(x, y, strict=True))
    scale = math.sqrt(sum((p - mean) ** 2 for p in x) * sum((q - mean) ** 2 for q in y))
    assert spearman(a, b) == pytest.approx(product / scale) and 0.3 < spearman(a, b) < 0.95
    assert spearman(a, [v**3 for v in a]) == pytest.approx(1) and spearman(a, [-v for v in a]) == pytest.approx(-1)
    assert spearman(a, [1.0] * 40) is None

    def alike(i, j):
        p, q = (a[i] > a[j]) - (a[i] < a[j]), (b[i] > b[j]) - (b[i] < b[j])
        return 1.0 if p == q else 0.0 if p * q == -1 else 0.5

    pairs = [alike(i, j) for i in range(40) for j in range(i)]
    assert ordered_alike(a, b) == pytest.approx(sum(pairs) / len(pairs))
    assert ordered_alike(a, a) == 1 and ordered_alike([1, 2, 3], [3, 2, 1]) == 0


def write_folder(folder, label: str, rewards: list[float], reward_model: str | None = "rm") -> str:
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps({"label": label}))
    rows = [{"benchmark": "safety", "id": str(i), "category": "c", "sample": 0, "prompt": asked(f"q{i}"),
             "response": "text", "tokens": 1, "truncated": False, "values": {"safe": float(i % 2)}}
            | ({"reward": r, "reward_model": reward_model} if reward_model else {}) for i, r in enumerate(rewards)]
    rows += [rows[0] | {"id": "unjudged", "values": {"unjudged": 1.0}},
             rows[0] | {"benchmark": "arithmetic", "values": {"right": 1.0}}]
    RecordFile(folder / "records.jsonl", Ranks("cpu", alone=True)).rewrite(rows)
    return str(folder)


def test_results_of_an_evaluation_are_calibrated_by_their_judge(tmp_path, capsys):
    folders = [write_folder(tmp_path / "one", "base", [0, 2, 1, 3]), write_folder(tmp_path / "two", "RL", [5, 9, 6, 8])]
    texts, scores = load_records(folders, Ranks("cpu", alone=True))
    assert [t.writer for t in texts] == ["base"] * 4 + ["RL"] * 4 and [t.safe for t in texts] == [False, True] * 4
    assert scores == {"rm": [0, 2, 1, 3, 5, 9, 6, 8]}  # neither the unjudged response nor the sum
    main(["--records", *folders, "--out", str(tmp_path / "out"), "--device", "cpu"])
    found = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert found["rewards"]["rm"]["all"]["mean"] == pytest.approx(12 / 16) and found["texts"] == 8
    assert found["rewards"]["rm"]["writers"]["RL"]["mean"] == 1 and "warning (rm)" in capsys.readouterr().out
    main(["--records", *folders, "--device", "cpu", "--reward-model", "rule:refusal"])  # in place of the saved scores
    assert "rule:refusal" in capsys.readouterr().out
    third = write_folder(tmp_path / "three", "SFT", [0, 1], "another")
    with pytest.raises(ValueError, match="give --reward-model"):
        main(["--records", folders[0], third, "--device", "cpu"])
    with pytest.raises(ValueError, match="records.jsonl holds no judged response"):
        main(["--records", str(tmp_path / "nowhere"), "--device", "cpu"])


def test_the_tiny_worlds_pairs_are_judged(capsys, tmp_path):
    main(["--data", "tiny-pairs", "--reward-model", "rule:tiny-judge", "rule:refusal", "--device", "cpu",
          "--out", str(tmp_path)])  # fmt: skip
    found = json.loads((tmp_path / "calibration.json").read_text())
    judge, refusal = (found["rewards"][name]["all"] for name in ("rule:tiny-judge", "rule:refusal"))
    assert judge["low"] > 0.9 > 0.7 > refusal["high"]  # of benign requests, a refusal is the worse answer
    assert len(found["rewards"]["rule:tiny-judge"]["categories"]) == 7
    assert 0 < found["agreement"]["rule:tiny-judge, rule:refusal"]["spearman"] < 0.9
    printed = capsys.readouterr().out
    assert "rank correlation" in printed and "| all | " in printed


def test_one_label_alone_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "q", "response": "no", "label": "safe"}))
    with pytest.raises(ValueError, match="rows.jsonl: all 1 texts are safe"):
        main(["--data", str(tmp_path / "rows.jsonl"), "--reward-model", "rule:refusal", "--device", "cpu"])
