"""A CUDA device that is a CPU: code that runs only on CUDA runs here too, and meets what a GPU would refuse.

Within `pretending()` torch seems to have one CUDA device. A tensor on it is a `Pretend`: it holds a plain tensor and
computes with it, but does not mix with tensors of the host, and whatever makes the host wait is counted. A CUDA graph
is the list of launches made while it was captured; a replay makes them again on the same memory, and capturing refuses
what a capturing stream refuses. Triton kernels are replaced by their plain twins (other tests compare the two), and
PyTorch's kernels that exist on CUDA alone by the formulas below.

So this shows placement, waits and what a replayed graph reads and writes; not what a GPU's kernels compute, nor time or
memory. Collectives and `--offload` cannot be pretended.
"""

from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from nanosafe.kernels import compiled, decode_step, row_product, scan, split_adam
from nanosafe.kernels import logprob as head
from nanosafe.kernels import paged_attention as decode
from nanosafe.kernels import sample as draw
from nanosafe.model import attention as memory
from nanosafe.sampler import engine

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
# The host must learn a value, or how large the result is.
WAITS = {aten._local_scalar_dense, aten.equal, aten.masked_select, aten.nonzero, aten._unique2, aten.unique_dim}
INDEXED = {aten.index, aten.index_put, aten.index_put_}


class Pretend(Tensor):
    """A tensor that says it lies on DEVICE. To torch itself it lies on the CPU, whose autograd it needs."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda, is_cpu = DEVICE, True, False

    @staticmethod
    def __new__(cls, held: Tensor):
        self = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, strides=held.stride(),
                                             storage_offset=held.storage_offset())  # fmt: skip
        self.held = held
        return self

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return Machine.active.run(op, args, kwargs or {})

    def to(self, *args, **kwargs):
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type == "cpu":
            Machine.active.wait("to the host")
            return self.held.detach().to(dtype or self.dtype, copy=True)
        return self if dtype in (None, self.dtype) else aten._to_copy(self, dtype=dtype)

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, other):
        self.held = other.held

    def untyped_storage(self):
        return self.held.untyped_storage()

    def storage_offset(self):
        return self.held.storage_offset()

    def cpu(self):
        return self.to("cpu")

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self, **_):
        return f"Pretend({self.held})"


def held(value):
    return value.held if isinstance(value, Pretend) else value


class Graph:
    """torch.cuda.CUDAGraph: what was launched while it was captured, and the tensors that came out."""

    def __init__(self):
        self.launches = []

    def replay(self):
        for function, args, kwargs, outputs in self.launches:
            args, kwargs = tree_map(held, (args, kwargs))
            for old, new in zip(outputs, tree_flatten(function(*args, **kwargs))[0], strict=True):
                if isinstance(old, Pretend) and old.held.data_ptr() != new.data_ptr():
                    old.held.copy_(new)


class Machine(TorchDispatchMode):
    """Runs all operations; `waits` counts how often the host waited for the device, and why."""

    active: "Machine"

    def __init__(self):
        super().__init__()
        self.waits, self.graphs, self.capturing = Counter(), [], None

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return self.run(op, args, kwargs or {})

    def run(self, op, args, kwargs):
        packet = op.overloadpacket
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        here = [x for x in given if isinstance(x, Pretend)]
        # Autograd asks for zeros where torch takes a Pretend to be, on the CPU.
        for_gradient = not given and "device" in kwargs and torch._C._current_graph_task_id() >= 0
        if not (here or for_gradient or torch.device(kwargs.get("device") or "cpu") == DEVICE):
            return op(*args, **kwargs)
        indices = args[1] if packet in INDEXED else []
        if packet in (aten._to_copy, aten.copy_):
            if len(here) < len(given) and given[-1].numel():
                self.wait("from the host")
        elif here and any(x.dim() and x.device != DEVICE and not any(x is i for i in indices) for x in given):
            raise RuntimeError(f"{op}: not all on one device: {[(str(x.device), list(x.shape)) for x in given]}")
        assert packet is not aten.convolution, "cuDNN rounds float32 to TF32"
        by_host = any(i is not None and (i.dtype == torch.bool or i.device != DEVICE) for i in indices)
        if packet in WAITS or by_host or packet is aten.repeat_interleave and kwargs.get("output_size") is None:
            self.wait(str(packet))
        return self.launch(CUDA_ALONE.get(op, op), args, kwargs)

    def launch(self, function, args, kwargs):
        """function of what is held; its results are on the device."""
        if "device" in kwargs:
            kwargs = kwargs | {"device": torch.device("cpu")}
        values, named = tree_map(held, (args, kwargs))
        with _disable_current_modes():
            result = function(*values, **named)
        given = {id(x.held): x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Pretend)}
        outputs = tree_map(lambda x: given.get(id(x), Pretend(x)) if isinstance(x, Tensor) else x, result)
        if self.capturing is not None:
            self.capturing.launches.append((function, args, kwargs, tree_flatten(outputs)[0]))
        return outputs

    def wait(self, what: str) -> None:
        if self.capturing is not None:
            raise RuntimeError(f"{what}: operation not permitted when stream is capturing")
        self.waits[what] += 1

    @contextmanager
    def capture(self, graph: Graph, pool, stream):
        self.graphs.append(graph)
        self.capturing = graph
        try:
            yield
        finally:
            self.capturing = None


def packed_attention(q, k, v, ends, ends_k, longest, longest_k, is_causal, scale, window_size, *unused):
    """torch's kernel for packed documents, one document after the other."""
    assert q.dtype == torch.bfloat16 and ends.dtype == torch.int32 and window_size == [-1, 0]
    assert longest == int(ends.diff().max()) and len(q) == int(ends[-1])
    parts = [[x[a:b].transpose(0, 1)[None] for x in (q, k, v)] for a, b in zip(ends, ends[1:], strict=False)]
    out = [F.scaled_dot_product_attention(*part, is_causal=True, scale=scale, enable_gqa=True) for part in parts]
    logsumexp, state = torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)
    return torch.cat([x[0].transpose(0, 1) for x in out]), logsumexp, state


