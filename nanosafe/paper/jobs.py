"""Commands as processes side by side, each in a folder of its own: started when what they need is done, and resumable.

A job's folder gets log.txt and, when the job ends, job.json: {"command", "done", "seconds"}. A job is done if that says
so of the same command and its output stands; any other is started (again), and resumes by itself as far as it can. A
job holds job.lock as long as it runs: one whose parent was killed is waited for, not started beside itself.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from nanosafe.io.files import read_own, write_atomic
from nanosafe.io.locks import Lock
from nanosafe.io.machine import available_cores
from nanosafe.train.cli import visible

ROOT = Path(__file__).resolve().parents[2]
LOG_LINES = 8  # of a failed job that are shown


@dataclass(frozen=True)
class Job:
    name: str  # and its folder in OUT
    command: tuple[str, ...]  # module and its arguments
    output: str = ""  # what stands in the folder when the job is complete
    needs: tuple[str, ...] = ()  # names of jobs
    seconds: float | None = None  # expected; None: not known

    def state(self, out: Path) -> dict:
        """job.json; seconds are those of all runs, interrupted ones too. Raises ValueError where it is damaged."""
        path = out / self.name / "job.json"
        if not path.exists():
            return {"command": [], "done": False, "seconds": 0.0}
        return read_own(path, {"command": list, "done": bool, "seconds": float},
                        "delete it, and the job is started again and goes on where it was")

    def is_done(self, out: Path) -> bool:
        state = self.state(out)
        return state["done"] and state["command"] == list(self.command) and (out / self.name / self.output).exists()


@dataclass
class Running:
    job: Job
    process: subprocess.Popen
    began: float


def run_jobs(jobs: Sequence[Job], out: Path, workers: int) -> dict[str, str]:
    """Run what is not done yet, `workers` at once, in order as needs allow; -> {name of a failed job: why}.

    Ctrl-C or SIGTERM lets running jobs stop by themselves (training scripts finish their step and save), a second one
    kills them; raises KeyboardInterrupt.
    """
    threads = max(1, available_cores() // workers)
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    orphans: set[str] = set()
    waiting = [job for job in jobs if not job.is_done(out)]
    done, failed = {job.name for job in jobs} - {job.name for job in waiting}, {}
    running: list[Running] = []
    guess = max((job.seconds for job in jobs if job.seconds), default=1)  # of jobs whose time is not known
    bar = tqdm(total=sum(job.seconds or guess for job in waiting), smoothing=0, disable=not waiting,
               mininterval=2, miniters=0, bar_format="{percentage:3.0f}% |{bar}| {elapsed}, {remaining} left{postfix}")
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            for job in list(waiting):
                broken = [name for name in job.needs if name in failed]
                if broken:
                    failed[job.name] = f"not started: {broken[0]} failed"
                elif len(running) < workers and done.issuperset(job.needs):
                    own = Lock(out / job.name / "job.lock")
                    if not own.take():
                        if job.name not in orphans:
                            tqdm.write(f"waiting for {job.name}, which goes on without the command "
                                       f"that started it, as {own.holder()}", file=sys.stderr)
                        orphans.add(job.name)
                        continue
                    running.append(_start(job, out, environment, own))
                else:
                    continue
                waiting.remove(job)
            bar.set_postfix_str(", ".join(entry.job.name for entry in running), refresh=False)
            bar.update(0)  # moves the clock, every few seconds
            time.sleep(0.05)
            for entry in [entry for entry in running if entry.process.poll() is not None]:
                running.remove(entry)
                error, took = _settle(entry, out), f"{time.monotonic() - entry.began:.0f} s"
                if error:
                    failed[entry.job.name] = error
                else:
                    done.add(entry.job.name)
                tqdm.write(f"{entry.job.name}: {took}{', failed' if error else ''}", file=sys.stderr)
                bar.update(entry.job.seconds or guess)
    finally:
        _stop(running, out)
        bar.close()
        signal.signal(signal.SIGTERM, previous)
    for name, why in failed.items():
        print(visible(f"failed: {name}: {why}"), file=sys.stderr)
    return failed


def _start(job: Job, out: Path, environment: dict, lock: Lock) -> Running:
    with open(out / job.name / "log.txt", "a") as log:
        # In a session of its own, so that the terminal's Ctrl-C reaches it only through _stop. The lock
        # goes with it.
        process = subprocess.Popen([sys.executable, "-m", *job.command], env=environment, stdin=subprocess.DEVNULL,
                                   stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                                   pass_fds=[lock.descriptor])
    lock.name_holder(process.pid)
    lock.close()
    return Running(job, process, time.monotonic())


def _settle(entry: Running, out: Path) -> str | None:
    """Note how a job ended; -> what went wrong, if something did."""
    job, folder, code = entry.job, out / entry.job.name, entry.process.returncode
    done = code == 0 and (folder / job.output).exists()
    seconds = job.state(out)["seconds"] + time.monotonic() - entry.began
    state = {"command": list(job.command), "done": done, "seconds": seconds}
    write_atomic(folder / "job.json", (json.dumps(state) + "\n").encode())
    last = (folder / "log.txt").read_text(errors="replace").splitlines()[-LOG_LINES:]
    return None if done else "\n  ".join([f"exit code {code}; {folder}/log.txt ends:", *last])


def _stop(running: Sequence[Running], out: Path) -> None:
    """Ask what still runs, and what that has started, to end; wait for it. At another Ctrl-C, end it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            for entry in running:
                if entry.process.poll() is None:
                    os.killpg(entry.process.pid, number)
            for entry in running:
                entry.process.wait()
                _settle(entry, out)
            return
        except KeyboardInterrupt:
            continue
