"""Several processes as one: which rank does what, and the few exchanges between them. One process exchanges nothing.

Each rank runs its own micro-batches through a model of which it keeps 1/world of every weight, gradient and moment
(`shard`: FSDP2, arXiv 2304.11277); the weights of a layer are gathered just before it computes. For a rollout they are
gathered once (`unsharded`). gloo on CPU, nccl on CUDA; started by torchrun, or as plain `python` for one process.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from nanosafe.io.machine import available_cores
from nanosafe.io.parent import end_with_parent

TIMEOUT = timedelta(hours=2)  # of an exchange: longer than any rank waits for another's rollout
OBJECT_TIMEOUT = timedelta(days=1)  # for what only rank 0 does and everyone needs, such as a download
OLDEST_GPU = (8, 0)  # compute capability: Triton and attention over packed documents want it, and bfloat16


class Ranks:
    """This process among `world` processes, `local_world` of them on its node.

    `main` is rank 0, which writes files and talks to the console; each node has a `local_main`, which downloads.
    """

    def __init__(self, device: str | None = None, *, alone: bool = False):
        """Join the process group that torchrun describes, if any. device: cpu, cuda, or None to choose.

        alone: stay one process, for what one rank does while the others wait.
        """
        environment = {} if alone else os.environ
        self.rank = int(environment.get("RANK", 0))
        self.world = int(environment.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        # Without torchrun's word all processes are on one node.
        self.local_main = int(environment.get("LOCAL_RANK", self.rank)) == 0
        self.local_world = int(environment.get("LOCAL_WORLD_SIZE", self.world))
        self.device = choose_device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            # cuBLAS may add the parts of a bfloat16 product in bfloat16 unless told not to.
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        elif os.environ.get("OMP_NUM_THREADS") == "1" and self.local_world > 1:
            # torchrun sets 1 where nothing is set, however many cores there are.
            torch.set_num_threads(max(1, available_cores() // self.local_world))
        self.object_group = None
        if self.world > 1:
            if not dist.is_initialized():
                if "TORCHELASTIC_RUN_ID" in os.environ:
                    end_with_parent()
                join_group(self.device)
            self.object_group = dist.new_group(backend="gloo", timeout=OBJECT_TIMEOUT)

    def local_range(self, costs: Sequence[float]) -> range:
        """This rank's items of a list that is cut into one run for each rank, of nearly equal cost, in rank order."""
        total, before = sum(costs), 0
        start = stop = 0
        for cost in costs:
            # An item belongs to the rank in whose stretch of the total cost its middle lies.
            owner = int((before + cost / 2) / total * self.world)
            before += cost
            if owner < self.rank:
                start += 1
            if owner <= self.rank:
                stop += 1
        return range(start, stop)

    def split_work(self, items: Sequence, work: Callable[[Sequence], list],
                   cost: Callable = len) -> list:
        """work(items), in order and on every rank, each rank having done its `local_range` of the items."""
        local = self.local_range([cost(item) for item in items])
        return self.gather(work(items[local.start : local.stop]))

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add `tensor` over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, items: list) -> list:
        """The lists of all ranks, one behind the other, on every rank. For small Python objects."""
        if self.world == 1:
            return list(items)
        lists: list = [None] * self.world
        dist.all_gather_object(lists, items, group=self.object_group)
        return list(chain.from_iterable(lists))

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on any rank; a decision that all ranks take alike."""
        return self.sum_(torch.tensor(float(flag), device=self.device)).item() > 0

    @contextmanager
    def local_main_first(self) -> Iterator[None]:
        """One rank of each node runs the block before the others do: what it downloads, they find in its cache."""
        if not self.local_main:
            self.wait()
        yield
        if self.local_main:
            self.wait()

    def wait(self) -> None:
        """Return when every rank has called this."""
        if self.world > 1:
            dist.barrier(group=self.object_group)

    def print(self, *values) -> None:
        if self.main:
            print(*values, flush=True)

    def close(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()


def choose_device(name: str | None) -> torch.device:
    """The device cpu or cuda, or for None the better one that is there; plain cuda is the GPU of this local rank.

    Raises ValueError for one that is not there, or whose kernels could not be compiled.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise ValueError(f"--device {name}: it must be cpu or cuda")
    if name == "cpu":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise ValueError(f"--device {name}: no CUDA device is visible to PyTorch; use --device cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)
    count = torch.cuda.device_count()
    if device.index >= count:
        raise ValueError(f"there is no {device}, for PyTorch sees {count} GPU{'s' * (count > 1)} here (cuda:0 is the "
                         "first): start at most one process for each, torchrun --nproc_per_node")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < OLDEST_GPU:
        raise ValueError(f"{device} is a {torch.cuda.get_device_name(device)} of compute capability {major}.{minor}, "
                         "without bfloat16, and the kernels want 8.0 (A100, RTX 30) or newer: use --device cpu, or "
                         "hide it from PyTorch by CUDA_VISIBLE_DEVICES")
    return device


def join_group(device: torch.device, **options) -> None:
    """Join the process group of torchrun's environment, or of `options` (see init_process_group)."""
    if device.type == "cuda":
        # Told which GPU is this rank's, nccl need not guess at the first exchange.
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device, **options)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT, **options)


def shard(model: nn.Module, ranks: Ranks, dtype: torch.dtype) -> None:
    """Shard a decoder over the ranks, in place: each keeps its rows of every parameter and computes in `dtype`.

    The parameters become DTensors in the type they have (float32: they are the masters). Gradients are summed over the
    ranks in float32, and arrive in that type. Every rank must run equally many forward and backward passes: each is an
    exchange.
    """
    # Of the group that is there: a mesh that made its own would wait for ranks that are elsewhere (local_main_first).
    mesh = DeviceMesh.from_group(dist.group.WORLD, ranks.device.type)
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


def full_tensor(tensor: Tensor) -> Tensor:
    """`tensor` itself, or gathered from its shards; then every rank must call this."""
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.dtype == torch.int16:  # which neither nccl nor gloo sends
        return tensor.view(torch.bfloat16).full_tensor().view(torch.int16)
    return tensor.full_tensor()


def local_part(tensor: Tensor) -> Tensor:
    """`tensor` itself, or this rank's rows of a sharded one: the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_shard(read: Callable[[slice], Tensor], like: DTensor) -> DTensor:
    """A tensor sharded as `like` is, of which each rank reads only its own rows: read(rows) -> [rows, ...]."""
    mesh, count = like.device_mesh, like.to_local().shape[0]
    rows_per_rank = -(-like.shape[0] // mesh.size())  # rounded up, as torch.chunk does
    start = min(mesh.get_local_rank() * rows_per_rank, like.shape[0])
    local = read(slice(start, start + count)).to(like.device)
    sizes = dict(shape=like.shape, stride=like.stride())
    return DTensor.from_local(local, mesh, like.placements, run_check=False, **sizes)


@contextmanager
@torch.no_grad()
def unsharded(model: nn.Module, dtype: torch.dtype) -> Iterator[nn.Module]:
    """The model to sample with: of a sharded one a full copy in `dtype`, gone after the block; else itself."""
    if not isinstance(model, FSDPModule):
        yield model
        return
    model.reshard()
    with torch.device("meta"):
        copy = type(model)(model.config)  # a plain decoder: FSDP's class makes instances of the one it wraps
    full = {name: full_tensor(tensor.to(dtype)) for name, tensor in model.state_dict().items()}
    copy.load_state_dict(full, assign=True)
    yield copy.requires_grad_(False)
    copy.to("meta")  # Whoever still holds it holds no weights.
