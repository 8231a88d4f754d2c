"""Who may write to a folder: one process at a time, by locks that outlive nobody.

A lock is flock(2) on a file that stays; its text says who holds it. The kernel lets go when the
last process that has it open ends, however it ends: there is never a stale one to delete. macOS is
like Linux. On NFS, Linux asks the server, so that it holds between hosts, unless the mount says
nolock or local_lock. Where a file system has no locks (Lustre without -o flock), there is a warning.
"""

import fcntl
import os
import socket
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanosafe.parallel import Ranks

LOCK = ".lock"  # in the folder that it is for
# What this process holds, for a run that starts anew in a notebook after an error is no second writer.
_held: "weakref.WeakValueDictionary[Path, Lock]" = weakref.WeakValueDictionary()


class Lock:
    """A lock on the file `path`, held from `take` until `close`, or until nothing refers to it."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        # A started program does not inherit the descriptor (PEP 446), and so never holds the lock by chance.
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self.close = weakref.finalize(self, os.close, self.descriptor)

    def take(self, wait: bool = False) -> bool:
        """Take the lock if no other process has it, or with `wait` as soon as none has; whether it is held now."""
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        except OSError as error:
            print(f"warning: nothing keeps a second process from writing to {self.path.parent}: "
                  f"{self.path} cannot be locked ({error.strerror})", file=sys.stderr)
        self.name_holder(os.getpid())
        return True

    def name_holder(self, process: int) -> None:
        """Write who holds the lock into its file, for `holder`."""
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, f"process {process} on {socket.gethostname()}".encode(), 0)
        os.fsync(self.descriptor)  # NFS may keep it from other hosts until then

    def holder(self) -> str:
        return os.pread(self.descriptor, 300, 0).decode(errors="replace") or "another process"


def hold(folder: Path) -> Lock:
    """The lock of `folder`, which is made if need be. Raises ValueError naming who holds it."""
    path = folder.resolve() / LOCK
    lock = _held.get(path)
    if lock is not None and lock.close.alive:
        return lock
    lock = _held[path] = Lock(path)
    if not lock.take():
        holder = lock.holder()
        lock.close()
        raise ValueError(
            f"{folder} is being written by {holder}: wait for that to end, or set another --out")
    return lock


def hold_shared(folder: Path, ranks: Ranks) -> Lock | None:
    """`hold(folder)` by the main rank, which alone gets a lock; every rank calls this before it looks into `folder`.

    Raises ValueError, too, if another node has a folder of its own by this name: then every rank raises it.
    """
    lock = hold(folder) if ranks.main else None
    [writer] = ranks.gather([lock.holder()] if lock else [])
    path = folder.resolve() / LOCK
    # The name of this run's writer cannot lie in the lock file of another folder.
    shared = path.exists() and path.read_text(errors="replace") == writer
    strangers = ranks.gather([] if shared else [f"{folder.resolve()} on {socket.gethostname()}"])
    if strangers:
        raise ValueError(f"{strangers[0]} is not the folder that {writer} writes to: "
                         "put --out on a file system that all nodes share")
    return lock


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` within the block; other processes wait for it."""
    lock = Lock(path)
    if not lock.take():
        print(f"waiting for {lock.holder()}, which builds {path.stem}", file=sys.stderr, flush=True)
        lock.take(wait=True)
    try:
        yield
    finally:
        lock.close()
