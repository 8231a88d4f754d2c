"""docs/your-own.md, block by block, as a user would follow it: files are written, commands are run."""

import re
import shlex
from pathlib import Path

import pytest
from world import write_world

import eval as evaluation
import train_rl
import train_sft
from nanosafe.sampler import __main__ as chat

TEXT = (Path(__file__).parents[1] / "docs/your-own.md").read_text()
FILES = {"json": iter(["prompts.jsonl", "conversations.jsonl", "pairs.jsonl", "questions.jsonl"]),
         "python": iter(["rewards.py"])}  # fmt: skip
# What makes a run small enough for a test.
RL = "--steps 1 --prompts-per-step 2 --samples-per-prompt 2 --minibatches 1 --max-response-tokens 6 --kl-coef 0"
SMALLER = {"train_rl.py": RL, "train_sft.py": "--batch-size 2",
           "eval.py": "--max-response-tokens 6 --training-prompts none",
           "-m": "--max-new-tokens 4"}  # fmt: skip
SCRIPTS = {"train_rl.py": train_rl, "train_sft.py": train_sft, "eval.py": evaluation, "-m": chat}


def test_every_block_works_in_the_order_of_the_page(tmp_path, monkeypatch, capsys):
    world = write_world(tmp_path / "world", max_position_embeddings=1024)
    stand_ins = {"skywork-v2-qwen3-0.6b": world / "reward", "qwen3-0.6b": world / "policy"}
    monkeypatch.chdir(tmp_path)
    blocks, ran = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.S), []
    for kind, text in blocks:
        if kind in FILES:
            Path(next(FILES[kind])).write_text(text)
            continue
        for line in text.splitlines():
            _, script, *argv = shlex.split(line)
            if script == "-m":
                assert argv.pop(0) == "nanosafe.sampler"
            argv = [str(stand_ins.get(word, word)) for word in argv] + SMALLER[script].split()
            SCRIPTS[script].main(argv)
            ran.append(script)
    assert len(ran) == 7 and next(FILES["json"], None) is None and next(FILES["python"], None) is None
    assert "prefers the safe response in" in capsys.readouterr().out
    assert "brevity" in Path("runs/fourth/metrics.jsonl").read_text()
    assert Path("runs/sft/final/model.safetensors").exists() and Path("evals/mine/table.md").exists()


@pytest.mark.parametrize("form", ["STAR-1", "plain", "chat", "TRL", "ShareGPT", "Alpaca"])
def test_the_page_has_the_forms_of_the_code(form):
    import nanosafe.text.forms as forms

    [row] = [line for line in TEXT.splitlines() if line.startswith(f"| {form}")]
    assert row in forms.__doc__
