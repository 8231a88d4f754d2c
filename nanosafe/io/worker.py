"""Work that may never end, in a process of its own.

A computation inside C (9**9**9) cannot be interrupted from within Python, so its process must be ended. A `Worker`
starts this file as a program, which loads one other file and calls its function `answer(request)` for each line of
JSON. It does not import the package, and so starts without torch. When its parent ends, the socket between them closes
and it ends too, or, if it is busy just then, when the request's time is over. POSIX only.
"""

import atexit
import contextlib
import faulthandler
import json
import os
import resource
import runpy
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

START_SECONDS = 60.0  # a cold start from a network disk is slow, and not the request's fault
SPARE_SECONDS = 10.0  # how much later than the process's own watchdog the parent gives up


class WorkerError(ValueError):
    """The request failed in the worker, was late, or ended the process."""


class Worker:
    """Calls `answer(request)` of the Python file `path` in a process that starts on first use and after every kill.

    Threads may share it; a forked child gets a process of its own.
    seconds: wall clock of one call, the start not counted. memory_bytes: address space, where the platform limits it.
    """

    def __init__(self, path: str | Path, *, seconds: float, memory_bytes: int):
        # -P rather than -I: the folder of a script stays off the path, packages in the user's site folder stay on it
        self.command = [sys.executable, "-P", __file__, str(path), str(seconds), str(memory_bytes)]
        self.seconds = seconds
        self._forget()
        atexit.register(self.stop)
        os.register_at_fork(after_in_child=self._forget)  # process and lock stay with the parent

    def _forget(self) -> None:
        self.lock, self.process, self.socket = threading.Lock(), None, None

    def call(self, request: Any) -> Any:
        """`answer(request)`, both JSON values.

        Raises TypeError for other values, WorkerError, and RuntimeError if the process does not even start.
        """
        line = json.dumps(request).encode() + b"\n"
        with self.lock:
            try:
                if self.process is None or self.process.poll() is not None:
                    self._start()
                reply = json.loads(self._exchange(line, self.seconds))
            except BaseException:  # an interrupt too: the next caller must not read this one's reply
                self.stop()
                raise
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply["value"]

    def stop(self) -> None:
        """End the process; the next call starts another."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            self.socket.close()

    def _start(self) -> None:
        self.stop()
        # Sockets rather than pipes: they have timeouts, and no buffers, which a forked child would flush.
        self.socket, remote = socket.socketpair()
        with remote:
            # In a session of its own, because Ctrl-C is for the parent.
            self.process = subprocess.Popen(self.command, stdin=remote, stdout=remote,
                                            start_new_session=True)  # fmt: skip
        try:
            self._exchange(b"", START_SECONDS)
        except WorkerError as error:
            raise RuntimeError(f"{' '.join(self.command)} did not start: {error}") from None

    def _exchange(self, line: bytes, seconds: float) -> bytes:
        """Send `line`, and return the process's next line. Raises WorkerError if it ends or is late."""
        start, reply = time.monotonic(), bytearray()
        # The process hangs longer than this only if that happens before it has set its watchdog.
        self.socket.settimeout(seconds + SPARE_SECONDS)
        with contextlib.suppress(OSError):  # the reply stays incomplete
            self.socket.sendall(line)
            while not reply.endswith(b"\n"):
                received = self.socket.recv(1 << 16)
                if not received:
                    break
                reply += received
        if reply.endswith(b"\n"):
            return bytes(reply)
        late = time.monotonic() - start >= seconds
        process = self.process
        self.stop()
        if late:
            raise WorkerError(f"it took longer than {seconds:g} seconds")
        raise WorkerError(f"its process ended with exit code {process.returncode}")


def _serve(path: str, seconds: float, memory_bytes: int) -> None:
    """What the process does: answer the requests that come in, line by line."""
    replies, nowhere = os.fdopen(os.dup(1), "w"), open(os.devnull, "w")
    os.dup2(2, 1)  # what the file prints goes to the console, not among the replies
    with contextlib.suppress(ValueError, OSError):  # macOS refuses it
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    answer = runpy.run_path(path)["answer"]
    print(file=replies, flush=True)  # ready
    for line in sys.stdin.buffer:
        # The watchdog is a thread in C that needs no interpreter lock: it ends this process in the midst of a
        # computation in C, and also when the parent is gone.
        faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
        try:
            reply = json.dumps({"value": answer(json.loads(line))})
        except MemoryError:
            reply = json.dumps({"error": f"it needs more than {memory_bytes >> 20} MiB of memory"})
        except Exception as error:
            reply = json.dumps({"error": f"{type(error).__name__}: {error}"[:2000]})
        faulthandler.cancel_dump_traceback_later()
        print(reply, file=replies, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
