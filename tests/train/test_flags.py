"""The flags of the training scripts: at once, and with the choices of the modules that they speak of."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanosafe.model import recompute
from nanosafe.train import flags, reinforce

ROOT = Path(__file__).parents[2]
RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    assert "torch" not in sys.modules, "PyTorch takes seconds to load"
"""


@pytest.mark.parametrize("script", ["train_rl.py", "train_sft.py"])
def test_help_and_wrong_flags_do_not_wait_for_pytorch(script):
    for argument, code, words in (("--help", 0, "--max-response-tokens" if "rl" in script else "--batch-size"),
                                  ("--stepps=3", 2, "unrecognized arguments: --stepps=3")):  # fmt: skip
        done = subprocess.run([sys.executable, "-c", RUN, script, argument], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code and words in done.stdout + done.stderr, done.stderr
        assert "AssertionError" not in done.stderr


def test_the_choices_are_those_of_the_code():
    assert (flags.KL_KINDS, flags.ESTIMATORS) == (reinforce.KL_KINDS, reinforce.ESTIMATORS)
    assert flags.RECOMPUTE == recompute.RECOMPUTE
    assert flags.LARGEST == torch.finfo(torch.float32).max
