"""Models that live in CPU memory and are on the GPU only while they compute: reference, reward model, guards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """`model` on `device` inside the block, and where it was before after it; nothing moves if that is the same.
    One that is sharded over ranks is gathered as it computes, and is in its parts again after the block.

    Only for models that do not change, because nothing is copied back. A model that goes to a GPU stays in pinned
    memory from its first time on: pageable memory crosses at a fraction of the link's speed, and the host waits for it.
    """
    if isinstance(model, FSDPModule):
        yield model
        model.reshard()  # Embedding and head, which stay gathered after a forward pass, wait for no backward.
        return
    stored = []
    for parameter in model.parameters():
        if device.type == "cuda" and parameter.device.type == "cpu":
            parameter.data = parameter.data.pin_memory()  # no copy where it is pinned already
        stored.append(parameter.data)
        parameter.data = parameter.data.to(device, non_blocking=True)
    try:
        yield model
    finally:
        for parameter, data in zip(model.parameters(), stored, strict=True):
            parameter.data = data
