"""What a decode step does between its matrix products, one Triton kernel for each stretch, with plain twins.

With one new token for each of a few sequences these operations compute next to nothing: their time is that of
launching them. So each stretch is one kernel instead of up to fourteen: norm, rotation and cache write of q, k and v;
residual and RMSNorm; SwiGLU. The twins are the decoder's own arithmetic, and the kernels round where they round.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanosafe.kernels import INTERPRETED, tl, triton


class Pages(NamedTuple):
    """Where the new keys and values of one layer go: of token b to place offsets[b] of block blocks[b]."""

    keys: Tensor  # [blocks, H_kv, block_size, head_dim], each block contiguous
    values: Tensor  # the same
    blocks: Tensor  # [B] integers
    offsets: Tensor  # [B] integers


class HeadNorms(NamedTuple):
    """RMSNorm of each head of q and of k."""

    q_weight: Tensor  # [head_dim]
    k_weight: Tensor  # [head_dim]
    eps: float


def use_kernels(x: Tensor) -> bool:
    return triton is not None and (x.is_cuda or INTERPRETED)


def rotate_and_write(
    q: Tensor, k: Tensor, v: Tensor, norms: HeadNorms | None, rope: tuple[Tensor, Tensor] | None, pages: Pages
) -> Tensor:
    """q [B, H, head_dim], normalised and rotated; k, likewise, and v [B, H_kv, head_dim] are written to their pages.

    norms: None where the model has none; rope: cos and sin [B, 1, head_dim], float32, for a pair of dimensions
    (a, b) being (cos, cos) and (-sin, sin), or None where nothing is rotated. The rows of q, k and v may lie apart.
    """
    if use_kernels(q):
        return triton_rotate_and_write(q, k, v, norms, rope, pages)
    return plain_rotate_and_write(q, k, v, norms, rope, pages)


def add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float, alpha: float) -> tuple[Tensor, Tensor]:
    """x + alpha * delta, [B, D] each, and the RMSNorm of that sum by `weight` [D] (arXiv:1910.07467)."""
    if use_kernels(x):
        return triton_add_norm(x, delta, weight, eps, alpha)
    return plain_add_norm(x, delta, weight, eps, alpha)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [B, F] each, whose rows may lie apart (arXiv:2002.05202)."""
    if use_kernels(gate):
        return triton_swiglu(gate, up)
    return plain_swiglu(gate, up)


def plain_rotate_and_write(
    q: Tensor, k: Tensor, v: Tensor, norms: HeadNorms | None, rope: tuple[Tensor, Tensor] | None, pages: Pages
) -> Tensor:
    """`rotate_and_write`, one operation after the other."""
    if norms is not None:
        q = F.rms_norm(q, q.shape[-1:], norms.q_weight, norms.eps)
        k = F.rms_norm(k, k.shape[-1:], norms.k_weight, norms.eps)
    if rope is not None:
        q, k = plain_rotate(q, *rope), plain_rotate(k, *rope)
    pages.keys[pages.blocks, :, pages.offsets] = k
    pages.values[pages.blocks, :, pages.offsets] = v
    return q


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i + head_dim/2}) of x [N, H, head_dim]; cos and sin as in `rotate_and_write`.

    The decoder rotates by it too, in training as in prefills.
    """
    x32 = x.float()
    a, b = x32.chunk(2, dim=-1)
    return torch.addcmul(x32 * cos, torch.cat((b, a), dim=-1), sin).to(x.dtype)


def plain_add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float, alpha: float) -> tuple[Tensor, Tensor]:
    """`add_norm`, one operation after the other."""
    total = x.add(delta, alpha=alpha)
    return total, F.rms_norm(total, weight.shape, weight, eps)


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu`, one operation after the other."""
    return F.silu(gate) * up


def triton_rotate_and_write(
    q: Tensor, k: Tensor, v: Tensor, norms: HeadNorms | None, rope: tuple[Tensor, Tensor] | None, pages: Pages
) -> Tensor:
    """`rotate_and_write` by the kernel below."""
    (B, H, head_dim), (_, H_kv, block_size, _) = q.shape, pages.keys.shape
    assert pages.keys[0].is_contiguous() and pages.values[0].is_contiguous()
    assert pages.keys.stride(0) == pages.values.stride(0)
    for heads in (q, k, v):
        assert heads.stride()[1:] == (head_dim, 1)  # a token's heads lie behind one another
    q_weight, k_weight, eps = norms or (None, None, 0.0)
    cos, sin = rope or (None, None)
    out = q.new_empty(B, H, head_dim)
    _rotate_and_write[B, H + 2 * H_kv](
        q, k, v, out, pages.keys, pages.values, q_weight, k_weight, cos, sin, pages.blocks, pages.offsets,
        q.stride(0), k.stride(0), v.stride(0), pages.keys.stride(0), eps, H=H, H_KV=H_kv, HALF=head_dim // 2,
        BLOCK_SIZE=block_size, TILE=triton.next_power_of_2(head_dim), num_warps=1,
    )  # fmt: skip
    return out


