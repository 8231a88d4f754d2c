"""A view of a model for sampling on a CPU: fewer, wider products by packed weights.

A decode step reads every weight once for a handful of rows. From a plain row-major matrix a CPU reaches only half of
its memory bandwidth doing so, from a packed one (kernels/cpu_matmul.py) three quarters. Packing costs a second copy of
the weights and about as much time as a few decode steps. Matrices that multiply the same input are joined on the way,
for in a small model every operation costs as much as what it computes. LoRA's adapters are merged into the copies.
"""

import copy
import dataclasses
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanosafe.kernels.cpu_matmul import linear, pack_weight, packing_works
from nanosafe.model.decoder import MLP, Attention, Decoder, rotate, swiglu
from nanosafe.model.lora import merged_weight

SMALLEST = 2**18  # elements; below, a call into oneDNN costs more than it saves
# Model -> what told its parameters from others, and its view
_kept: WeakKeyDictionary[Decoder, tuple[list[tuple], Decoder]] = WeakKeyDictionary()


class PackedLinear(nn.Module):
    """A linear layer without gradients, whose weight is packed where it is large."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight = pack_weight(weight) if weight.numel() >= SMALLEST else weight.detach()
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def join(*layers: nn.Linear) -> PackedLinear:
    """One product for layers that multiply the same x: their results one behind the other."""
    weight = torch.cat([merged_weight(layer) for layer in layers])
    if layers[0].bias is None:
        return PackedLinear(weight)
    return PackedLinear(weight, torch.cat([layer.bias.detach() for layer in layers]))


class JoinedAttention(nn.Module):
    """Attention with one product for q, k and v; the heads of q and k are normalised and rotated together."""

    def __init__(self, plain: Attention):
        super().__init__()
        self.layer, self.head_dim, self.scale = plain.layer, plain.head_dim, plain.scale
        self.H = plain.q_proj.out_features // plain.head_dim
        self.H_kv = plain.k_proj.out_features // plain.head_dim
        self.qkv_proj = join(plain.q_proj, plain.k_proj, plain.v_proj)
        self.o_proj = plain.o_proj
        self.norm = None  # [H + H_kv, head_dim] weights of the norms, float32
        if plain.q_norm is not None:
            self.eps = plain.q_norm.eps
            q_norm, k_norm = plain.q_norm.weight.detach().float(), plain.k_norm.weight.detach().float()
            self.norm = torch.cat([q_norm.expand(self.H, -1), k_norm.expand(self.H_kv, -1)])

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, memory) -> Tensor:
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        qk, v = heads.split([self.H + self.H_kv, self.H_kv], dim=1)
        if self.norm is not None:
            qk = (F.rms_norm(qk.float(), (self.head_dim,), None, self.eps) * self.norm).to(v.dtype)
        if cos is not None:
            qk = rotate(qk, cos, sin)
        q, k = qk.split([self.H, self.H_kv], dim=1)
        return self.o_proj(memory.attend(self.layer, q, k, v, self.scale).flatten(-2))


class JoinedMLP(nn.Module):
    """SwiGLU with one product for gate and up."""

    def __init__(self, plain: MLP):
        super().__init__()
        self.gate_up_proj = join(plain.gate_proj, plain.up_proj)
        self.down_proj = plain.down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(*self.gate_up_proj(x).chunk(2, dim=-1)))


def packed_view(model: Decoder, memory: int) -> Decoder:
    """A decoder that multiplies by packed copies of the larger matrices of `model`, and shares what it does not copy.

    For inference. The view is kept for the next call, for as long as the model lives and its parameters stay as they
    are, or until `forget_packed`. Returns `model` itself where torch cannot pack, or where copies of all weights would
    take more than half of `memory` bytes.
    """
    weights = list(model.parameters())
    # A version counts changes in place, but not those of weight.data, which the sum shows.
    state = [(weight.data_ptr(), weight._version, weight.detach().sum().item()) for weight in weights]
    if model in _kept and _kept[model][0] == state:
        return _kept[model][1]
    _kept.pop(model, None)
    nbytes = sum(weight.nbytes for weight in weights)
    if 2 * nbytes >= memory or not packing_works(model.head_weight.dtype):
        return model
    shared = {id(weight): weight for weight in weights}  # what deepcopy takes as copied already
    view = copy.deepcopy(model, shared | {id(model.config): model.config})
    replace_products(view)
    if view.config.tie_word_embeddings and view.head_weight.numel() >= SMALLEST:
        view.lm_head = PackedLinear(view.head_weight)
        view.config = dataclasses.replace(view.config, tie_word_embeddings=False)
    _kept[model] = state, view
    return view


def forget_packed(model: Decoder) -> None:
    """Give the memory of a model's packed copies back, before it is trained."""
    _kept.pop(model, None)


def replace_products(module: nn.Module) -> None:
    """Put what multiplies by packed weights in place of all layers inside `module` that have a faster form."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(merged_weight(child), child.bias))
            continue
        if type(child) is Attention:
            child = JoinedAttention(child)
        elif type(child) is MLP:
            child = JoinedMLP(child)
        setattr(module, name, child)
        replace_products(child)
