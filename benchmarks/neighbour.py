"""What one process that keeps a core busy costs the RL loop of the tiny world.

    python benchmarks/neighbour.py                              # as nanosafe lets its threads wait
    python benchmarks/neighbour.py --spins 0 1000 300000        # and other ways; the last is libgomp's own
    OMP_NUM_THREADS=1 python benchmarks/neighbour.py            # with one thread

Each measurement is a fresh train_rl.py: alone, and beside a Python loop that never ends and may run on any core. They
alternate, the least of each counts. A run that takes longer than --limit is stopped and counts as so long. The base of
the tiny world is built first if the cache has none. The last line is one JSON object.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from nanosafe.io.machine import SPINS, available_cores
from nanosafe.tiny.build import tiny_checkpoint

ROOT = Path(__file__).parents[1]


@contextmanager
def neighbour(busy: bool):
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        yield
    finally:
        if process:
            process.kill()
            process.wait()


def measure(spins: int, steps: int, limit: float) -> tuple[float, float]:
    """Seconds that a run of so many steps takes, and seconds of all its threads on a core."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(ROOT / "train_rl.py"), "--device", "cpu", "--steps", str(steps),
                   "--eval-every", str(steps), "--out", out]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "GOMP_SPINCOUNT": str(spins)}
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        try:
            subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=limit)
        except subprocess.TimeoutExpired:
            print(f"stopped after {limit:.0f} s")
        elapsed, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return elapsed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spins", type=int, nargs="+", default=[SPINS], help="values of GOMP_SPINCOUNT to compare")
    parser.add_argument("--steps", type=int, default=3, help="of the RL run")
    parser.add_argument("--repeats", type=int, default=3, help="measured runs of each kind")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which a run is stopped")
    args = parser.parse_args()
    for name in ("tiny", "tiny-reward"):
        tiny_checkpoint(name)
    runs = {(spins, busy): [] for spins in args.spins for busy in (False, True)}
    for _ in range(args.repeats):
        for (spins, busy), measured in runs.items():
            with neighbour(busy):
                seconds, cpu_seconds = measure(spins, args.steps, args.limit)
            measured.append(seconds)
            place = "beside a busy process" if busy else "alone"
            print(f"GOMP_SPINCOUNT {spins:6} {place:21} {seconds:6.1f} s, {cpu_seconds:6.1f} s on cores", flush=True)
    sides = {}
    for spins in args.spins:
        alone, beside = min(runs[spins, False]), min(runs[spins, True])
        sides[spins] = {"alone": round(alone, 1), "beside": round(beside, 1), "ratio": round(beside / alone, 2)}
    print(json.dumps({"benchmark": "neighbour", "cores": available_cores(), "steps": args.steps,
                      "threads": os.environ.get("OMP_NUM_THREADS"), "seconds by GOMP_SPINCOUNT": sides}))


if __name__ == "__main__":
    main()
