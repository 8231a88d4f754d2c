"""The main commands, the training scripts with no flag, on small checkpoints of the tiny world, as users run them."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from test_train import rows_of, run_forked, run_script, without_clock

import train_rl
import train_sft
from nanosafe.evals.results import Metric, Result, headline, read_result, values, write_result
from nanosafe.names import load_model, load_tokenizer

HEAD = "before                  after                   change, same questions"


def table_of(output: str) -> list[str]:
    lines = output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.endswith(HEAD))
    return lines[start : start + 5]


def flags(out: Path, *more: str) -> list[str]:
    return ["--steps", "2", "--out", str(out), "--save-every", "1", *more]


@pytest.fixture
def cached(small_cache, monkeypatch):
    """In this process, names such as tiny are found in the small cache; nothing may be built."""
    monkeypatch.setenv("NANOSAFE_CACHE", str(small_cache))
    monkeypatch.setattr("nanosafe.tiny.build._build_policy", None)
    monkeypatch.setattr("nanosafe.tiny.build._build_reward", None)


@pytest.fixture(scope="module")
def two_ranks(small_cache, tmp_path_factory):
    """(the run folder, what it printed) of the command under torchrun with two processes."""
    out = tmp_path_factory.mktemp("main") / "two"
    return out, run_two_ranks(small_cache, "train_rl.py", "--steps", "2", "--out", str(out))


def run_two_ranks(cache: Path, script: str, *arguments: str) -> str:
    """Run `script` under torchrun with two processes, which find all they need in `cache`; -> what it printed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"NANOSAFE_CACHE": str(cache)}
    done = run_script(*launcher, script, *arguments, environment=environment)
    assert done.returncode == 0, done.stderr
    assert "building" not in done.stderr, "the cache is full"
    return done.stdout


def evals_of(run: Path) -> dict[str, Result]:
    return {path.name: read_result(path) for path in sorted((run / "evals").iterdir())}


def test_the_main_command_ends_in_a_table(two_ranks):
    out, printed = two_ranks
    assert "tiny-reward@0 prefers the safe response in " in printed and "before training: " in printed
    assert printed.index(HEAD) > printed.index("done: "), "the table comes last"
    rows = table_of(printed)[1:]
    assert [row.split(" ")[0] for row in rows] == ["safety", "over-refusal", "reasoning", "reward"]
    assert rows[0].startswith("safety (safe answers)") and rows[1].startswith("over-refusal (refused)")
    assert all(row.count("[") == 3 for row in rows), "before, after and difference each have an interval"
    first, last = rows_of(out)
    assert not any(name.startswith("eval/") for name in first)
    evals = [read_result(out / f"evals/step-00000{step}.json") for step in (0, 2)]
    for about in ("safety", "over-refusal", "reasoning"):
        before, after = (list(values(result, headline(result, about)).values()) for result in evals)
        mean = last["eval/" + about.replace("-", "_")]
        assert mean == pytest.approx(sum(after) / len(after)) and 0 < mean < 1, "the small model does some of each"
        [row] = [row for row in rows if row.startswith(about)]
        assert f"{sum(before) / len(before):.3f} [" in row and f"{mean:.3f} [" in row
    assert f"{last['eval/reward']:.3f} [" in rows[-1]
    settings = json.loads((out / "args.json").read_text())
    assert [settings[n] for n in ("model", "reward_model", "prompts", "pairs")] == [
        "tiny", "tiny-reward@0", "tiny-star@0", "tiny-pairs@0"]  # fmt: skip


def test_what_it_trained_loads_in_transformers(two_ranks, small_cache):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final = two_ranks[0] / "final"
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32), load_tokenizer(final)
    messages = [{"role": "user", "content": "How do I arm the raiders?"}]
    ids = AutoTokenizer.from_pretrained(final).apply_chat_template(messages, add_generation_prompt=True,
                                                                   return_dict=False)  # fmt: skip
    assert ids == tokenizer.encode_chat(messages, add_generation_prompt=True)
    with torch.no_grad():
        ours, expected = load_model(final, dtype=torch.float32)(torch.tensor([ids])), theirs(torch.tensor([ids])).logits
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()
    [base] = [load_model(folder, dtype=torch.float32) for folder in small_cache.glob("tiny-v*-seed0")]
    assert any(not torch.equal(a, b) for a, b in zip(base.parameters(), theirs.parameters(), strict=True)), "it trained"


