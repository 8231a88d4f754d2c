"""Several processes as one: who does what, and the few exchanges between them. With one process every call is local.

Each rank runs its own micro-batches through a model of which it keeps 1/world of every weight, gradient and moment
(`shard`: FSDP2, arXiv 2304.11277); the weights of a layer are gathered just before it computes. For a rollout they are
gathered once (`gathered`). gloo on CPU, nccl on CUDA; started by torchrun, or as plain `python` for one process.
"""

import heapq
import os
import re
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from nanosafe.io.machine import available_cores

TIMEOUT = timedelta(hours=2)  # of an exchange: longer than any rank waits for another's rollout
PATIENCE = timedelta(days=1)  # for what only rank 0 does and everyone needs, such as a download
PARENT_SECONDS = 1.0  # between two looks at whether torchrun still lives


class Ranks:
    """This process among `world` processes; `main` is rank 0, which writes files and talks to the console."""

    def __init__(self, device: str | None = None, *, alone: bool = False):
        """Join the process group of torchrun's environment, if any, unless `alone`, for what one rank does while the
        others wait. device: cpu, cuda, or None to choose."""
        environment = {} if alone else os.environ
        self.rank, self.world = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", kind):
            raise ValueError(f"--device {device}: it must be cpu or cuda")
        if kind.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"--device {device}: no CUDA device is visible to PyTorch; use --device cpu")
        local = int(os.environ.get("LOCAL_RANK", 0))
        self.device = torch.device("cuda", local) if kind == "cuda" else torch.device(kind)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            # cuBLAS may add the parts of a bfloat16 product in bfloat16 unless told not to.
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        elif os.environ.get("OMP_NUM_THREADS") == "1" and (here := int(os.environ.get("LOCAL_WORLD_SIZE", 1))) > 1:
            # What torchrun sets where nothing is set, however many cores there are.
            torch.set_num_threads(max(1, available_cores() // here))
        self.main = self.rank == 0
        self.patient = None
        if self.world > 1:
            if not dist.is_initialized():
                if "TORCHELASTIC_RUN_ID" in os.environ:
                    end_with_parent()
                join_group(self.device)
            self.patient = dist.new_group(backend="gloo", timeout=PATIENCE)

    def balance(self, costs: Sequence[float]) -> list[list[int]]:
        """The items, numbered as in `costs`, of each rank: the dearest are dealt first, to whoever has least."""
        parts: list[list[int]] = [[] for _ in range(self.world)]
        loads = [(0.0, rank) for rank in range(self.world)]
        for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
            load, rank = heapq.heappop(loads)
            parts[rank].append(item)
            heapq.heappush(loads, (load + costs[item], rank))
        return [sorted(part) for part in parts]

    def share(self, costs: Sequence[float]) -> range:
        """This rank's part of a list that is cut into one run for each rank, of nearly equal cost, in rank order."""
        # An item belongs to the rank in whose stretch of the total cost its middle lies.
        total = sum(costs)
        owners = [int((end - cost / 2) / total * self.world)
                  for end, cost in zip(accumulate(costs), costs, strict=True)]
        return range(bisect_left(owners, self.rank), bisect_right(owners, self.rank))

    def spread(self, items: Sequence, work: Callable[[Sequence], list], cost: Callable = len) -> list:
        """`work` of all items, in order, each rank having done its share of them."""
        mine = self.share([cost(item) for item in items])
        return self.gather(work(items[mine.start : mine.stop]))

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


def join_group(device: torch.device, **options) -> None:
    """Join the process group of torchrun's environment, or of `options` (see init_process_group)."""
    if device.type == "cuda":  # told which GPU is this rank's, nccl need not guess at the first exchange
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device, **options)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT, **options)


def end_with_parent() -> None:
    """End this process soon after its parent, torchrun, which would have ended the ranks that wait for
    one that died."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def shard(model: nn.Module, ranks: Ranks, dtype: torch.dtype) -> None:
    """Spread a decoder's parameters over the ranks, in place: each keeps its rows of every one and computes in `dtype`.

    The parameters become DTensors in the type they have (float32: they are the masters). Gradients arrive in them as
    float32 sums over the ranks. Every rank must run equally many forward and backward passes: each is an exchange.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    # cast_forward_inputs would turn RoPE's cos and sin into bfloat16.
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    # The head is read after the forward pass, outside it: what belongs to no layer stays gathered until the backward.
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden")
    for module in model.modules():
        if isinstance(module, FSDPModule):  # a sum, not a mean: losses have one global denominator
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def whole(tensor: Tensor) -> Tensor:
    """The tensor that `tensor` is, or is this rank's part of. Of a part, every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(read: Callable[[slice], Tensor], like: DTensor) -> DTensor:
    """A tensor spread over the ranks as `like` is, each of which reads only its rows: read(rows) -> [rows, ...]."""
    mesh, count = like.device_mesh, like.to_local().shape[0]
    start = min(mesh.get_local_rank() * -(-like.shape[0] // mesh.size()), like.shape[0])  # cut as torch.chunk does
    part = read(slice(start, start + count)).to(like.device)
    return DTensor.from_local(part, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


@contextmanager
@torch.no_grad()
def gathered(model: nn.Module, dtype: torch.dtype) -> Iterator[nn.Module]:
    """The model to sample with: a copy of a sharded one, whole and in `dtype`, that is gone afterwards; else itself."""
    if not isinstance(model, FSDPModule):
        yield model
        return
    model.reshard()
    with torch.device("meta"):
        copy = type(model)(model.config)  # a plain decoder: the class that FSDP gives a sharded one makes those
    copy.load_state_dict({name: whole(part.to(dtype)) for name, part in model.state_dict().items()}, assign=True)
    yield copy.requires_grad_(False)


@contextmanager
def visiting(model: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """`model` on `device` for a turn, then where it was before; nothing moves if that is the same.

    Only for models that do not change: what comes back is what went. A model that visits a GPU stays pinned at home
    from its first visit on: pageable memory crosses at a fraction of the link's speed, and makes the host wait.
    """
    home = []
    for parameter in model.parameters():
        if device.type == "cuda" and parameter.device.type == "cpu":
            parameter.data = parameter.data.pin_memory()  # itself where it is pinned already
        home.append(parameter.data)
        parameter.data = parameter.data.to(device, non_blocking=True)
    try:
        yield model
    finally:
        for parameter, data in zip(model.parameters(), home, strict=True):
            parameter.data = data


