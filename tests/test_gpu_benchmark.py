"""benchmarks/gpu.py in tiny shapes on a CPU: on a card its first minute must not go to a mistake in the script."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pretend_cuda import DEVICE, pretending

ROOT = Path(__file__).resolve().parents[1]
ABSENT = ("math_verify", "pyarrow", "tensorboard", "wandb", "datasets")  # on a bare GPU machine


@pytest.fixture
def stages(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu_stages

    return gpu_stages


def run_stage(stages, name: str, folder: Path, capsys) -> list[dict]:
    """The lines it says; none of its cases may fail."""
    stage = stages.Stage(name, torch.device("cpu"), True, folder)
    stages.STAGES[name](stage)
    assert not stage.failures
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("name, figure, lines", [
    ("card", "product", 7), ("logits", "bf16_ours", 4), ("decode", "share", 4), ("train", "plan_gb", 3),
    ("head", "both", 4), ("rl8b", "plan_gb", 2),
])  # fmt: skip
def test_a_stage_says_its_figures(stages, name, figure, lines, tmp_path, capsys):
    said = run_stage(stages, name, tmp_path, capsys)
    assert sum(figure in line for line in said) == lines
    assert all(line["stage"] == name and line.get("ok", True) for line in said)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which cannot be pretended")
@pytest.mark.parametrize("name", ["decode", "head", "train"])
def test_a_stage_runs_where_there_is_a_device(stages, name, tmp_path, monkeypatch, capsys):
    """A pretended one: what it computes and where is seen, but not its kernels, which a profiler would list."""
    monkeypatch.setattr(stages.Stage, "kernels", lambda stage, run, top=14: [])
    with pretending() as machine:
        stage = stages.Stage(name, DEVICE, True, tmp_path)
        stages.STAGES[name](stage)
    assert not stage.failures and capsys.readouterr().out.count("kernels") in (2, 3, 4)
    assert name != "decode" or len(machine.graphs) >= 2


def test_training_runs_where_only_what_a_gpu_machine_has_is_installed(stages, tmp_path, monkeypatch, capsys):
    absent = tmp_path / "absent"
    absent.mkdir()
    for package in ABSENT:
        (absent / f"{package}.py").write_text(f"raise ImportError({package!r})\n")
    monkeypatch.setenv("PYTHONPATH", f"{absent}:{ROOT}")
    monkeypatch.setenv("NANOSAFE_CACHE", str(tmp_path))
    said = run_stage(stages, "rl", tmp_path, capsys)
    for row in said[:2]:
        assert row["policy/skipped"] == 0 and row["policy/grad_norm"] > 0 and "mismatch/mean" in row
    assert 0 < said[0]["plan_gb"] < 10 and said[2]["ok"]


def test_the_driver_keeps_every_line_and_the_budget(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--smoke", "--device", "cpu", "--only", "card"]
    done = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True)
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert any("product" in line for line in lines) and lines[-1] | {"seconds": 0} == {
        "stage": "card", "done": True, "ok": True, "seconds": 0, "error": None}
    assert json.loads(done.stdout.splitlines()[-1]) == {"benchmark": "gpu", "ok": True, "stages": {"card": True}}
    assert done.returncode == 0
    late = subprocess.run([*command, "--out", tmp_path, "--budget", "1"], capture_output=True, text=True)
    assert late.returncode == 1 and "not begun" in late.stdout