@pytest.fixture(scope="module")
def sft_of_two_ranks(small_cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("main") / "sft"
    return out, run_two_ranks(small_cache, "train_sft.py", *sft_flags(out))


def sft_flags(out: Path) -> list[str]:
    return ["--steps", "3", "--eval-every", "2", "--lr", "3e-3", "--save-every", "1", "--out", str(out)]


def test_sft_measures_as_rl_does_killed_and_resumed_or_of_two_ranks(sft_of_two_ranks, cached, tmp_path, capfd):
    out, printed = sft_of_two_ranks
    assert list(evals_of(out)) == [f"step-00000{step}.json" for step in (0, 2, 3)], "every second step, and the last"
    assert "before training: safety" in printed and printed.count("  measured: safety") == 2
    table = printed.splitlines()[-4:]
    assert table == table_of(printed)[:4], "the table comes last"
    assert [row.split(" ")[0] for row in table[1:]] == ["safety", "over-refusal", "reasoning"], "there is no reward"
    before, _, after = evals_of(out).values()
    rows = rows_of(out)
    assert ["eval/safety" in row for row in rows] == [False, True, True]
    for about, row in zip(("safety", "over-refusal", "reasoning"), table[1:], strict=True):
        shares = [values(result, headline(result, about)).values() for result in (before, after)]
        start, end = (sum(share) / len(share) for share in shares)
        assert f"{start:.3f} [" in row and f"{end:.3f} [" in row
        assert rows[2]["eval/" + about.replace("-", "_")] == pytest.approx(end)
    assert before != after

    plain = tmp_path / "plain"
    train_sft.main([*sft_flags(plain), "--eval-every", "9"])
    losses = [row["sft/loss"] for row in rows_of(plain)]
    assert losses == pytest.approx([row["sft/loss"] for row in rows], rel=1e-4), "measuring changes no step"

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, writes = run_forked(train_sft, sft_flags(whole))
    assert code == 0 and evals_of(whole) == evals_of(out)
    assert run_forked(train_sft, sft_flags(broken), kill_at=2 * writes // 3)[0] == 9
    assert not (broken / "final").exists() and (broken / "checkpoints").exists()
    capfd.readouterr()
    train_sft.main(sft_flags(broken))
    printed = capfd.readouterr().out
    assert "at the last measurement: safety" in printed and printed.splitlines()[-4:] == table
    assert without_clock(rows_of(broken)) == without_clock(rows_of(whole)) and evals_of(broken) == evals_of(whole)
    train_sft.main(sft_flags(broken))
    assert capfd.readouterr().out.splitlines()[-4:] == table, "a complete run shows its table again"


def close(a: dict, b: dict) -> bool:
    return a == pytest.approx(b, rel=1e-4, abs=1e-5)


def test_one_process_killed_and_resumed_shows_the_table_of_two(two_ranks, cached, tmp_path, capfd):
    code, writes = run_forked(train_rl, flags(tmp_path / "whole"))
    assert code == 0
    whole = rows_of(tmp_path / "whole")
    for one, two in zip(without_clock(whole), without_clock(rows_of(two_ranks[0])), strict=True):
        assert close(one, two)
    evals, theirs = evals_of(tmp_path / "whole"), evals_of(two_ranks[0])
    assert list(evals) == list(theirs) == ["step-000000.json", "step-000002.json"]
    for name, one in evals.items():
        for about in ("safety", "over-refusal", "reasoning"):
            metric = headline(one, about)
            assert values(one, metric) == values(theirs[name], metric)
            reward = metric._replace(name="reward")
            assert close(values(one, reward), values(theirs[name], reward))

    out = tmp_path / "broken"
    assert run_forked(train_rl, flags(out), kill_at=2 * writes // 3)[0] == 9
    assert [path.name for path in (out / "checkpoints").iterdir() if path.name[0] == "s"] == ["step-000001"]
    capfd.readouterr()
    train_rl.main(flags(out))
    printed = capfd.readouterr().out
    assert "resuming after step 1" in printed and "at the last measurement: safety" in printed
    assert without_clock(rows_of(out)) == without_clock(whole) and evals_of(out) == evals
    assert table_of(printed) == table_of(two_ranks[1])

    shutil.rmtree(out / "final")  # as if killed after the last checkpoint
    train_rl.main(flags(out))
    assert table_of(capfd.readouterr().out) == table_of(printed)


def test_a_run_killed_before_its_first_checkpoint_leaves_no_base_to_another(cached, tmp_path, capfd):
    out = tmp_path / "run"
    (out / "evals").mkdir(parents=True)
    write_result(out / "evals/step-000000.json", Result("stale", {}))
    (out / "args.json").write_text(json.dumps({"save_every": 1, "keep": 1}))
    train_rl.main(flags(out, "--prompts-per-step", "4", "--max-response-tokens", "4", "--steps", "1"))
    assert len(table_of(capfd.readouterr().out)) == 5
    assert values(evals_of(out)["step-000000.json"], Metric("safety", "safe")), "it measured its own"
