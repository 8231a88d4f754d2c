"""The gradient step: float32 masters of the weights, one global denominator, AdamW, a cosine schedule.

A loss divided by the token count of the whole optimizer step gives gradients that simply add up over micro-batches and
ranks. They add up in float32, whatever the compute type: in bfloat16 the 64th micro-batch would no longer register.
With --dtype float32 the model's own parameters are the masters; with --low-memory no master exists as a tensor, it is
the bfloat16 parameter and a remainder (split_adam.py).
"""

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nanosafe.model.weights import StoredTensors
from nanosafe.parallel import full_tensor
from nanosafe.train.low_memory import SplitAdamW, split_parameters


def cosine_schedule(step: int, steps: int, warmup_share: float, final_share: float) -> float:
    """The factor on the peak learning rate at `step` (from 0) of `steps`.

    Linear warm-up over `warmup_share` of the steps, which starts above 0 and reaches 1, then half a cosine to
    `final_share`.
    """
    warmup = math.ceil(warmup_share * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)  # below 1, so that no step is spent at a rate of 0
    return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * progress))


class Optimizer:
    """AdamW (arXiv 1711.05101) on float32 masters. Weight decay acts on matrices, not on norms and biases."""

    def __init__(self, model: nn.Module, *, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, max_grad_norm=1.0,
                 low_memory=False):
        """low_memory: 6.02 bytes per parameter for weights, masters and 8-bit moments together, instead of 14.

        Raises ValueError for parameters that are not bfloat16.
        """
        self.max_grad_norm = max_grad_norm
        trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        self.parameters = dict(trained)
        # A master is what AdamW updates; its .grad collects the gradient of the step in float32.
        self.masters = split_parameters(self.parameters) if low_memory else self._float32_masters()
        matrices = [master for master in self.masters.values() if master.ndim >= 2]
        others = [master for master in self.masters.values() if master.ndim < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        if low_memory:
            self.adam = SplitAdamW(groups, lr=0.0, betas=betas, eps=eps)
        else:
            # On CUDA the default makes all square roots of the second moments at once, 4 bytes a parameter.
            fused = all(master.device.type == "cuda" for master in self.masters.values())
            self.adam = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=fused)

    def _float32_masters(self) -> dict[str, Tensor]:
        """The parameters that are float32, and a float32 copy of each other one, which takes over its gradients."""

        def accumulate_into(master: Tensor):
            def hook(parameter: Tensor) -> None:
                if master.grad is None:
                    master.grad = parameter.grad.float()
                else:
                    master.grad.add_(parameter.grad)
                parameter.grad = None

            return hook

        masters = {}
        for name, parameter in self.parameters.items():
            if parameter.dtype == torch.float32:
                masters[name] = parameter
            else:
                masters[name] = parameter.detach().float()
                parameter.register_post_accumulate_grad_hook(accumulate_into(masters[name]))
        return masters

    def step(self, lr: float) -> float:
        """Clip the norm of the gradients, over all ranks, and update. Returns the norm before clipping.

        A norm that is not finite (on every rank alike) leaves the weights untouched.
        """
        norm = nn.utils.clip_grad_norm_(self.masters.values(), self.max_grad_norm)
        norm = full_tensor(norm).item()
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
        """What resuming needs beside the model's files: AdamW's own state, and masters that may be finer than those."""
        tensors = {}
        for name, master in self.masters.items():
            for key, value in self.adam.state.get(master, {}).items():
                tensors[f"{key}/{name}"] = value
            # Shards in float32 may be finer than the files. With --low-memory they are bfloat16, as the files are.
            finer_shards = isinstance(master, DTensor) and master.dtype == torch.float32
            if master is not self.parameters[name] or finer_shards:
                tensors[f"master/{name}"] = master
        return tensors

    @torch.no_grad()
    def load_state(self, stored: StoredTensors) -> None:
        """The inverse of `state`, on an optimizer of the same model, whatever number of processes saved it.

        Raises ValueError, having changed nothing, for the state of another one.
        """
        self._check_state(stored)
        fused = self.adam.param_groups[0].get("fused")
        for path in stored:
            key, name = path.split("/", 1)
            master = self.masters[name]
            value = stored.read(path, like=self.adam.state[master].get(key, master))
            if key == "master":
                master.copy_(value)
            else:
                # Only the fused AdamW of CUDA wants the number of its steps on the device.
                on_cpu = key == "step" and not fused
                self.adam.state[master][key] = value.to("cpu" if on_cpu else master.device)

    def _check_state(self, stored: StoredTensors) -> None:
        keys = {path.split("/")[0] for path in stored}  # each must be there for every parameter
        wrong = stored.keys() ^ {f"{key}/{name}" for key in keys for name in self.masters}
        for path in stored.keys() - wrong:
            key, name = path.split("/", 1)
            master = self.masters[name]
            like = self.adam.state[master].get(key, master)
            if key != "step" and stored[path].shape != list(like.shape):
                wrong.add(path)
        if wrong:
            raise ValueError("optimizer.safetensors does not fit the model; missing, misshapen or "
                             f"of no parameter: {', '.join(sorted(wrong)[:5])}")
