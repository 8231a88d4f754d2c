"""AdamW on a float32 master that is a bfloat16 weight and a remainder, with moments of 8 bits: one update, in place.

The float32 master is exact: its upper half is the weight that the model computes with, its lower half the remainder.

The moments are 8-bit codes in blocks that each have their own scale, as in Dettmers et al., "8-bit Optimizers via
Block-wise Quantization" (arXiv 2110.02861). The codes are other ones, made for what the moments are for, the update
m / sqrt(v):
- r = sqrt(v), which divides, is coded by its logarithm: the error is relative and no code means 0. An entry below the
  range has its r rounded up, so its step becomes smaller, never larger.
- m is coded as m / r in even steps. Cauchy-Schwarz bounds it (see `ratio_bound`), so the code needs no scale, its
  error is that of the update itself, and no block can hold a large m over a lost v.
A block never goes beyond its row, so that ranks which share a parameter's rows code what one process codes.
A moment changes by less than a step of its code, so rounding to the nearest code would never let it decay. The
threshold that decides between the two nearest codes instead visits [0, 1) evenly over the steps.

A Triton kernel reads and writes each number once, 16 bytes a parameter; its plain twin goes through memory chunk by
chunk, about sixty times.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanosafe.kernels import INTERPRETED, tl, triton

BLOCK = 256  # elements of a row that share a scale; the last block of a row may have fewer
CHUNK = 2**23  # elements the plain twin updates at once, whole rows: eleven temporary float32 for each
BLOCKS_PER_PROGRAM = 4
OCTAVE = 255 / 20  # codes of r per factor of two: 256 codes reach down to 2**-20 of the block's largest r
# Multiples of these modulo 1 fill [0, 1) evenly, also as pairs.
IRRATIONALS = (math.sqrt(5) - 1) / 2, math.sqrt(2) - 1
ELEMENTWISE = ("remainder", "ratio", "root")  # what has the shape of the parameter
TINY = torch.finfo(torch.float32).tiny  # what a zero is divided by instead of another


class Step(NamedTuple):
    """The numbers of one update, as torch.optim.AdamW makes them of its settings."""

    number: int  # of this update, from 1
    beta1: float
    beta2: float
    eps: float
    decay: float  # factor on the weight: 1 - lr * weight decay
    rate: float  # lr / (1 - beta1^number)
    correction: float  # sqrt(1 - beta2^number)

    @classmethod
    def of(cls, number: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> "Step":
        beta1, beta2 = betas
        return cls(number, beta1, beta2, eps, decay=1 - lr * weight_decay, rate=lr / (1 - beta1**number),
                   correction=math.sqrt(1 - beta2**number))


def new_state(parameter: Tensor) -> dict[str, Tensor]:
    """The state of a parameter before its first update: 4 bytes an element, and a scale for each block.

    A parameter has rows along its first dimension, of one element in a vector. If it is sharded by rows, so is this.
    """
    first_of_blocks = parameter.view(len(parameter), -1)[:, ::BLOCK]
    return {
        "remainder": torch.zeros_like(parameter, dtype=torch.int16),
        "ratio": torch.zeros_like(parameter, dtype=torch.int8),
        "root": torch.zeros_like(parameter, dtype=torch.uint8),
        "scale": torch.zeros_like(first_of_blocks, dtype=torch.float32),
    }


def update(weight: Tensor, gradient: Tensor, state: dict[str, Tensor], step: Step) -> None:
    """Update a contiguous bfloat16 weight and its state (see `new_state`) by a float32 gradient of its shape."""
    use_kernel = triton is not None and (weight.is_cuda or INTERPRETED)
    function = triton_update if use_kernel else plain_update
    function(weight, gradient, state, step)


def plain_update(weight: Tensor, gradient: Tensor, state: dict[str, Tensor], step: Step) -> None:
    """`update` chunk by chunk, with the operations of torch.optim.AdamW in their order."""
    bound = ratio_bound(step.beta1, step.beta2)
    tensors = [gradient, weight, *(state[name] for name in (*ELEMENTWISE, "scale"))]
    rows = max(1, CHUNK // weight[0].numel())
    chunks = [tensor.view(len(weight), -1).split(rows) for tensor in tensors]
    for g, high, remainder, ratio, root, scale in zip(*chunks, strict=True):
        master = join(high, remainder).mul_(step.decay)
        m, v = decode(ratio, root, scale, bound)
        m.lerp_(g, 1 - step.beta1)
        v.mul_(step.beta2).addcmul_(g, g, value=1 - step.beta2)
        master.addcdiv_(m, v.sqrt().div_(step.correction).add_(step.eps), value=-step.rate)
        for old, new in zip((high, remainder), split(master), strict=True):
            old.copy_(new)
        for old, new in zip((ratio, root, scale), encode(m, v, bound, step.number), strict=True):
            old.copy_(new)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """float32 -> the nearest bfloat16 and the int16 that `join` adds to its bit pattern.

    A tie goes away from zero, for then the difference of the bit patterns lies in [-2^15, 2^15), where ties to even
    would need 2^16 + 1 values. As in any conversion, what lies beyond the largest bfloat16 by half a step or more
    becomes infinite; the remainder still gives it back.
    """
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16  # sign and magnitude: adding to the pattern adds to the magnitude
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join(weight: Tensor, remainder: Tensor) -> Tensor:
    """The inverse of `split`, exact for every float32 that is not NaN."""
    return ((weight.view(torch.int16).int() << 16) + remainder).view(torch.float32)


def ratio_bound(beta1: float, beta2: float) -> float:
    """The largest |m| / sqrt(v) that any sequence of gradients can reach.

    m = (1 - beta1) sum beta1^i g_i and v = (1 - beta2) sum beta2^i g_i^2, so by Cauchy-Schwarz
    m^2 / v <= (1 - beta1)^2 / (1 - beta2) * sum (beta1^2 / beta2)^i.
    """
    if beta1**2 >= beta2:
        raise ValueError(f"betas ({beta1}, {beta2}): m / sqrt(v) is bounded only if beta1^2 < beta2")
    return (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))


def encode(m: Tensor, v: Tensor, bound: float, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Moments float32 [rows, n] -> codes of m / r (int8 [rows, n]) and of r = sqrt(v) (uint8 [rows, n]), and the
    scales of r (float32 [rows, blocks]).

    `step` sets the thresholds of the rounding.
    """
    n = m.shape[1]
    block = min(n, BLOCK)
    m, r = (F.pad(x, (0, -n % block)).unflatten(1, (-1, block)) for x in (m, v.sqrt()))
    scale = r.amax(2)
    root_threshold, ratio_threshold = thresholds(step, r.device)[:, :block]
    code = 255 + OCTAVE * (r / scale.clamp_min(TINY)[..., None]).log2()  # -inf for 0: the lowest code
    code = code.add_(root_threshold).floor_().clamp_(0, 255)
    ratio = m.div(_root(code, scale[..., None]).clamp_min(TINY)).mul_(127 / bound)
    # Alike for both signs, or the moment would drift.
    ratio = ratio.add_(ratio_threshold * ratio.sign()).trunc_().clamp_(-127, 127)
    return ratio.to(torch.int8).flatten(1)[:, :n], code.to(torch.uint8).flatten(1)[:, :n], scale


