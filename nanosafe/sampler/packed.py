"""The same weights as oneDNN's matrix product wants them: what the sampler multiplies by on a CPU.

A decode step reads every weight once for a handful of rows. From a plain row-major matrix a CPU reaches only part of
its memory bandwidth doing so, from one reordered into oneDNN's blocked layout most of it. Packing costs a second copy
of the weights and about as much time as a few decode steps. Matrices that multiply the same input are joined on the
way, for in a small model every operation costs as much as what it computes. torch's functions for packing are private:
they are tried, and where they refuse (no AVX-512 in bfloat16, no oneDNN) the plain weights stay.
"""

import copy
import dataclasses
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanosafe.kernels.cpu_matmul import Linear, onednn_linear
from nanosafe.model.decoder import MLP, Attention, Decoder, rotate
from nanosafe.model.granite import swiglu

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


def packed(plain: nn.Linear) -> nn.Module:
    return PackedLinear(plain.weight, plain.bias) if plain.weight.numel() >= SMALLEST else plain


def joined(*parts: nn.Linear) -> nn.Linear:
    """One product for `parts`, which multiply the same x: their results one behind the other, [..., sum of widths]."""
    tensors = {name: torch.cat([part.get_parameter(name).detach() for part in parts])
               for name, _ in parts[0].named_parameters()}
    module = Linear(parts[0].in_features, len(tensors["weight"]), "bias" in tensors, device="meta")
    module.load_state_dict(tensors, assign=True)
    return module


class JoinedAttention(nn.Module):
    """Attention with one product for q, k and v; the heads of q and k are normalised and rotated together."""

    def __init__(self, plain: Attention):
        super().__init__()
        self.layer, self.head_dim, self.scale = plain.layer, plain.head_dim, plain.scale
        parts = plain.q_proj, plain.k_proj, plain.v_proj
        self.heads = [part.out_features // plain.head_dim for part in parts]
        self.qkv_proj, self.o_proj = packed(joined(*parts)), plain.o_proj
        self.norm = None
        if plain.q_norm is not None:
            self.eps = plain.q_norm.eps
            norms = zip((plain.q_norm, plain.k_norm), self.heads, strict=False)
            self.norm = torch.cat([norm.weight.detach().float().expand(heads, -1) for norm, heads in norms])

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, memory) -> Tensor:
        H, H_kv, _ = self.heads
        qk, v = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).split([H + H_kv, H_kv], dim=1)
        if self.norm is not None:
            qk = (F.rms_norm(qk.float(), (self.head_dim,), None, self.eps) * self.norm).to(v.dtype)
        if cos is not None:
            qk = rotate(qk, cos, sin)
        q, k = qk.split([H, H_kv], dim=1)
        return self.o_proj(memory.attend(self.layer, q, k, v, self.scale).flatten(-2))


class JoinedMLP(nn.Module):
    """SwiGLU with one product for gate and up."""

    def __init__(self, plain: MLP):
        super().__init__()
        self.gate_up_proj, self.down_proj = packed(joined(plain.gate_proj, plain.up_proj)), plain.down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x)))


JOINED = {Attention: JoinedAttention, MLP: JoinedMLP}


def packed_view(model: Decoder, memory: int) -> Decoder:
    """A decoder that multiplies by packed copies of the larger matrices of `model`, and shares what it does not copy.

    For inference. The view of a frozen model, none of whose parameters asks for a gradient, is kept for the next call,
    for as long as the model lives and its parameters stay as they are. Returns `model` itself where torch cannot pack,
    or where copies of all weights would take more than half of `memory` bytes.
    """
    weights = list(model.parameters())
    state = [(weight.data_ptr(), weight._version) for weight in weights]
    if model in _kept and _kept[model][0] == state:
        return _kept[model][1]
    _kept.pop(model, None)
    if 2 * sum(weight.nbytes for weight in weights) >= memory or not packing_works(model.head_weight.dtype):
        return model
    view = copy.deepcopy(model, {id(shared): shared for shared in (*weights, model.config)})
    for module in list(view.modules()):  # before packing, so that nothing is packed that is then replaced
        for name, child in module.named_children():
            if type(child) in JOINED:
                setattr(module, name, JOINED[type(child)](child))
    for module in list(view.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, packed(child))
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
