"""The same weights as oneDNN's matrix product wants them: what the sampler multiplies by on a CPU.

A decode step reads every weight once for a handful of rows. From a plain row-major matrix a CPU reaches only part of
its memory bandwidth doing so, from one reordered into oneDNN's blocked layout most of it. Packing costs a second copy
of the weights and about as much time as a few decode steps. torch's functions for it are private: they are tried, and
where they refuse (no AVX-512 in bfloat16, no oneDNN) the plain weights stay.
"""

import copy
import dataclasses
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanosafe.model import Decoder
from nanosafe.products import onednn_linear

SMALLEST = 2**18  # elements; below, a call into oneDNN costs more than it saves
# Frozen model -> where its parameters lay and how often they had been changed, and its view
_kept: WeakKeyDictionary[Decoder, tuple[list[tuple[int, int]], Decoder]] = WeakKeyDictionary()


class PackedLinear(nn.Module):
    """x @ weight.T + bias from a packed copy of weight [out, in]; without gradients."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.packed, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None), bias

    def forward(self, x: Tensor) -> Tensor:
        return onednn_linear(x, self.packed, self.bias)


def packed_view(model: Decoder, memory: int) -> Decoder:
    """A decoder that shares every tensor with `model` but multiplies by packed copies of its larger matrices.

    For inference. That of a frozen model, none of whose parameters asks for a gradient, is kept for the next call, for
    as long as the model lives and its parameters stay as they are. Returns `model` itself where torch cannot pack, or
    where copies of all weights would take more than half of `memory` bytes.
    """
    weights = list(model.parameters())
    state = [(weight.data_ptr(), weight._version) for weight in weights]
    if model in _kept and _kept[model][0] == state:
        return _kept[model][1]
    _kept.pop(model, None)
    if 2 * sum(weight.nbytes for weight in weights) >= memory or not packing_works(model.head_weight.dtype):
        return model
    view = copy.deepcopy(model, {id(shared): shared for shared in (*weights, model.config)})
    for module in list(view.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and child.weight.numel() >= SMALLEST:
                setattr(module, name, PackedLinear(child.weight, child.bias))
    if view.config.tie_word_embeddings and view.head_weight.numel() >= SMALLEST:
        view.lm_head = PackedLinear(view.head_weight)
        view.config = dataclasses.replace(view.config, tie_word_embeddings=False)
    if not any(weight.requires_grad for weight in weights):
        _kept[model] = state, view
    return view


def packing_works(dtype: torch.dtype) -> bool:
    """Whether this PyTorch on this CPU packs weights of `dtype`, and multiplies by them rightly."""
    try:
        weight, x = torch.eye(32, dtype=dtype), torch.arange(64, dtype=dtype).view(2, 32)
        return torch.equal(PackedLinear(weight)(x), F.linear(x, weight))
    except (AttributeError, RuntimeError):
        return False
