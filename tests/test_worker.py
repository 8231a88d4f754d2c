"""The worker process: late, crashed and greedy requests cost only themselves, and no process is left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import nanosafe
from nanosafe.worker import Worker, WorkerError

PROBE = """
import os, sys, time
def answer(request):
    name, value = request
    if name == "crash": os._exit(value)
    if name == "allocate": return len(bytes(value))
    if name == "count": return len(value)
    if name == "fail": raise KeyError(value)
    if name == "hang": 9**9**9
    if name == "modules": return [m for m in sys.modules if m.startswith(value)]
    if name == "pid": print("chatter"); return os.getpid()
"""


@pytest.fixture
def worker(tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    worker = Worker(tmp_path / "probe.py", seconds=1.0, memory_bytes=1 << 30)
    yield worker
    worker.stop()


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().split(")")[-1].split()[0] != "Z"


def test_calls_share_one_process_that_has_no_torch_and_may_print(worker):
    assert worker.call(["pid", None]) == worker.call(["pid", None]) == worker.process.pid != os.getpid()
    assert worker.call(["modules", "torch"]) == worker.call(["modules", "nanosafe"]) == []


def test_a_late_request_is_killed_in_time_and_the_next_one_works(worker):
    first = worker.call(["pid", None])
    guard = threading.Timer(10, worker.process.kill)  # a worker without a limit fails this test, not hangs it
    guard.start()
    start = time.monotonic()
    with pytest.raises(WorkerError, match="longer than 1 second"):
        worker.call(["hang", None])
    assert 0.9 < time.monotonic() - start < 5
    guard.cancel()
    assert worker.call(["pid", None]) != first
    assert not alive(first)


def test_failures_are_told_and_a_crash_costs_one_request(worker):
    with pytest.raises(WorkerError, match="KeyError: 'name'"):
        worker.call(["fail", "name"])
    with pytest.raises(WorkerError, match="exit code 7"):
        worker.call(["crash", 7])
    assert worker.call(["modules", "torch"]) == []
    worker.process.kill()  # by somebody else, between two requests
    worker.process.wait()
    assert worker.call(["modules", "torch"]) == []


@pytest.mark.skipif(sys.platform != "linux", reason="other platforms do not limit address space")
def test_memory_is_limited(worker):
    assert worker.call(["allocate", 1 << 20]) == 1 << 20
    with pytest.raises(WorkerError, match="more than 1024 MiB of memory"):
        worker.call(["allocate", 2 << 30])


def test_long_requests_pass(worker):
    assert worker.call(["count", "ü\n" * 2_000_000]) == 4_000_000


def test_a_file_that_does_not_load_is_not_the_requests_fault(tmp_path, capfd):
    (tmp_path / "broken.py").write_text("import no_such_module")
    with pytest.raises(RuntimeError, match="did not start"):
        Worker(tmp_path / "broken.py", seconds=1.0, memory_bytes=1 << 30).call(None)
    assert "no_such_module" in capfd.readouterr().err


PARENT = """
import os, signal, sys, threading, time
from nanosafe.worker import Worker
worker = Worker(sys.argv[1], seconds=1.0, memory_bytes=1 << 30)
print(worker.call(["pid", None]), flush=True)
if sys.argv[2] == "killed idle": os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "killed busy":
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
    worker.call(["hang", None])
print(sys.stdin.read())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the process in /proc")
@pytest.mark.parametrize("end", ["killed idle", "killed busy", "returns"])
def test_the_process_ends_with_its_parent_and_leaves_its_stdin_alone(worker, tmp_path, end):
    environment = {**os.environ, "PYTHONPATH": str(Path(nanosafe.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", PARENT, tmp_path / "probe.py", end], input="the parent's input",
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)  # fmt: skip
    assert done.returncode == (0 if end == "returns" else -9)
    pid, *rest = done.stdout.splitlines()
    assert rest == (["the parent's input"] if end == "returns" else [])
    patience = time.monotonic() + 5
    while alive(int(pid)) and time.monotonic() < patience:
        time.sleep(0.05)
    outlived = alive(int(pid))
    if outlived:
        os.kill(int(pid), signal.SIGKILL)
    assert not outlived
