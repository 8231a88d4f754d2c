"""Models that live in CPU memory and are on the GPU only while they compute: reference, reward model, guards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

PINNED = 2**31  # bytes of a buffer
ALIGNMENT = 512  # bytes, as PyTorch places tensors on a GPU


@contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """`model` on `device` inside the block, and where it was before after it; nothing moves if that is the same.
    One that is sharded over ranks is gathered as it computes, and is in its parts again after the block.

    Only for models that do not change, because nothing is copied back. A model that goes to a GPU stays in pinned
    memory from its first time on, see `pin`.
    """
    if isinstance(model, FSDPModule):
        yield model
        model.reshard()  # Embedding and head, which stay gathered after a forward pass, wait for no backward.
        return
    if device.type == "cuda":
        pin(model)
    stored = []
    for parameter in model.parameters():
        stored.append(parameter.data)
        parameter.data = parameter.data.to(device, non_blocking=True)
    try:
        yield model
    finally:
        for parameter, data in zip(model.parameters(), stored, strict=True):
            parameter.data = data


def pin(model: nn.Module) -> None:
    """Move what of the model is in pageable memory to pinned memory: pageable memory crosses at a fraction of the
    link's speed, and the host waits for it.

    PyTorch rounds what it pins up to a power of two, which alone would nearly double some models. So the parameters lie
    one behind the other in few buffers of such a size.
    """
    pageable = [parameter for parameter in model.parameters() if parameter.device.type == "cpu"]
    pageable = [parameter for parameter in pageable if not parameter.is_pinned()]
    left, buffer, used = sum(map(aligned_bytes, pageable)), None, 0
    for parameter in pageable:
        nbytes = aligned_bytes(parameter)
        if buffer is None or used + nbytes > len(buffer):
            buffer, used = pinned_bytes(max(nbytes, min(left, PINNED))), 0
        home = buffer[used : used + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        parameter.data = home.copy_(parameter.data)
        used, left = used + nbytes, left - nbytes


def aligned_bytes(parameter: Tensor) -> int:
    return -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT


def pinned_bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, pin_memory=True)
