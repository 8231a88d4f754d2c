"""AdamW in 6.02 bytes per parameter, gradients aside, for a model that has one GPU to itself.

bfloat16 weight 2, remainder 2, first moment 1, second moment 1, scale 4 / 256. AdamW on float32 masters takes 14.

The float32 master is exact: its upper half is the weight that the model computes with, its lower half the remainder.

The moments are 8-bit codes in blocks that each have their own scale, as in Dettmers et al., "8-bit Optimizers via
Block-wise Quantization" (arXiv 2110.02861). The codes are other ones, made for what the moments are for, the update
m / sqrt(v):
- r = sqrt(v), which divides, is coded by its logarithm: the error is relative and no code means 0. An entry below the
  range has its r rounded up, so its step becomes smaller, never larger.
- m is coded as m / r in even steps. Cauchy-Schwarz bounds it (see `ratio_bound`), so the code needs no scale, its
  error is that of the update itself, and no block can hold a large m over a lost v.
A moment changes by less than a step of its code, so rounding to the nearest code would never let it decay. The
threshold that decides between the two nearest codes instead visits [0, 1) evenly over the steps.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # elements that share a scale
CHUNK = 2**23  # elements updated at once, whole blocks: bounds the temporary memory, eleven float32 for each
OCTAVE = 255 / 20  # codes of r per factor of two: 256 codes reach down to 2**-20 of the block's largest r
SPREAD = (math.sqrt(5) - 1) / 2, math.sqrt(2) - 1  # whose multiples modulo 1 spread evenly, also as pairs
ELEMENTWISE = ("remainder", "ratio", "root")  # what has the shape of the parameter
TINY = torch.finfo(torch.float32).tiny  # what a zero is divided by instead of another


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


def encode(first: Tensor, second: Tensor, bound: float, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Moments m and v, float32 [n] -> codes of m / r (int8 [n]) and r = sqrt(v) (uint8 [n]), scales (float32 [blocks]).

    `step` sets the thresholds of the rounding.
    """
    n = len(first)
    m, r = (F.pad(x, (0, -n % BLOCK)).view(-1, BLOCK) for x in (first, second.sqrt()))
    scale = r.amax(1)
    count = torch.arange(step, step + BLOCK, device=r.device, dtype=torch.float64)
    of_root, of_ratio = (count.mul(number).frac().float() for number in SPREAD)
    code = 255 + OCTAVE * (r / scale.clamp_min(TINY)[:, None]).log2()  # -inf for 0: the lowest code
    code = code.add_(of_root).floor_().clamp_(0, 255)
    ratio = m.div(_root(code, scale[:, None]).clamp_min(TINY)).mul_(127 / bound)
    ratio = ratio.add_(of_ratio * ratio.sign()).trunc_().clamp_(-127, 127)  # alike for both signs: no drift
    return ratio.to(torch.int8).view(-1)[:n], code.to(torch.uint8).view(-1)[:n], scale


def decode(ratio: Tensor, root: Tensor, scale: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """The moments m and v, float32 [n], that codes stand for."""
    r = _root(root.float(), scale.repeat_interleave(BLOCK)[: len(root)])
    return ratio * (bound / 127) * r, r.square()


def _root(code: Tensor, scale: Tensor) -> Tensor:
    return torch.exp2((code - 255) / OCTAVE).mul_(scale)


class SplitAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW for contiguous bfloat16 parameters with float32 gradients, which stay as they are."""

    def __init__(self, groups: list[dict], *, lr: float, betas: tuple[float, float], eps: float):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self.bound = ratio_bound(*betas)
        for parameter in (p for group in self.param_groups for p in group["params"]):
            self.state[parameter] = {
                "step": torch.tensor(0.0),
                "remainder": torch.zeros_like(parameter, dtype=torch.int16),
                "ratio": torch.zeros_like(parameter, dtype=torch.int8),
                "root": torch.zeros_like(parameter, dtype=torch.uint8),
                "scale": torch.zeros(math.ceil(parameter.numel() / BLOCK), device=parameter.device),
            }

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict) -> None:
        """One tensor, chunk by chunk, with the operations of torch.optim.AdamW in their order."""
        (beta1, beta2), lr, state = group["betas"], group["lr"], self.state[parameter]
        state["step"] += 1
        step = int(state["step"])
        flat = [x.view(-1).split(CHUNK) for x in (parameter.grad, parameter, *(state[k] for k in ELEMENTWISE))]
        scales = state["scale"].split(CHUNK // BLOCK)
        for gradient, weight, remainder, ratio, root, scale in zip(*flat, scales, strict=True):
            master = join(weight, remainder).mul_(1 - lr * group["weight_decay"])
            m, v = decode(ratio, root, scale, self.bound)
            m.lerp_(gradient, 1 - beta1)
            v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            denominator = v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
            master.addcdiv_(m, denominator, value=-lr / (1 - beta1**step))
            for old, new in zip((weight, remainder), split(master), strict=True):
                old.copy_(new)
            for old, new in zip((ratio, root, scale), encode(m, v, self.bound, step), strict=True):
                old.copy_(new)
