"""AdamW in 6.02 bytes per parameter, gradients aside; of several ranks each has those of its own rows.

bfloat16 weight 2, remainder 2, first moment 1, second moment 1, scale 4 / 256; more where rows are short, as those of
norms and of LoRA's B are. AdamW on float32 masters takes 14, over several ranks 12. What these are, and how an update
changes them, is in kernels/split_adam.py.
"""

import torch
from torch import Tensor

from nanosafe.kernels import split_adam
from nanosafe.parallel import local_part


def split_parameters(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters themselves, made to collect their gradients in float32. Raises ValueError for other types."""

    def widen(parameter: Tensor) -> None:
        parameter.grad = parameter.grad.float()  # later gradients are added to it in place

    for name, parameter in parameters.items():
        if parameter.dtype != torch.bfloat16:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise ValueError(f"--low-memory splits bfloat16 weights, but {name} is {kind}: add --dtype bfloat16")
        parameter.grad_dtype = None  # .grad may be of any type
        # FSDP2 calls it too: each sum over the ranks, made in float32, comes rounded to the parameter's type.
        parameter.register_post_accumulate_grad_hook(widen)
    return parameters


class SplitAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW for contiguous bfloat16 parameters with float32 gradients, which stay as they are."""

    def __init__(self, groups: list[dict], *, lr: float, betas: tuple[float, float], eps: float):
        """Raises ValueError for betas without a bound on the ratio of the moments (see split_adam.ratio_bound)."""
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        split_adam.ratio_bound(*betas)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {"step": torch.tensor(0.0)} | split_adam.new_state(parameter)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            settings = [group[name] for name in ("lr", "betas", "eps", "weight_decay")]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["step"] += 1
                    step = split_adam.Step.of(int(state["step"]), *settings)
                    weight, gradient = local_part(parameter), local_part(parameter.grad)
                    local_state = {name: local_part(tensor) for name, tensor in state.items()}
                    if len(weight):  # a parameter of few rows has none for the last ranks
                        split_adam.update(weight, gradient, local_state, step)