def packed_attention_gradients(grad, q, k, v, out, logsumexp, ends, ends_k, longest, longest_k, is_causal, state, scale,
                               window_size):  # fmt: skip
    """With p = softmax(s): dv = p^T do, dp = do v^T, ds = p (dp - sum p dp)."""
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    for a, b in zip(ends, ends[1:], strict=False):
        do, x, y, z = (t[a:b].float().transpose(0, 1) for t in (grad, q, k, v))  # [heads, n, head_dim]
        y, z = (t.repeat_interleave(len(x) // len(t), 0) for t in (y, z))
        s = (scale * x @ y.mT).masked_fill(~torch.ones(b - a, b - a, dtype=torch.bool).tril(), -torch.inf)
        p, dp = s.softmax(-1), do @ z.mT
        ds = scale * p * (dp - (p * dp).sum(-1, keepdim=True))
        for total, part in zip(grads, (ds @ y, ds.mT @ x, p.mT @ do), strict=True):
            total[a:b] = part.unflatten(0, (total.shape[1], -1)).sum(1).transpose(0, 1)  # over a key head's queries
    return tuple(grads)


def wide_product(a, b, dtype):
    assert a.dtype == b.dtype == torch.bfloat16 and dtype == torch.float32
    return a.float() @ b.float()


CUDA_ALONE = {
    torch.ops.torch_attn._varlen_attn.default: packed_attention,
    torch.ops.torch_attn._varlen_attn_backward.default: packed_attention_gradients,
    aten.mm.dtype: wide_product,
    aten.mm.dtype_out: lambda a, b, dtype, *, out: out.copy_(wide_product(a, b, dtype)),
    aten.addmm.dtype_out: lambda total, a, b, dtype, *, out: out.copy_(total + wide_product(a, b, dtype)),
}


# What of torch asks for new memory on a Pretend's behalf, and so would get it on the CPU.


def pad_sequence(sequences, batch_first=False):
    longest = max(map(len, sequences))
    rows = [F.pad(x, (0, 0) * (x.dim() - 1) + (0, longest - len(x))) for x in sequences]
    return torch.stack(rows, 0 if batch_first else 1)


def attention(query, *args, sdpa=F.scaled_dot_product_attention, **kwargs):
    grouped = kwargs.get("enable_gqa") and query.dtype == torch.float32
    assert not (grouped and isinstance(query, Pretend)), "for grouped heads in float32 CUDA makes all scores"
    return sdpa(query, *args, **kwargs) if query.shape[-2] else query * 1  # of no queries at all


def causal_lower_right(queries, keys):
    return torch.ones(queries, keys, dtype=torch.bool, device=DEVICE).tril(keys - queries)


@contextmanager
def pretending():
    """torch with one CUDA device, of an H100's features; yields its Machine."""
    machine = Machine()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    properties = SimpleNamespace(multi_processor_count=132, total_memory=16 << 30)
    of_cuda = dict(
        _lazy_init=lambda: None, is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0,
        set_device=lambda device: None, synchronize=lambda: None, reset_peak_memory_stats=lambda: None,
        get_device_properties=lambda device: properties, get_device_capability=lambda device: (9, 0),
        mem_get_info=lambda device: (64 << 20, properties.total_memory), max_memory_allocated=lambda: 0,
        empty_cache=lambda: machine.wait("memory given back"), Stream=lambda device: stream,
        current_stream=lambda: stream, stream=lambda stream: nullcontext(), CUDAGraph=Graph, graph=machine.capture,
        graph_pool_handle=lambda: (0, 0), is_current_stream_capturing=lambda: machine.capturing is not None,
    )  # fmt: skip

    def kernel(plain):
        return lambda *args, **kwargs: machine.launch(plain, args, kwargs)

    replacements = [(torch.cuda, name, value) for name, value in of_cuda.items()] + [
        (decode, "triton_paged_attention", kernel(decode.plain_paged_attention)),
        (draw, "triton_draw", kernel(draw.cpu_draw)),
        (head, "triton_row_statistics", kernel(head.plain_row_statistics)),
        (head, "triton_row_gradients", kernel(head.plain_row_gradients)),
        (decode_step, "triton_rotate_and_write", kernel(decode_step.plain_rotate_and_write)),
        (decode_step, "triton_add_norm", kernel(decode_step.plain_add_norm)),
        (decode_step, "triton_swiglu", kernel(decode_step.plain_swiglu)),
        (row_product, "triton_row_product", kernel(row_product.plain_row_product)),
        (scan, "triton_scan_step", kernel(scan.plain_scan_step)),
        (scan, "compiled", lambda function: function),
        (compiled, "compiled", lambda function: function),
        (split_adam, "triton_update", kernel(split_adam.plain_update)),
        # What torch's CUDA builds would ask, and CPU builds do not.
        (torch.accelerator, "current_accelerator", lambda check_available=False: None),
        # Even where it is missing.
        *((module, "triton", object()) for module in (decode, draw, head, scan, split_adam, engine)),
        (memory, "causal_lower_right", causal_lower_right),
        (torch.nn.utils.rnn, "pad_sequence", pad_sequence),
        (F, "scaled_dot_product_attention", attention),
    ]
    with ExitStack() as stack:
        for where, name, value in replacements:
            stack.enter_context(mock.patch.object(where, name, value))
        stack.enter_context(mock.patch.object(Machine, "active", machine, create=True))
        # torch.tensor(..., device=DEVICE) then makes a tensor of the host and moves it, which a mode sees.
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        yield stack.enter_context(machine)
