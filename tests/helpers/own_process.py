"""Tests that need a process of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def check_passes(file: Path, **environment: str) -> None:
    """Fail unless the tests in `file` pass, and there are some, in a process of their own with this environment."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(run.stdout, run.stderr)
    passed = re.search(r"(\d+) passed", run.stdout)
    assert run.returncode == 0 and passed, f"{file.name} failed or ran no test"
