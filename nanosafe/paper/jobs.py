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
from nanosafe.io.progress import progress_bar
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
    queue = Queue(jobs, out, workers)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while queue.waiting or queue.running:
            queue.start_what_can()
            queue.show()
            time.sleep(0.05)
            queue.settle_what_ended()
    finally:
        queue.stop()
        queue.bar.close()
        signal.signal(signal.SIGTERM, previous)
    for name, why in queue.failed.items():
        print(visible(f"failed: {name}: {why}"), file=sys.stderr)
    return queue.failed


class Queue:
    """Jobs that wait, run, are done or have failed."""

    def __init__(self, jobs: Sequence[Job], out: Path, workers: int):
        self.out, self.workers = out, workers
        self.waiting = [job for job in jobs if not job.is_done(out)]
        self.running: list[Running] = []
        self.done = {job.name for job in jobs if job not in self.waiting}
        self.failed: dict[str, str] = {}  # name -> why
        self.orphans: set[str] = set()  # run without the command that started them
        threads = max(1, available_cores() // workers)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
        # Of jobs whose time is not known
        self.guess = max((job.seconds for job in jobs if job.seconds), default=1)
        self.bar = progress_bar(
            sum(job.seconds or self.guess for job in self.waiting), "", shown=bool(self.waiting),
            leave=True, smoothing=0, mininterval=2, miniters=0,
            bar_format="{percentage:3.0f}% |{bar}| {elapsed}, {remaining} left{postfix}",
        )  # fmt: skip

    def start_what_can(self) -> None:
        for job in list(self.waiting):
            broken = [name for name in job.needs if name in self.failed]
            if broken:
                self.failed[job.name] = f"not started: {broken[0]} failed"
                self.waiting.remove(job)
            elif len(self.running) < self.workers and self.done.issuperset(job.needs):
                self.start(job)

    def start(self, job: Job) -> None:
        """Start `job`, unless it still runs without the command that started it: then it is waited for."""
        lock = Lock(self.out / job.name / "job.lock")
        if not lock.take():
            if job.name not in self.orphans:
                tqdm.write(f"waiting for {job.name}, which goes on without the command that "
                           f"started it, as {lock.holder()}", file=sys.stderr)
            self.orphans.add(job.name)
            return
        with open(self.out / job.name / "log.txt", "a") as log:
            # In a session of its own, so that the terminal's Ctrl-C reaches it only through `stop`.
            # The lock goes with it.
            process = subprocess.Popen(
                [sys.executable, "-m", *job.command], env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                pass_fds=[lock.descriptor])
        lock.name_holder(process.pid)
        lock.close()
        self.running.append(Running(job, process, time.monotonic()))
        self.waiting.remove(job)

    def show(self) -> None:
        names = ", ".join(entry.job.name for entry in self.running)
        self.bar.set_postfix_str(names, refresh=False)
        self.bar.update(0)  # moves the clock, every few seconds

    def settle_what_ended(self) -> None:
        for entry in list(self.running):
            if entry.process.poll() is None:
                continue
            self.running.remove(entry)
            job, error = entry.job, self.settle(entry)
            if error:
                self.failed[job.name] = error
            else:
                self.done.add(job.name)
            took = f"{time.monotonic() - entry.began:.0f} s"
            tqdm.write(f"{job.name}: {took}{', failed' if error else ''}", file=sys.stderr)
            self.bar.update(job.seconds or self.guess)

    def settle(self, entry: Running) -> str | None:
        """Note how a job ended; -> what went wrong, if something did."""
        job, folder, code = entry.job, self.out / entry.job.name, entry.process.returncode
        done = code == 0 and (folder / job.output).exists()
        seconds = job.state(self.out)["seconds"] + time.monotonic() - entry.began
        state = {"command": list(job.command), "done": done, "seconds": seconds}
        write_atomic(folder / "job.json", (json.dumps(state) + "\n").encode())
        if done:
            return None
        last = (folder / "log.txt").read_text(errors="replace").splitlines()[-LOG_LINES:]
        return "\n  ".join([f"exit code {code}; {folder}/log.txt ends:", *last])

    def stop(self) -> None:
        """Ask what still runs, and what that has started, to end; wait for it. At another Ctrl-C, end it."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                for entry in self.running:
                    if entry.process.poll() is None:
                        os.killpg(entry.process.pid, number)
                for entry in self.running:
                    entry.process.wait()
                    self.settle(entry)
                return
            except KeyboardInterrupt:
                continue
