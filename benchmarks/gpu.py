"""Everything that needs a GPU, in one command of at most nine minutes: correctness first, then speed.

    python benchmarks/gpu.py --out gpu-results                       # on one H100 or H200
    python benchmarks/gpu.py --out gpu-results --only decode head    # some stages
    python benchmarks/gpu.py --smoke --device cpu                    # the same code in tiny shapes, without a GPU

card      copy, read, products: what the other figures are shares of
tests     tests/interpreted_*.py and tests/test_cuda.py on the card
logits    four families against transformers
decode    replayed steps of the 8B shape at 1, 16 and 256 rows; whole `generate`
train     forward and backward of the 8B shape, its peak beside the plan's; the optimizer's step
head      log-probs and entropies against the matrix products in them
rl, rl8b  train_rl.py as a user starts it, on random weights; rl8b: --lora-rank 32 below 120 GB

Each stage (gpu_stages.py) is a process of its own with a limit of its own, so that a crash, a hang or a full memory
costs its stage alone. All processes start at once and import torch while earlier stages run; each waits for its turn.
Every result is a JSON line at once, on the console and in OUT/gpu.jsonl; OUT/log.txt has what went to stderr. Nothing
is installed or fetched: it needs torch, transformers and pytest with xdist, and the repository beside it. The last line
says which stages ended well.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Seconds after which a stage is stopped.
LIMITS = {"card": 40, "tests": 130, "logits": 50, "decode": 90, "train": 90, "head": 40, "rl": 75, "rl8b": 110}
SHORTEST = 10  # seconds; with less left of the budget a stage is not begun
WEIGHTS_ROOM = 40e9  # bytes for random weights and run folders


class Log:
    """Lines of JSON to the console and to OUT/gpu.jsonl."""

    def __init__(self, out: Path):
        self.file, self.lock = open(out / "gpu.jsonl", "a"), threading.Lock()

    def write(self, line: str) -> None:
        with self.lock:
            print(line.rstrip(), flush=True)
            self.file.write(line.rstrip() + "\n")
            self.file.flush()

    def say(self, **values) -> None:
        self.write(json.dumps(values))

    def follow(self, process: subprocess.Popen) -> None:
        """Write down what the process prints, until it ends."""
        for line in process.stdout:
            self.write(line)


def scratch_folder() -> Path:
    """In memory where there is room for weights, else among the temporary files."""
    memory = Path("/dev/shm")
    fits = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > WEIGHTS_ROOM
    return Path(tempfile.mkdtemp(prefix="nanosafe-gpu-", dir=memory if fits else None))


def start(stage: str, args: argparse.Namespace, scratch: Path, log: Log) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_stages.py"), stage, "--device", args.device,
               "--scratch", str(scratch)]
    if args.smoke:
        command.append("--smoke")
    folders = [ROOT, ROOT / "benchmarks", ROOT / "tests" / "helpers", os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(map(str, folders))
    environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", **os.environ, "HF_HUB_OFFLINE": "1",
                   "PYTHONUNBUFFERED": "1", "PYTHONPATH": path, "NANOSAFE_CACHE": str(scratch)}
    with open(scratch / f"{stage}.log", "w") as errors:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                                   start_new_session=True, cwd=ROOT, env=environment)
    process.reader = threading.Thread(target=log.follow, args=(process,), daemon=True)
    process.reader.start()
    return process


def end(process: subprocess.Popen) -> None:
    """Kill it with all that it has started, and write down what it had said."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    process.reader.join(timeout=5)


def drive(args: argparse.Namespace, scratch: Path) -> dict[str, bool]:
    """Run the stages one after the other; returns which of them ended well."""
    deadline, log, well = time.monotonic() + args.budget, Log(args.out), {}
    waiting = {stage: start(stage, args, scratch, log) for stage in args.only}
    preparing = None
    if {"rl", "rl8b"} & set(args.only):  # their weights, beside the first stages
        preparing = start("prepare", args, scratch, log)
        preparing.stdin.close()
    for stage, process in waiting.items():
        begun, left = time.monotonic(), deadline - time.monotonic()
        limit, stopped = min(LIMITS[stage], left - 5), None
        if limit < SHORTEST:
            stopped = f"not begun: {left:.0f} s are left of the budget"
        else:
            process.stdin.close()  # its turn
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                stopped = f"stopped after {limit:.0f} s"
        end(process)
        errors = (scratch / f"{stage}.log").read_text(errors="replace")
        with open(args.out / "log.txt", "a") as file:
            print(f"==== {stage}", errors[-200_000:], sep="\n", file=file)
        well[stage] = process.returncode == 0
        if not well[stage] and stopped is None:
            stopped = errors.strip()[-300:]
        log.say(stage=stage, done=True, ok=well[stage], seconds=round(time.monotonic() - begun, 1), error=stopped)
    if preparing is not None:
        end(preparing)
    return well


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of gpu.jsonl and log.txt")
    parser.add_argument("--only", nargs="+", choices=LIMITS, default=list(LIMITS), help="stages to run")
    parser.add_argument("--budget", type=float, default=530, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args()
    if args.device == "cpu" and not args.smoke:
        parser.error("--device cpu is for --smoke: the true shapes would take hours")
    args.out.mkdir(parents=True, exist_ok=True)
    args.out = args.out.resolve()
    scratch = scratch_folder()
    try:
        well = drive(args, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(json.dumps({"benchmark": "gpu", "ok": all(well.values()), "stages": well}))
    raise SystemExit(not all(well.values()))


if __name__ == "__main__":
    main()
