"""Matrix products on a CPU: everything that differs there from plain torch, behind the names of plain torch.

MKL gives float32 products on processors of other makers than Intel its AVX2 code, even where they have AVX-512.
oneDNN, which torch takes for bfloat16 anyway, does not look at the maker and is faster there: 1.2 times on AMD's Zen
4, twice on Zen 5. It also multiplies by weights that were packed into blocks beforehand, which it reads at three
quarters of the memory's bandwidth. Its functions in torch are private, so they are tried once; wherever they do not
pay, this is `F.linear` and `torch.mm`.
"""

import math
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SMALLEST = 2**21  # multiplications; below, a call into oneDNN costs more than it saves
ROWS = 64  # products of more rows are padded to a multiple of this: see `padded`
CPU_INFO = Path("/proc/cpuinfo")


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x [..., in] @ weight.T + bias -> [..., out], for weight [out, in], which may be packed."""
    if weight.is_mkldnn:
        return onednn_linear(x, weight, bias)  # not padded: a prefill would lose more by the copy of its rows
    if not prefers_onednn(x, weight):
        return F.linear(x, weight, bias)
    return _OneDnnLinear.apply(x, weight, bias) if torch.is_grad_enabled() else padded_linear(x, weight, bias)


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return padded_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad_rows, x_rows = padded(grad), padded(x)  # [N, out], [N, in]
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = unpadded(onednn_linear(grad_rows, weight.T), x)
        if ctx.needs_input_grad[1]:
            # oneDNN is faster with the narrower of the two factors as the left one.
            if grad_rows.shape[1] <= x_rows.shape[1]:
                grad_weight = onednn_linear(grad_rows.T, x_rows.T)
            else:
                grad_weight = onednn_linear(x_rows.T, grad_rows.T).T
        if ctx.needs_input_grad[2]:
            grad_bias = grad.flatten(0, -2).sum(0)
        return grad_x, grad_weight, grad_bias


def padded_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`onednn_linear` of padded rows."""
    return unpadded(onednn_linear(padded(x), weight, bias), x)


def unpadded(y: Tensor, x: Tensor) -> Tensor:
    """The rows of y [N', out] that come from x [..., in] and not from padding it -> [..., out]."""
    shape = *x.shape[:-1], y.shape[-1]
    return y.flatten()[: math.prod(shape)].view(shape)


def padded(x: Tensor) -> Tensor:
    """x [..., in] as rows [N, in], with rows of zeros up to a multiple of ROWS where N is above ROWS.

    oneDNN compiles a product for each number of rows that it meets, in about a millisecond, and keeps it, in half a
    megabyte. Packed texts have another number of tokens nearly every time; filled up, most of them share products.
    """
    rows = x.reshape(-1, x.shape[-1])
    spare = -len(rows) % ROWS
    return F.pad(rows, (0, 0, 0, spare)) if spare and len(rows) > ROWS else rows


def pack_weight(weight: Tensor) -> Tensor:
    """A copy of weight [out, in] in oneDNN's blocked layout, for `linear` without gradients."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)


def packing_works(dtype: torch.dtype) -> bool:
    """Whether this PyTorch on this CPU packs weights of `dtype`, and multiplies by them rightly."""
    try:
        weight, x = torch.eye(32, dtype=dtype), torch.arange(64, dtype=dtype).view(2, 32)
        return torch.equal(onednn_linear(x, pack_weight(weight)), F.linear(x, weight))
    except (AttributeError, RuntimeError):  # no AVX-512 in bfloat16, no oneDNN
        return False


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` without gradients, for weights that are plain, transposed or packed."""
    if weight.layout == torch.strided and not (weight.is_contiguous() or weight.T.is_contiguous()):
        weight = weight.contiguous()  # gaps between its rows would lead to a reference loop, 1,000 times slower
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def prefers_onednn(x: Tensor, weight: Tensor) -> bool:
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return x.numel() * len(weight) >= SMALLEST and mkl_is_slow()


@cache
def mkl_is_slow() -> bool:
    """Whether this is a processor with AVX-512 that MKL treats as one without, and oneDNN works."""
    capability = torch.backends.cpu.get_cpu_capability()
    if not torch.backends.mkl.is_available() or not capability.startswith("AVX512"):
        return False
    try:
        other_maker = "GenuineIntel" not in CPU_INFO.read_text()
        x, weight = torch.arange(64.0).view(2, 32), torch.eye(32)
        return other_maker and torch.equal(onednn_linear(x, weight), x)
    except (OSError, AttributeError, RuntimeError):
        return False
