"""Elementwise functions as one kernel on CUDA, made by torch.compile from the plain function, which is the code.

Such work takes the time of reading and writing memory, and plain PyTorch does that anew for each operation. Functions
are compiled and never blocks: attention, sharding's hooks and gradient checkpointing stay outside.
"""

from collections.abc import Callable
from functools import cache, wraps

import torch
from torch import Tensor

# Inductor would carry float32 from one operation to the next where plain PyTorch rounds each result to bfloat16, and
# the trainer would no longer compute what the sampler computes. So it rounds where plain PyTorch does.
ROUNDED = {"emulate_precision_casts": True}


def compiled_in_training(function: Callable) -> Callable:
    """`function`, whose first argument is a tensor [N, ...], compiled where that is on CUDA and gradients are wanted.

    Without gradients it stays plain: the sampler calls it too, with every number of rows and while graphs are captured.
    """

    @wraps(function)
    def choose(x: Tensor, *others):
        # PyTorch would compile once more for each of 0 rows and 1 row; all others share one compilation.
        worthwhile = x.is_cuda and torch.is_grad_enabled() and len(x) > 1
        chosen = compiled(function) if worthwhile else function
        return chosen(x, *others)

    return choose


@cache
def compiled(function: Callable) -> Callable:
    """`function` compiled at its first call, for tensors of any size."""
    return torch.compile(function, dynamic=True, options=ROUNDED)
