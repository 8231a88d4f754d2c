"""Several processes as one: who does what, and the few exchanges between them. With one process every call is local.

Plain data parallel: each rank holds a whole copy of the model and its own rows, and sums of gradients and statistics
are added over the ranks. gloo on CPU, nccl on CUDA; started by torchrun, or as plain `python` for one process.
"""

import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(hours=2)  # of an exchange: longer than any rank waits for another's rollout
PATIENCE = timedelta(days=1)  # for what only rank 0 does and everyone needs, such as a download


class Ranks:
    """This process among `world` processes; `main` is rank 0, which writes files and talks to the console."""

    def __init__(self, device: str | None = None, *, alone: bool = False):
        """Join the process group of torchrun's environment, if any, unless `alone`, for what one rank does while the
        others wait. device: cpu, cuda, or None to choose."""
        environment = {} if alone else os.environ
        self.rank, self.world = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if kind.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"--device {device}: no CUDA device is visible to PyTorch; use --device cpu")
        local = int(os.environ.get("LOCAL_RANK", 0))
        self.device = torch.device("cuda", local) if kind == "cuda" else torch.device(kind)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        elif os.environ.get("OMP_NUM_THREADS") == "1" and (here := int(os.environ.get("LOCAL_WORLD_SIZE", 1))) > 1:
            # What torchrun sets where nothing is set, however many cores there are.
            torch.set_num_threads(max(1, available_cores() // here))
        self.main = self.rank == 0
        self.patient = None
        if self.world > 1:
            if not dist.is_initialized():
                dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=TIMEOUT)
            self.patient = dist.new_group(backend="gloo", timeout=PATIENCE)

    def own(self, rows: Iterable[int]) -> list[int]:
        """The rows, numbered over all ranks, that this rank works on."""
        return [row for row in rows if row % self.world == self.rank]

    def share(self, costs: Sequence[float]) -> range:
        """This rank's part of a list that is cut into one run for each rank, of nearly equal cost, in rank order."""
        # An item belongs to the rank in whose stretch of the total cost its middle lies.
        total = sum(costs)
        owners = [int((end - cost / 2) / total * self.world)
                  for end, cost in zip(accumulate(costs), costs, strict=True)]
        return range(bisect_left(owners, self.rank), bisect_right(owners, self.rank))

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add `tensor` over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def gather(self, items: list) -> list:
        """The lists of all ranks, one behind the other, on every rank. For small Python objects."""
        if self.world == 1:
            return list(items)
        parts: list = [None] * self.world
        dist.all_gather_object(parts, items, group=self.patient)
        return [item for part in parts for item in part]

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on any rank; a decision all ranks take alike."""
        return bool(self.max_(torch.tensor(float(flag), device=self.device)).item())

    @contextmanager
    def main_first(self):
        """Rank 0 runs the block before the others do: what it downloads, they find in the cache."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            dist.barrier(group=self.patient)

    def print(self, *values) -> None:
        if self.main:
            print(*values, flush=True)

    def close(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
