"""The flags of every command: at once, and with the choices of the modules that they speak of."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanosafe.evals import attacks, paper_suite
from nanosafe.evals import flags as eval_flags
from nanosafe.model import recompute
from nanosafe.train import flags, reinforce

ROOT = Path(__file__).parents[2]
RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
run = runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module
try:
    run(sys.argv[0], run_name="__main__")
finally:
    assert "torch" not in sys.modules, "PyTorch takes seconds to load"
"""


@pytest.mark.parametrize("script, flag", [
    ("train_rl.py", "--max-response-tokens"), ("train_sft.py", "--batch-size"), ("eval.py", "--benchmarks"),
    ("nanosafe.sampler", "--max-tokens"), ("nanosafe.paper", "--ablations"),
    ("nanosafe.evals.calibration", "--reward-model")])  # fmt: skip
def test_help_and_wrong_flags_do_not_wait_for_pytorch(script, flag):
    for argument, code, words in (("--help", 0, flag),
                                  ("--stepps=3", 2, "error: ")):  # fmt: skip
        done = subprocess.run([sys.executable, "-c", RUN, script, argument], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code and words in done.stdout + done.stderr, done.stderr
        assert "AssertionError" not in done.stderr


def test_the_choices_are_those_of_the_code():
    assert (flags.KL_KINDS, flags.ESTIMATORS) == (reinforce.KL_KINDS, reinforce.ESTIMATORS)
    assert flags.RECOMPUTE == recompute.RECOMPUTE
    assert (eval_flags.ATTACKS, eval_flags.BENCHMARKS) == (tuple(attacks.ATTACKS), tuple(paper_suite.BENCHMARKS))
    for name in ("PAPER", "DEFAULT_JUDGE", "TRAINING_SET"):
        assert getattr(eval_flags, name) == getattr(paper_suite, name)
    assert flags.LARGEST == torch.finfo(torch.float32).max
