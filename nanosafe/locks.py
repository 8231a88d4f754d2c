"""Who may write to a folder: one process at a time, by locks that outlive nobody.

A lock is flock(2) on a file that stays where it is; its text says who holds it. The kernel lets go when the last
process that has the lock open ends, however it ends, so there is never a stale one to delete. macOS is like Linux. On
NFS, Linux makes it a lock of the server's, which holds between hosts unless the mount says nolock or local_lock. Where a
file system has no locks (Lustre without -o flock), writing goes on behind a warning.
"""

import fcntl
import os
import socket
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"  # in the folder that it is for
# A process that starts anew on what it holds already is no second writer: after an error in a notebook, say.
_held: "weakref.WeakValueDictionary[Path, Lock]" = weakref.WeakValueDictionary()


class Lock:
    """The lock `path`, made if it is not there; held from `take` until `close`, or until nothing refers to this."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        # Programs that are started do not inherit it (PEP 446), so that none goes on holding it by chance.
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self.close = weakref.finalize(self, os.close, self.descriptor)

    def take(self, wait: bool = False) -> bool:
        """Whether it is held now; wait: however long that takes."""
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        except OSError as error:
            print(f"warning: {self.path} cannot be locked ({error.strerror}): nothing keeps a second process from "
                  f"writing to {self.path.parent}", file=sys.stderr)
        self.name_holder(os.getpid())
        return True

    def name_holder(self, process: int) -> None:
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, f"process {process} on {socket.gethostname()}".encode(), 0)

    def holder(self) -> str:
        return os.pread(self.descriptor, 300, 0).decode(errors="replace") or "another process"


def hold(folder: Path) -> Lock:
    """The lock of `folder`, which is made if need be. Raises ValueError naming who holds it."""
    path = folder.resolve() / LOCK
    held = _held.get(path)
    if held is not None and held.close.alive:
        return held
    lock = Lock(path)
    if not lock.take():
        raise ValueError(f"{folder} is being written by {lock.holder()}: wait for that to end, or set another --out")
    _held[path] = lock
    return lock


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """`path` held by one process at a time; the others wait for it."""
    lock = Lock(path)
    if not lock.take():
        print(f"waiting for {lock.holder()}, which builds {path.stem}", file=sys.stderr, flush=True)
        lock.take(wait=True)
    try:
        yield
    finally:
        lock.close()
