"""Granite 4 below the decoder: what its config has beside the rest, and the state of its Mamba layers.

Most of its layers have no attention but a Mamba-2 recurrence, whose state of a text does not grow with the text. The
layers themselves are in granite.py; config.py and attention.py, which every model needs, know only this file.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanosafe.io.fields import wrong
from nanosafe.kernels.scan import Segments, convolve, convolve_step, scan, scan_step

LAYER_TYPES = {
    "mamba": "mamba",
    "linear_attention": "mamba",
    "attention": "attention",
    "full_attention": "attention",
}


@dataclass(frozen=True)
class Hybrid:
    """What GraniteMoeHybrid has beside the rest: layers of Mamba-2, and a mixture of experts."""

    layer_types: tuple[str, ...]  # "mamba" or "attention"
    mamba_heads: int
    mamba_head_dim: int
    state_size: int
    groups: int  # of heads that share B and C
    conv_size: int
    chunk_size: int  # of the scan: speed and memory, not the result
    conv_bias: bool
    proj_bias: bool
    experts: int  # 0: every layer has the shared MLP alone
    experts_per_token: int
    shared_intermediate_size: int
    balance_coef: float  # of the load-balancing loss; 0 where the config leaves it out of the loss

    @property
    def channels(self) -> int:
        """Of the convolution: x, B and C."""
        return self.mamba_heads * self.mamba_head_dim + 2 * self.groups * self.state_size


def read_hybrid(fields: dict, source: str) -> Hybrid:
    """`fields` of config.json, checked one by one; those of Mamba must fit together where a layer is Mamba."""
    layers, heads = fields["num_hidden_layers"], fields["mamba_n_heads"]
    kinds = fields["layer_types"] or fields["layers_block_type"] or ["mamba"] * layers
    if len(kinds) != layers or not set(kinds) <= LAYER_TYPES.keys():
        raise wrong(source, "layer_types", kinds, f"{layers} of {', '.join(LAYER_TYPES)}")
    layer_types = tuple(LAYER_TYPES[kind] for kind in kinds)
    groups, inner = fields["mamba_n_groups"], fields["mamba_expand"] * fields["hidden_size"]
    if "mamba" in layer_types:
        if fields["mamba_d_head"] not in (None, "auto", inner // heads) or inner % heads:
            meaning = f"mamba_expand * hidden_size = {inner} by mamba_n_heads = {heads}"
            raise wrong(source, "mamba_d_head", fields["mamba_d_head"], meaning)
        if heads % groups:
            raise wrong(source, "mamba_n_groups", groups, f"a divisor of the {heads} heads")
    experts, chosen = fields["num_local_experts"], fields["num_experts_per_tok"]
    if experts and not 1 <= chosen <= experts:
        raise wrong(source, "num_experts_per_tok", chosen, f"from 1 to the {experts} experts")
    balanced = experts and fields["output_router_logits"]
    return Hybrid(
        layer_types=layer_types,
        mamba_heads=heads,
        mamba_head_dim=inner // heads,
        state_size=fields["mamba_d_state"],
        groups=groups,
        conv_size=fields["mamba_d_conv"],
        chunk_size=fields["mamba_chunk_size"],
        conv_bias=fields["mamba_conv_bias"],
        proj_bias=fields["mamba_proj_bias"],
        experts=experts,
        experts_per_token=chosen if experts else 0,
        shared_intermediate_size=fields["shared_intermediate_size"],
        balance_coef=fields["router_aux_loss_coef"] if balanced else 0.0,
    )


class StateCache:
    """What the convolutions and scans of all Mamba layers keep of the sequences in `slots` slots, and of a scratch one.

    The states are float32: rounding would add up over the tokens.
    """

    def __init__(self, hybrid: Hybrid, slots: int, device: torch.device, dtype: torch.dtype):
        shape = hybrid.layer_types.count("mamba"), slots + 1
        past = (hybrid.conv_size - 1, hybrid.channels)
        state = (hybrid.mamba_heads, hybrid.mamba_head_dim, hybrid.state_size)
        self.past = torch.zeros(*shape, *past, device=device, dtype=dtype)
        self.states = torch.zeros(*shape, *state, device=device)

    @staticmethod
    def bytes_per_slot(hybrid: Hybrid, dtype: torch.dtype) -> int:
        past = (hybrid.conv_size - 1) * hybrid.channels * dtype.itemsize
        state = 4 * hybrid.mamba_heads * hybrid.mamba_head_dim * hybrid.state_size
        return hybrid.layer_types.count("mamba") * (past + state)

    def begin(self, slot: int, source: int | None) -> None:
        """A sequence starts in `slot` with what slot `source` holds or, without a source, with nothing."""
        for tensor in (self.past, self.states):
            tensor[:, slot] = 0 if source is None else tensor[:, source]


class HybridState:
    """What the layers of a hybrid share in one forward pass, as its attention layers share an attention backend.

    Without a cache, the documents of `segments` begin with no state. With one, sequence i goes on from slots[i]: by the
    tokens of its segment or, without segments, by a single token. Mamba layers are counted among themselves.
    """

    def __init__(self, segments: Segments | None, cache: StateCache | None = None, slots: Tensor | None = None):
        self.segments, self.cache, self.slots = segments, cache, slots
        self.routing: dict[int, Routing] = {}  # of each layer with experts, noted where there is no cache

    def convolve(self, layer: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See kernels/scan.py, as for `scan`."""
        if self.cache is None:
            return convolve(x, weight, bias, self.segments)[0]
        past = self.cache.past[layer]
        if self.segments is None:
            out, past[self.slots] = convolve_step(x, weight, bias, past[self.slots])
        else:
            out, past[self.slots] = convolve(x, weight, bias, self.segments, past[self.slots])
        return out

    def scan(self, layer: int, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int) -> Tensor:
        if self.cache is None:
            return scan(x, dt, A, B, C, self.segments, chunk_size)[0]
        states = self.cache.states[layer]
        if self.segments is None:
            return scan_step(x, dt, A, B, C, states, self.slots)
        y, states[self.slots] = scan(x, dt, A, B, C, self.segments, chunk_size, states[self.slots])
        return y


@dataclass
class Routing:
    """What the router of a layer did with the tokens of a forward pass."""

    load: Tensor  # [experts] tokens that chose each
    probability: Tensor  # [experts] sum over the tokens of the softmax over all experts
    tokens: int
