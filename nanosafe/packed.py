"""The same weights as oneDNN's matrix product wants them: what the sampler multiplies by on a CPU.

A decode step reads every weight once for a handful of rows. From a plain row-major matrix a CPU reaches only part of
its memory bandwidth doing so, from one reordered into oneDNN's blocked layout most of it. Packing costs a second copy
of the weights and about as much time as a few decode steps. torch's functions for it are private: they are tried, and
where they refuse (no AVX-512 in bfloat16, no oneDNN) the plain weights stay.
"""

import copy
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanosafe.model import Decoder
from nanosafe.products import onednn_linear

SMALLEST = 2**18  # elements; below, a call into oneDNN costs more than it saves


class PackedLinear(nn.Module):
    """x @ weight.T + bias from a packed copy of weight [out, in]; without gradients."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.packed, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None), bias

    def forward(self, x: Tensor) -> Tensor:
        return onednn_linear(x, self.packed, self.bias)


def packed_view(model: Decoder, rows: int) -> Decoder:
    """A decoder that shares every tensor with `model` but multiplies by packed copies of its larger matrices.

    For inference with about `rows` tokens at a time. Returns `model` itself where packing cannot or does not pay.
    """
    dtype = model.head_weight.dtype
    if dtype == torch.float32 and rows == 1 or not packing_works(dtype):
        return model  # a single float32 row streams plain weights at full bandwidth already
    view = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), model.config)})
    for module in list(view.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and child.weight.numel() >= SMALLEST:
                setattr(module, name, PackedLinear(child.weight, child.bias))
    if view.config.tie_word_embeddings and view.head_weight.numel() >= SMALLEST:
        view.lm_head = PackedLinear(view.head_weight)
        view.config = dataclasses.replace(view.config, tie_word_embeddings=False)
    return view


def packing_works(dtype: torch.dtype) -> bool:
    """Whether this PyTorch on this CPU packs weights of `dtype`, and multiplies by them rightly."""
    try:
        weight, x = torch.eye(32, dtype=dtype), torch.arange(64, dtype=dtype).view(2, 32)
        return torch.equal(PackedLinear(weight)(x), F.linear(x, weight))
    except (AttributeError, RuntimeError):
        return False
