"""The worker process: late, crashed and greedy requests cost only themselves, and no process is left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanosafe.io import worker as module
from nanosafe.io.worker import Worker, WorkerError

PROBE = """
import os, sys, time
def answer(request):
    name, value = request
    if name == "crash": os._exit(value)
    if name == "allocate": return len(bytes(value))
    if name == "echo": return value
    if name == "fail": raise KeyError(value)
    if name == "hang": 9**9**9
    if name == "sleep": time.sleep(value)
    if name == "modules": return [m for m in sys.modules if m.startswith(value)]
    if name == "path": return sys.path
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
    assert str(Path(module.__file__).parent) not in worker.call(["path", None])  # its files hide no library


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


def test_long_requests_and_replies_pass(worker):
    text = "ü\n\ud83c" * 100_000  # many times what fits into the socket
    assert worker.call(["echo", text]) == text


def test_threads_share_the_process_and_get_their_own_replies(worker):
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: worker.call(["echo", i]), range(200))) == list(range(200))


def test_an_interrupted_request_does_not_shift_the_replies(worker):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        assert worker.call(["echo", 1]) == 1
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            worker.call(["sleep", 0.9])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert worker.call(["echo", 2]) == 2


@pytest.mark.parametrize("request_size", [1, 1 << 22])  # the longer one does not fit into the socket
def test_a_process_that_never_reads_its_request_is_late_too(worker, monkeypatch, request_size):
    monkeypatch.setattr(module, "SPARE_SECONDS", 0.1)
    first = worker.call(["pid", None])
    worker.seconds = 0.2
    os.kill(first, signal.SIGSTOP)
    guard = threading.Timer(10, worker.process.kill)  # a parent without a limit fails this test, not hangs it
    guard.start()
    start = time.monotonic()
    with pytest.raises(WorkerError, match="longer than 0.2 seconds"):
        worker.call(["echo", "a" * request_size])
    assert 0.2 < time.monotonic() - start < 5
    guard.cancel()
    assert worker.call(["pid", None]) != first


def test_a_file_that_does_not_load_is_not_the_requests_fault(tmp_path, capfd):
    (tmp_path / "broken.py").write_text("import no_such_module")
    with pytest.raises(RuntimeError, match="did not start"):
        Worker(tmp_path / "broken.py", seconds=1.0, memory_bytes=1 << 30).call(None)
    assert "no_such_module" in capfd.readouterr().err


def test_a_file_that_never_loads_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "START_SECONDS", 0.2)
    monkeypatch.setattr(module, "SPARE_SECONDS", 0.1)
    (tmp_path / "slow.py").write_text("import time; time.sleep(9)")
    worker, start = Worker(tmp_path / "slow.py", seconds=1.0, memory_bytes=1 << 30), time.monotonic()
    with pytest.raises(RuntimeError, match="did not start: it took longer than 0.2 seconds"):
        worker.call(None)
    assert time.monotonic() - start < 5


PARENT = """
import os, runpy, signal, sys, threading
Worker = runpy.run_path(sys.argv[1])["Worker"]  # without the package, whose torch takes seconds
worker = Worker(sys.argv[2], seconds=1.0, memory_bytes=1 << 30)
pid = worker.call(["pid", None])
print(pid, flush=True)
if sys.argv[3] == "killed idle": os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[3] == "killed busy":
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
    worker.call(["hang", None])
if sys.argv[3] == "interrupted":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.killpg(0, signal.SIGINT)
    print(worker.call(["pid", None]) == pid)
if sys.argv[3] == "forks":
    worker.lock.acquire()  # as if another thread were calling
    if os.fork() == 0:
        signal.alarm(20)  # nobody else would end a child that waits for the lock
        print(worker.call(["pid", None]) not in (pid, None), flush=True)
        sys.exit()  # runs what was registered for the exit, which must leave the parent's process alone
    os.wait()
    worker.lock.release()
    print(worker.call(["pid", None]) == pid)
if sys.argv[3] == "returns": print(sys.stdin.read())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the process in /proc")
@pytest.mark.parametrize("end, printed", [
    ("killed idle", []), ("killed busy", []), ("interrupted", ["True"]), ("forks", ["True", "True"]),
    ("returns", ["the parent's input"]),
])
def test_the_process_serves_its_parent_alone_and_ends_with_it(tmp_path, end, printed):
    (tmp_path / "probe.py").write_text(PROBE)
    command = [sys.executable, "-c", PARENT, module.__file__, tmp_path / "probe.py", end]
    with open(tmp_path / "errors", "w+") as errors:
        done = subprocess.run(command, input="the parent's input", stdout=subprocess.PIPE, stderr=errors, text=True,
                              start_new_session=True, timeout=30)  # fmt: skip
    assert done.returncode == (-signal.SIGKILL if "killed" in end else 0)
    pid, *rest = done.stdout.splitlines()
    assert rest == printed
    patience = time.monotonic() + 5
    while alive(int(pid)) and time.monotonic() < patience:
        time.sleep(0.05)
    outlived = alive(int(pid))
    if outlived:
        os.kill(int(pid), signal.SIGKILL)
    assert not outlived
    assert (tmp_path / "errors").read_text().replace("chatter\n", "") == ""
