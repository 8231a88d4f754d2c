"""Kills a small RL run with SIGKILL at random moments, and checks that nothing finished is lost or done twice.

    python benchmarks/survival.py                      # 20 kills of one process
    python benchmarks/survival.py --processes 2        # of torchrun with two ranks; each time one of the two is killed

The run saves after every step, so that many moments lie within a save. After each kill the same command goes on, up to
the last kill; then it runs to its end and is compared with a run that nobody touched: final weights and optimizer state
bit by bit, every metric that is not a time. Rows that a complete checkpoint covered must come back as they were, times
included. The base of the tiny world is built first if the cache has none. The last line is one JSON object.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from nanosafe.tiny.build import tiny_checkpoint

ROOT = Path(__file__).parents[1]


def command(out: Path, args: argparse.Namespace) -> list[str]:
    start = [sys.executable]
    if args.processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.processes}"]
    return [*start, str(ROOT / "train_rl.py"), "--device", "cpu", "--steps", str(args.steps), "--prompts-per-step", "8",
            "--max-response-tokens", "64", "--eval-every", str(args.steps), "--save-every", "1", "--keep", "2",
            "--out", str(out)]  # fmt: skip


def start(out: Path, args: argparse.Namespace) -> subprocess.Popen:
    return subprocess.Popen(command(out, args), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})  # fmt: skip


def ranks_of(process: subprocess.Popen) -> list[int]:
    """Process ids of the ranks: the process itself, or torchrun's children that run the script."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    scripts = [int(pid) for pid in children if b"train_rl.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return scripts or [process.pid]


def rows(out: Path) -> dict[int, dict]:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["step"]: row for row in map(json.loads, lines)}


def newest(out: Path) -> int:
    return max((int(path.name[5:]) for path in (out / "checkpoints").glob("step-*")), default=0)


def without_clock(row: dict) -> dict:
    return {name: value for name, value in row.items() if not name.startswith(("time/", "memory/"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="of the run (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="ranks (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    args = parser.parse_args()
    for name in ("tiny", "tiny-reward"):
        tiny_checkpoint(name)
    moments, kills = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder, "whole"), Path(folder, "broken")
        output, _ = (process := start(whole, args)).communicate()
        assert process.returncode == 0, output
        covered: dict[int, dict] = {}
        while newest(broken) < args.steps:
            process, lines = start(broken, args), []
            for line in process.stdout:
                lines.append(line)
                if re.match(r"step \d+/", line) and len(kills) < args.kills:
                    break
            if len(kills) < args.kills and process.poll() is None:
                time.sleep(moments.random() * 0.6)  # of steps of about 0.3 s, most of it saving
                saving = bool(list(broken.rglob(".partial-*")))
                victim, at = moments.choice(ranks_of(process)), time.perf_counter()
                os.kill(victim, signal.SIGKILL)
                lines += process.stdout.readlines()
                process.wait()
                kills.append({"after": newest(broken), "during a save": saving, "over in": time.perf_counter() - at})
                print(f"kill {len(kills)}: {kills[-1]}", flush=True)
            else:
                lines += process.stdout.readlines()
                assert process.wait() == 0, "".join(lines)
            after = rows(broken)
            assert all(after[step] == row for step, row in covered.items()), "a row that was covered has changed"
            resumed = [line for line in lines if line.startswith("resuming after step")]
            assert bool(resumed) == bool(covered) and all(f"step {max(covered)} " in line for line in resumed), resumed
            covered = {step: row for step, row in after.items() if step <= newest(broken)}
        state = Path("checkpoints", f"step-{args.steps:06d}", "trainer", "optimizer.safetensors")
        for file in (Path("final", "model.safetensors"), state):
            a, b = load_file(whole / file), load_file(broken / file)
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), file
        for step, row in rows(whole).items():
            assert without_clock(row) == without_clock(rows(broken)[step]), step
    times = sorted(kill["over in"] for kill in kills)
    print(json.dumps({
        "benchmark": "survival", "processes": args.processes, "steps": args.steps, "kills": len(kills),
        "during a save": sum(kill["during a save"] for kill in kills),
        "bit-equal to the untouched run": True,  # or an assertion above had failed
        "seconds until all ranks had ended, at most": round(times[-1], 2),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
