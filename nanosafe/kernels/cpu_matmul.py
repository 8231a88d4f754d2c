"""Products with weights on a CPU: by oneDNN where torch's own choice, MKL, leaves half of the processor unused.

MKL gives float32 products on processors of other makers than Intel its AVX2 code, even where they have AVX-512; oneDNN,
which torch takes for bfloat16 anyway, does not look at the maker and is twice as fast there. Its products are private
functions of torch: they are tried once, and everywhere else this is `F.linear`.
"""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SMALLEST = 2**21  # multiplications; below, a call into oneDNN costs more than it saves
TILE_ROWS = 256  # oneDNN writes to a tensor of its own, so what is to end up in another is made in tiles
CPU_INFO = Path("/proc/cpuinfo")


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] @ weight.T + bias, [..., out], for weight [out, in]."""
    if not prefers_onednn(x, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else onednn_linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)  # [N, out]
        return (onednn_linear(grad, weight.T) if wants_x else None,
                weight_gradient(rows, x.flatten(0, -2)) if wants_weight else None,
                rows.sum(0) if wants_bias else None)


def product_into(out: Tensor, x: Tensor, weight: Tensor, **options) -> Tensor:
    """x [N, in] @ weight.T written to out [N, out], which is returned; options: those of torch.mm."""
    if not prefers_onednn(x, weight):
        return torch.mm(x, weight.T, out=out, **options)
    for rows, part in zip(out.split(TILE_ROWS), x.split(TILE_ROWS), strict=True):
        rows.copy_(onednn_linear(part, weight))
    return out


def add_weight_gradient(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """total [out, in] += grad.T @ x, for grad [N, out] and x [N, in]."""
    if not prefers_onednn(grad.T, x.T):
        total.addmm_(grad.T, x)
        return
    for rows, part in zip(total.split(8 * TILE_ROWS), grad.split(8 * TILE_ROWS, dim=1), strict=True):
        rows += onednn_linear(part.T, x.T)  # not the narrower one on the left: its result would be added transposed


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad [N, out], x [N, in] -> grad.T @ x, [out, in]. oneDNN is faster with the narrower of them as the left one."""
    if grad.shape[1] <= x.shape[1]:
        return onednn_linear(grad.T, x.T)
    return onednn_linear(x.T, grad.T).T


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear`, for weights that are plain, transposed or packed (see packed.py); without gradients."""
    if weight.layout == torch.strided and not (weight.is_contiguous() or weight.T.is_contiguous()):
        weight = weight.contiguous()  # with gaps between its rows it would go to a reference loop, 1,000 times slower
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def prefers_onednn(x: Tensor, weight: Tensor) -> bool:
    return (x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() * len(weight) >= SMALLEST
            and mkl_is_slow())


@cache
def mkl_is_slow() -> bool:
    """Whether this is a processor with AVX-512 that MKL treats as one without, and oneDNN works."""
    if not torch.backends.mkl.is_available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    try:
        other_maker = "GenuineIntel" not in CPU_INFO.read_text()
        x, weight = torch.arange(64.0).view(2, 32), torch.eye(32)
        return other_maker and torch.equal(onednn_linear(x, weight), x)
    except (OSError, AttributeError, RuntimeError):
        return False