def decode(ratio: Tensor, root: Tensor, scale: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """The moments m and v, float32 [rows, n], that codes stand for."""
    n = root.shape[1]
    r = _root(root.float(), scale.repeat_interleave(min(n, BLOCK), 1)[:, :n])
    return ratio * (bound / 127) * r, r.square()


def _root(code: Tensor, scale: Tensor) -> Tensor:
    return torch.exp2((code - 255) / OCTAVE).mul_(scale)


@lru_cache(maxsize=1)
def thresholds(step: int, device: torch.device) -> Tensor:
    """Of the codes of r and of m / r in each place of a block, float32 [2, BLOCK]; all tensors of a step share them."""
    count = torch.arange(step, step + BLOCK, device=device, dtype=torch.float64)
    return torch.stack([count.mul(number).frac() for number in IRRATIONALS]).float()


def triton_update(weight: Tensor, gradient: Tensor, state: dict[str, Tensor], step: Step) -> None:
    """`update` by the kernel below."""
    bound = ratio_bound(step.beta1, step.beta2)
    root_threshold, ratio_threshold = thresholds(step.number, weight.device)
    blocks = state["scale"].numel()
    programs = -(-blocks // BLOCKS_PER_PROGRAM)
    _update[(programs,)](
        weight.view(torch.int16), gradient, *(state[name] for name in ELEMENTWISE), state["scale"],
        root_threshold, ratio_threshold, blocks, weight[0].numel(), bound / 127, *step[1:],
        OCTAVE=OCTAVE, TINY=TINY, BLOCK=BLOCK, BLOCKS=BLOCKS_PER_PROGRAM,
        enable_fp_fusion=False,  # a product and a sum rounded once would not be torch's
    )


if triton is not None:

    @triton.jit
    def _update(
        weights, gradients, remainders, ratios, roots, scales, root_thresholds, ratio_thresholds, blocks, width,
        ratio_step, beta1, beta2, eps, decay, rate, correction,
        OCTAVE: tl.constexpr, TINY: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    ):
        """Program p updates blocks p * BLOCKS and on, of rows of `width`; weights are the bit patterns of bfloat16."""
        block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        column = tl.arange(0, BLOCK)
        blocks_of_row = tl.cdiv(width, BLOCK)
        in_row = (block % blocks_of_row * BLOCK)[:, None] + column[None, :]
        place = (block // blocks_of_row * width)[:, None] + in_row
        inside = (block < blocks)[:, None] & (in_row < width)
        g = tl.load(gradients + place, mask=inside, other=0.0)
        high = tl.load(weights + place, mask=inside, other=0).to(tl.int32)
        low = tl.load(remainders + place, mask=inside, other=0).to(tl.int32)
        master = ((high << 16) + low).to(tl.float32, bitcast=True) * decay

        scale = tl.load(scales + block, mask=block < blocks, other=0.0)
        code = tl.load(roots + place, mask=inside, other=0).to(tl.float32)
        r = tl.exp2((code - 255) / OCTAVE) * scale[:, None]
        ratio = tl.load(ratios + place, mask=inside, other=0).to(tl.float32)
        m = ratio * ratio_step * r
        m += (g - m) * (1 - beta1)
        r = tl.sqrt_rn(r * r * beta2 + g * g * (1 - beta2))
        master -= rate * tl.div_rn(m, tl.div_rn(r, correction) + eps)

        bits = master.to(tl.int32, bitcast=True)
        high = (bits + 0x8000) >> 16
        tl.store(weights + place, high.to(tl.int16), mask=inside)
        tl.store(remainders + place, (bits - (high << 16)).to(tl.int16), mask=inside)

        scale = tl.max(r, 1)
        threshold = tl.load(root_thresholds + column)[None, :]
        code = 255 + OCTAVE * tl.log2(r / tl.maximum(scale, TINY)[:, None]) + threshold
        code = tl.minimum(tl.maximum(tl.floor(code), 0.0), 255.0)
        r = tl.maximum(tl.exp2((code - 255) / OCTAVE) * scale[:, None], TINY)
        ratio = tl.div_rn(m, r) / ratio_step
        # Away from zero by the threshold and then towards it: alike for both signs, or the moment would drift.
        threshold = tl.load(ratio_thresholds + column)[None, :]
        size = tl.minimum(tl.floor(tl.abs(ratio) + threshold), 127.0)
        size = tl.where(ratio == 0, 0.0, size)  # a threshold just below 1 is 1 in float32
        ratio = tl.where(ratio < 0, -size, size)
        tl.store(ratios + place, ratio.to(tl.int8), mask=inside)
        tl.store(roots + place, code.to(tl.uint8), mask=inside)
        tl.store(scales + block, scale, mask=block < blocks)
