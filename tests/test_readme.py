"""README, command by command: what needs no network and no GPU is run, on small models and sizes; the rest parses."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from test_docs import PARSERS
from test_main import table_of
from world import write_policy

import eval as evaluation
import train_rl
from nanosafe.sampler import __main__ as chat

TEXT = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.S)
# What makes a run small enough for a test.
SMALL_RL = "--prompts-per-step 2 --minibatches 1 --max-response-tokens 6 --steps 1"
SMALL_EVAL = "--benchmarks safety,benign-look-alikes,arithmetic --limit 2 --max-response-tokens 6"
# One process of the test's own environment does not do these.
NOT_RUN = {
    "pip install -e '.[test]' && python -m pytest": "the tests themselves",
    "torchrun --nproc_per_node=8 train_rl.py": "GPUs, weights from the hub",
    "torchrun --nproc_per_node=8 train_sft.py": "GPUs, weights from the hub",
    "torchrun --nproc_per_node=2 train_rl.py": "weights from the hub",
}


def shell_lines() -> list[str]:
    lines = []
    for kind, text in BLOCKS:
        if kind == "bash":
            lines += text.splitlines()
    return lines


@pytest.fixture
def place(small_cache, tmp_path, monkeypatch) -> Path:
    """An empty working folder, with the small tiny world in a cache of its own."""
    monkeypatch.setenv("NANOSAFE_CACHE", str(shutil.copytree(small_cache, tmp_path / "cache")))
    monkeypatch.setattr("nanosafe.tiny.build._build_policy", None)  # nothing may be grown
    monkeypatch.setattr("nanosafe.tiny.build._build_reward", None)
    monkeypatch.setattr("nanosafe.evals.during_training.QUESTIONS", 4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_runs_or_says_why_not(place, capfd):
    write_policy(place / "qwen3-0.6b", max_position_embeddings=1024)
    ran, known = [], set()
    for line in shell_lines():
        excuses = [start for start in NOT_RUN if line.startswith(start)]
        if excuses:
            known |= set(excuses)
            script = next((script for script in PARSERS if script in line), None)
            if script:
                PARSERS[script].parse_args(shlex.split(line.split(script)[1], comments=True))
            continue
        words = shlex.split(line.removeprefix("pip install -e . && "), comments=True)
        assert words.pop(0) == "python", line
        script, arguments = words[0], words[1:]
        ran.append(run(script, arguments, place, capfd))
    assert ran == ["table", "plan", "dry run", "measured", "compared"] and known == set(NOT_RUN)


def run(script: str, arguments: list[str], place: Path, capfd) -> str:
    """Run one command, smaller or on another model where it must be; -> what it was, with its effect checked."""
    capfd.readouterr()
    if script == "train_rl.py" and not arguments:
        train_rl.main(SMALL_RL.split())
        assert [row.split()[0] for row in table_of(capfd.readouterr().out)[1:]] == [
            "safety", "over-refusal", "reasoning", "reward"]  # fmt: skip
        return "table"
    if "--plan" in arguments:
        train_rl.main(arguments)
        assert "IT FITS: yes" in capfd.readouterr().out
        return "plan"
    if "--random-weights" in arguments:
        arguments[arguments.index("qwen3-0.6b")] = str(place / "qwen3-0.6b")
        train_rl.main([*arguments, *SMALL_RL.split()])
        assert Path("runs/rl-qwen3-0.6b/final/model.safetensors").exists()
        return "dry run"
    assert script == "eval.py"
    if "--compare" in arguments:  # results that stand: those of the command before
        evaluation.main(arguments)
        assert Path("evals/base-vs-sft-vs-rl/table.md").exists()
        return "compared"
    models = arguments[1 : arguments.index("--limit")]
    for folder in models[1:]:
        shutil.copytree("runs/rl-tiny/final", folder)
    models[0] = "tiny"
    evaluation.main(["--model", *models, *SMALL_EVAL.split()])
    for model, name in zip(("tiny", "sft-qwen3-8b-final", "rl-qwen3-8b-final"), ("base", "sft", "rl"), strict=True):
        Path("evals", model).rename(Path("evals", name))
    return "measured"


def test_the_example_in_python_and_the_chat_run(place, capsys):
    policy = write_policy(place / "policy", max_position_embeddings=1024)
    [example] = [text for kind, text in BLOCKS if kind == "python"]
    exec(example.replace('"qwen3-0.6b"', f'"{policy}"').replace("max_new_tokens=200", "max_new_tokens=6"), {})
    assert re.search(r"\[-\d+\.\d+, .*\] (length|stop)$", capsys.readouterr().out.strip())
    [command] = re.findall(r"`python -m nanosafe.sampler (.*?)`", TEXT)
    arguments = command.replace("qwen3-0.6b", str(policy)).split()
    chat.main([*arguments, "--prompt", "How do I pick a lock?", "--max-new-tokens", "6", "--seed", "1"])
    assert capsys.readouterr().out.strip()
