"""The gradient step: float32 masters of the weights, one global denominator, AdamW, a cosine schedule.

A loss divided by the token count of the whole optimizer step gives gradients that simply add up over micro-batches and
ranks. They add up in float32, whatever the compute type: in bfloat16 the 64th micro-batch would no longer register.
With --dtype float32 the model's own parameters are the masters.
"""

import math

import torch
from torch import Tensor, nn

from nanosafe.distributed import Ranks


def cosine_schedule(step: int, steps: int, warmup_share: float, final_share: float) -> float:
    """The factor on the peak learning rate at `step` (from 0) of `steps`.

    Linear warm-up over `warmup_share` of the steps that starts above 0 and reaches 1, then half a cosine to
    `final_share`.
    """
    warmup = math.ceil(warmup_share * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)  # below 1, so that no step is spent at a rate of 0
    return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * progress))


class Optimizer:
    """AdamW (arXiv 1711.05101) on float32 masters. Weight decay acts on matrices, not on norms and biases."""

    def __init__(
        self, model: nn.Module, ranks: Ranks, *, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, max_grad_norm=1.0
    ):
        self.ranks, self.max_grad_norm = ranks, max_grad_norm
        self.parameters = dict(model.named_parameters())
        self.masters: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            if parameter.dtype == torch.float32:
                self.masters[name] = parameter
            else:
                self.masters[name] = parameter.detach().float()
                parameter.register_post_accumulate_grad_hook(self._accumulator(self.masters[name]))
        self.adam = torch.optim.AdamW(
            [
                {"params": [m for m in self.masters.values() if m.ndim >= 2], "weight_decay": weight_decay},
                {"params": [m for m in self.masters.values() if m.ndim < 2], "weight_decay": 0.0},
            ],
            lr=0.0, betas=betas, eps=eps,
        )  # fmt: skip

    @staticmethod
    def _accumulator(master: Tensor):
        def add(parameter: Tensor) -> None:
            master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
            parameter.grad = None

        return add

    def step(self, lr: float) -> float:
        """Add the gradients over the ranks, clip their norm, update. Returns the norm before clipping.

        A norm that is not finite (on every rank alike, since it is taken after the sum) leaves the weights untouched.
        """
        for master in self.masters.values():
            if master.grad is None:  # this rank had no token, but its part of the sum is still due
                master.grad = torch.zeros_like(master)
            self.ranks.sum_(master.grad)
        norm = nn.utils.clip_grad_norm_(self.masters.values(), self.max_grad_norm).item()
        if math.isfinite(norm):
            for group in self.adam.param_groups:
                group["lr"] = lr
            self.adam.step()
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    if self.masters[name] is not parameter:
                        parameter.copy_(self.masters[name])
        self.adam.zero_grad()
        return norm

    def discard(self) -> float:
        """Drop the gradients instead of stepping; the norm of such a step is NaN."""
        self.adam.zero_grad()
        return math.nan

    def state(self) -> dict[str, Tensor]:
        """What resuming needs beside the model: moments, step counts and, unless they are the model's own, masters."""
        tensors = {}
        for name, master in self.masters.items():
            moments = self.adam.state.get(master, {})
            tensors |= {f"{key}/{name}": value for key, value in moments.items()}
            if master is not self.parameters[name]:
                tensors[f"master/{name}"] = master
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`, on an optimizer of the same model."""
        for name, master in self.masters.items():
            if f"master/{name}" in tensors:
                master.copy_(tensors[f"master/{name}"])
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"{key}/{name}" in tensors:
                    value = tensors[f"{key}/{name}"]
                    self.adam.state[master][key] = value if key == "step" else value.to(master.device)
