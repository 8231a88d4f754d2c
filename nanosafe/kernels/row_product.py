"""The product of one row with a weight, and what stands around it, as one Triton kernel: decoding a single sequence.

Such a product computes two operations for each weight that it reads, so its time is that of reading. A library's kernel
reads well but alone, and the norm before it and SwiGLU or the residual behind it are launches of their own, in which
nothing is read. Here each program reads all of a few rows of the weight at once, and the rest happens in registers.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from nanosafe.kernels import tl, triton
from nanosafe.kernels.decode_step import plain_swiglu, use_kernels

WEIGHTS = 2**15  # of a program: 64 KiB in bfloat16 are on their way to it at a time
# Programmatic dependent launch: programs start, and ask for their weights, while the last ones of the kernel before are
# still at work. Off, for no GPU has shown yet that it is right and what it gains; benchmarks/gpu.py times both.
DEPENDENT_LAUNCH = False


class Affine(NamedTuple):
    """x -> x @ weight.T + bias."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]


class Norm(NamedTuple):
    """RMSNorm of a row."""

    weight: Tensor  # [in]
    eps: float


class Residual(NamedTuple):
    """y -> x + alpha * y."""

    x: Tensor  # [1, out]
    alpha: float


def row_product(
    x: Tensor, layer: Affine, up: Affine | None = None, norm: Norm | None = None, residual: Residual | None = None
) -> Tensor:
    """x [1, in] -> [1, out]: normalised by `norm`, through `layer`, which with `up` is the gate of SwiGLU, and added to
    a residual. What is None is left out. Sums are float32, and each step's result is rounded to the type of x."""
    if use_kernels(x):
        return triton_row_product(x, layer, up, norm, residual)
    return plain_row_product(x, layer, up, norm, residual)


def plain_row_product(
    x: Tensor, layer: Affine, up: Affine | None = None, norm: Norm | None = None, residual: Residual | None = None
) -> Tensor:
    """`row_product`, one operation after the other."""
    if norm is not None:
        x = F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
    y = F.linear(x, *layer)
    if up is not None:
        y = plain_swiglu(y, F.linear(x, *up))
    return y if residual is None else residual.x.add(y, alpha=residual.alpha)


def triton_row_product(
    x: Tensor, layer: Affine, up: Affine | None = None, norm: Norm | None = None, residual: Residual | None = None
) -> Tensor:
    """`row_product` by the kernel below."""
    [OUT, IN] = layer.weight.shape
    assert x.shape == (1, IN) and x.is_contiguous() and layer.weight.is_contiguous()
    up_weight, up_bias = up or (None, None)
    assert up is None or up_weight.shape == (OUT, IN) and up_weight.is_contiguous()
    norm_weight, eps = norm or (None, 0.0)
    old, alpha = residual or (None, 0.0)
    out = x.new_empty(1, OUT)
    tile = triton.next_power_of_2(IN)
    width = tile if up is None else 2 * tile  # weights for one number of the result
    rows = max(1, min(16, WEIGHTS // width))
    warps = max(1, min(16, rows * width // (32 * 128)))  # 128 weights a thread fit into its registers
    _row_product[(triton.cdiv(OUT, rows),)](
        x, *layer, up_weight, up_bias, norm_weight, old, out, eps, alpha, OUT, IN=IN, ROWS=rows, TILE=tile,
        EARLY=DEPENDENT_LAUNCH, num_warps=warps, launch_pdl=DEPENDENT_LAUNCH,
    )  # fmt: skip
    return out


if triton is not None:
    from nanosafe.kernels.decode_step import gated, norm_scale

    @triton.jit
    def _row_product(
        x, weight, bias, up_weight, up_bias, norm_weight, residual, out, eps, alpha, OUT,
        IN: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, EARLY: tl.constexpr,
    ):  # fmt: skip
        """Program p computes numbers p * ROWS to (p + 1) * ROWS of the result; arguments that are None are left out."""
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, TILE)
        # The weights, which no kernel before this one has written, are asked for before anything is waited for.
        w = _load_rows(weight, row, column, OUT, IN)  # [ROWS, TILE]
        if up_weight is not None:
            up_w = _load_rows(up_weight, row, column, OUT, IN)
        if EARLY:
            tl.extra.cuda.gdc_wait()
        value = tl.load(x + column, mask=column < IN, other=0.0)
        if norm_weight is not None:
            norm = tl.load(norm_weight + column, mask=column < IN, other=0.0).to(tl.float32)
            value = (value.to(tl.float32) * norm_scale(value, IN, eps) * norm).to(value.dtype)
        y = _product(w, value, bias, row, OUT)
        if up_weight is not None:
            y = gated(y, _product(up_w, value, up_bias, row, OUT))
        if residual is not None:
            old = tl.load(residual + row, mask=row < OUT, other=0.0).to(tl.float32)
            y = (old + alpha * y.to(tl.float32)).to(y.dtype)
        tl.store(out + row, y, mask=row < OUT)

    @triton.jit
    def _load_rows(weight, row, column, OUT, IN: tl.constexpr):
        """Rows of weight [OUT, IN], 0 outside of it. Each is read once, so no cache needs to keep it."""
        place = row.to(tl.int64)[:, None] * IN + column[None, :]
        inside = (row < OUT)[:, None] & (column < IN)[None, :]
        return tl.load(weight + place, mask=inside, other=0.0, eviction_policy="evict_first")

    @triton.jit
    def _product(w, value, bias, row, OUT):
        """w [ROWS, TILE] times value [TILE], plus the bias (unless it is None) -> [ROWS], rounded as value is."""
        y = tl.sum(w.to(tl.float32) * value.to(tl.float32)[None, :], 1)
        if bias is not None:
            y += tl.load(bias + row, mask=row < OUT, other=0.0).to(tl.float32)
        return y.to(value.dtype)