def triton_add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float, alpha: float) -> tuple[Tensor, Tensor]:
    """`add_norm` by the kernel below."""
    assert x.is_contiguous() and delta.is_contiguous()
    B, D = x.shape
    total, out = torch.empty_like(x), torch.empty_like(x)
    _add_norm[(B,)](
        x, delta, weight, total, out, eps, alpha, D=D, TILE=triton.next_power_of_2(D), num_warps=8
    )
    return total, out


def triton_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` by the kernel below."""
    assert gate.stride(1) == up.stride(1) == 1
    B, width = gate.shape
    out, tile = gate.new_empty(B, width), 1024
    _swiglu[B, triton.cdiv(width, tile)](gate, up, out, gate.stride(0), up.stride(0), width, TILE=tile, num_warps=4)
    return out


if triton is not None:

    @triton.jit
    def _rotate_and_write(
        q, k, v, out, keys, values, q_weight, k_weight, cos, sin, blocks, offsets,
        q_stride, k_stride, v_stride, block_stride, eps,
        H: tl.constexpr, H_KV: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        """Program (token, head): heads 0 .. H - 1 are queries, then come H_KV keys, then H_KV values."""
        token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        column = tl.arange(0, TILE)
        inside = column < 2 * HALF
        if head < H:
            turned = _turn(q + token * q_stride + head * 2 * HALF, q_weight, token, cos, sin, eps, HALF, TILE)
            tl.store(out + (token * H + head) * 2 * HALF + column, turned, mask=inside)
        else:
            kv_head = (head - H) % H_KV
            block, offset = tl.load(blocks + token).to(tl.int64), tl.load(offsets + token)
            place = block * block_stride + (kv_head * BLOCK_SIZE + offset) * 2 * HALF + column
            if head < H + H_KV:
                turned = _turn(k + token * k_stride + kv_head * 2 * HALF, k_weight, token, cos, sin, eps, HALF, TILE)
                tl.store(keys + place, turned, mask=inside)
            else:
                value = tl.load(v + token * v_stride + kv_head * 2 * HALF + column, mask=inside, other=0.0)
                tl.store(values + place, value, mask=inside)

    @triton.jit
    def _turn(start, weight, token, cos, sin, eps, HALF: tl.constexpr, TILE: tl.constexpr):
        """The head of 2 * HALF numbers at `start`, normalised (unless weight is None) and rotated (unless cos is)."""
        column = tl.arange(0, TILE)
        inside = column < 2 * HALF
        partner = tl.where(column < HALF, column + HALF, column - HALF)  # the other one of each pair
        x = tl.load(start + column, mask=inside, other=0.0)
        y = tl.load(start + partner, mask=inside, other=0.0)
        if weight is not None:
            wide, scale = x.to(tl.float32), norm_scale(x, 2 * HALF, eps)
            x_weight = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
            y_weight = tl.load(weight + partner, mask=inside, other=0.0).to(tl.float32)
            x = (wide * scale * x_weight).to(x.dtype)
            y = (y.to(tl.float32) * scale * y_weight).to(x.dtype)
        if cos is not None:
            c = tl.load(cos + token * 2 * HALF + column, mask=inside, other=0.0)
            s = tl.load(sin + token * 2 * HALF + column, mask=inside, other=0.0)
            x = (x.to(tl.float32) * c + y.to(tl.float32) * s).to(x.dtype)
        return x

    @triton.jit
    def _add_norm(x, delta, weight, total, out, eps, alpha, D: tl.constexpr, TILE: tl.constexpr):
        """Program (row): x + alpha * delta -> total, and its RMSNorm -> out."""
        column = tl.arange(0, TILE)
        inside = column < D
        place = tl.program_id(0).to(tl.int64) * D + column
        value = tl.load(x + place, mask=inside, other=0.0)
        more = tl.load(delta + place, mask=inside, other=0.0).to(tl.float32)
        value = (value.to(tl.float32) + alpha * more).to(value.dtype)
        tl.store(total + place, value, mask=inside)
        w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        # The norm is of the rounded sum, which the next layer adds to.
        tl.store(out + place, (value.to(tl.float32) * norm_scale(value, D, eps) * w).to(value.dtype), mask=inside)

    @triton.jit
    def _swiglu(gate, up, out, gate_stride, up_stride, width, TILE: tl.constexpr):
        """Program (row, tile): silu(gate), rounded, times up -> out [rows, width]."""
        row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
        inside = column < width
        g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0)
        u = tl.load(up + row * up_stride + column, mask=inside, other=0.0)
        tl.store(out + row * width + column, gated(g, u), mask=inside)

    @triton.jit
    def norm_scale(x, width, eps):
        """What RMSNorm multiplies the `width` numbers of x with, before its weight; x is 0 beyond them."""
        wide = x.to(tl.float32)
        return 1 / tl.sqrt(tl.sum(wide * wide, 0) / width + eps)

    @triton.jit
    def gated(gate, up):
        """silu(gate), rounded, times up."""
        wide = gate.to(tl.float32)
        silu = (wide / (1 + tl.exp(-wide))).to(gate.dtype)
        return (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)
