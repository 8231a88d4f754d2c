"""Granite 4: a decoder whose layers are mostly Mamba-2 mixers, with a mixture of experts beside a shared MLP.

The mixer is a recurrence (arXiv 2405.21060) instead of attention. What it does along time is asked of the backend's
HybridState (hybrid.py), as attention is of the backend. Of the experts a router chooses a few for each token; small
models have the shared MLP alone. Module names are those of the checkpoints on the hub.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanosafe.kernels.cpu_matmul import Linear, linear
from nanosafe.model.attention import AttentionBackend
from nanosafe.model.config import ModelConfig
from nanosafe.model.decoder import Attention, Decoder, Layer, add_norm, swiglu
from nanosafe.model.hybrid import HybridState, Routing
from nanosafe.parallel import Ranks

# transformers 5's names of some tensors, and those that the files on the hub, and transformers' own, have.
RENAMED = {
    "experts.gate_up_proj": "input_linear.weight",
    "experts.down_proj": "output_linear.weight",
    "router.weight": "router.layer.weight",
}


class GatedRMSNorm(nn.Module):
    """RMSNorm of x * silu(gate) over each of `groups` equal parts of the last dimension, in float32 inside."""

    def __init__(self, size: int, groups: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        x = (x.float() * F.silu(gate.float())).unflatten(-1, (self.groups, -1))
        x = F.rms_norm(x, x.shape[-1:], None, self.eps).flatten(-2)
        return self.weight * x.to(gate.dtype)


class Mamba(nn.Module):
    """The Mamba-2 mixer: project, convolve, scan, gate, project back."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        shape = self.shape = config.hybrid
        self.layer, inner = layer, shape.mamba_heads * shape.mamba_head_dim
        channels, projected = shape.channels, inner + shape.channels + shape.mamba_heads
        self.in_proj = Linear(config.hidden_size, projected, shape.proj_bias)
        self.conv1d = nn.Conv1d(channels, channels, shape.conv_size, groups=channels, bias=shape.conv_bias)
        for name, values in initial_recurrence(shape.mamba_heads).items():
            self.register_parameter(name, nn.Parameter(values))
        self.norm = GatedRMSNorm(inner, shape.groups, config.rms_norm_eps)
        self.out_proj = Linear(inner, config.hidden_size, shape.proj_bias)

    def forward(self, x: Tensor, state: HybridState) -> Tensor:
        shape = self.shape
        inner, states = shape.mamba_heads * shape.mamba_head_dim, shape.groups * shape.state_size
        gate, xBC, dt = self.in_proj(x).split([inner, shape.channels, shape.mamba_heads], dim=-1)
        xBC = F.silu(state.convolve(self.layer, xBC, self.conv1d.weight, self.conv1d.bias))
        x, B, C = xBC.split([inner, states, states], dim=-1)
        x = x.unflatten(-1, (shape.mamba_heads, -1))  # [N, H, P]
        B, C = B.unflatten(-1, (shape.groups, -1)), C.unflatten(-1, (shape.groups, -1))  # [N, G, S]
        dt = F.softplus(dt.float() + self.dt_bias.float())  # [N, H]
        y = state.scan(self.layer, x, dt, -self.A_log.float().exp(), B, C, shape.chunk_size)
        y = y + x * self.D.float()[:, None]
        return self.out_proj(self.norm(y.flatten(-2), gate))


def initial_recurrence(heads: int) -> dict[str, Tensor]:
    """Values [heads] to train a mixer from, as in Mamba-2: decay rates -1, -2, ..., steps from 0.001 to 0.1, evenly
    spaced in the logarithm, and the input itself added once."""
    dt = torch.logspace(-3, -1, heads)
    return {
        "A_log": torch.arange(1.0, heads + 1).log(),
        "D": torch.ones(heads),
        "dt_bias": dt + (-torch.expm1(-dt)).log(),  # softplus of it is dt
    }


class SharedMLP(nn.Module):
    """SwiGLU whose gate and up projection are one matrix."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        size = config.hybrid.shared_intermediate_size
        self.input_linear = Linear(config.hidden_size, 2 * size, bias=False)
        self.output_linear = Linear(size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.output_linear(swiglu(*self.input_linear(x).chunk(2, dim=-1)))


class Router(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.layer = Linear(config.hidden_size, config.hybrid.experts, bias=False)


class Experts(nn.Module):
    """One matrix [out, in] for each expert."""

    def __init__(self, experts: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))
        if not self.weight.is_meta:  # as in Body of decoder.py
            nn.init.normal_(self.weight, std=inputs**-0.5)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x [rows, in], the rows of expert e ending at ends[e] -> [rows, out]."""
        if grouped_kernel_works(self.weight, training=torch.is_grad_enabled()) and len(x):
            return F.grouped_mm(x, self.weight.mT, offs=ends)
        rows = x.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
        return torch.cat([linear(x, weight) for x, weight in zip(rows, self.weight, strict=True)])


class MixtureOfExperts(nn.Module):
    """SwiGLU experts, of which each token passes those few that the router gives the largest logits.

    Their outputs are weighted by the softmax over the chosen logits, in float32. No token is dropped: an expert gets as
    many rows as chose it.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.chosen, self.experts = config.hybrid.experts_per_token, config.hybrid.experts
        self.router = Router(config)
        self.input_linear = Experts(self.experts, config.hidden_size, 2 * config.intermediate_size)
        self.output_linear = Experts(self.experts, config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, state: HybridState) -> Tensor:
        logits = self.router.layer(x).float()  # [N, experts]
        top, experts = logits.topk(self.chosen, dim=-1)  # [N, k]
        if state.cache is None:  # training or scoring: the balance loss will ask
            load = torch.zeros(self.experts, device=x.device)
            load.index_add_(0, experts.flatten(), load.new_ones(experts.numel()))
            state.routing[self.layer] = Routing(load, logits.softmax(-1).sum(0), len(logits))
        # All pairs of token and expert are sorted by expert, so that each expert has one run of rows.
        by_expert, order = experts.flatten().sort(stable=True)
        every = torch.arange(self.experts, device=x.device)
        ends = torch.searchsorted(by_expert, every, right=True, out_int32=True)
        # Copies first, then their order: as a gather the gradient would add up a token's parts in any order.
        rows = x[:, None].expand(-1, self.chosen, -1).flatten(0, 1).index_select(0, order)  # [N * k, D]
        gate, up = self.input_linear(rows, ends).chunk(2, dim=-1)
        out = self.output_linear(swiglu(gate, up), ends)
        out = out.index_select(0, order.argsort()).unflatten(0, experts.shape)  # [N, k, D]
        return (out * top.softmax(-1).to(x.dtype)[..., None]).sum(1)


def grouped_kernel_works(weight: Tensor, *, training: bool) -> bool:
    """Whether PyTorch has one kernel for all experts; without it their numbers of rows are read on the host.

    It has for 9.x, Hopper, and 10.x, Blackwell, but on the latter gives experts without a token a gradient that is not
    zero (pytorch issue 172439). For all others, 12.x too, the same function reads their numbers on the host.
    """
    if not weight.is_cuda or weight.dtype != torch.bfloat16:
        return False
    generation = torch.cuda.get_device_capability(weight.device)[0]
    return generation == 9 or generation == 10 and not training


def groups_on_host(model: nn.Module) -> bool:
    """Whether sampling waits for the experts' numbers of rows, which no CUDA graph can."""
    for module in model.modules():
        if isinstance(module, Experts) and not grouped_kernel_works(module.weight, training=False):
            return True
    return False


class HybridLayer(Layer):
    """In most layers a Mamba-2 mixer for attention, and experts beside a shared MLP."""

    def build(self, config: ModelConfig, layer: int) -> None:
        kinds = config.hybrid.layer_types
        number = kinds[:layer].count(kinds[layer])  # among those of its kind
        self.is_mamba = kinds[layer] == "mamba"
        if self.is_mamba:
            self.mamba = Mamba(config, number)
        else:
            self.self_attn = Attention(config, number)
        self.block_sparse_moe = MixtureOfExperts(config, layer) if config.hybrid.experts else None
        self.shared_mlp = SharedMLP(config)

    def block(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, backend: AttentionBackend) -> Tensor:
        scale, norm = self.residual_multiplier, self.post_attention_layernorm
        mixed = self.mix(self.input_layernorm(x), cos, sin, backend)
        x, normed = add_norm(x, mixed, norm.weight, norm.eps, scale)
        del mixed  # as in Layer
        return x.add(self.feed_forward(normed, backend.hybrid), alpha=scale)

    def mix(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, backend: AttentionBackend) -> Tensor:
        return self.mamba(x, backend.hybrid) if self.is_mamba else self.self_attn(x, cos, sin, backend)

    def feed_forward(self, x: Tensor, state: HybridState) -> Tensor:
        shared = self.shared_mlp(x)
        return shared if self.block_sparse_moe is None else self.block_sparse_moe(x, state) + shared


class HybridDecoder(Decoder):
    layer_class = HybridLayer


def make_decoder(config: ModelConfig) -> Decoder:
    """The decoder that a config describes, with weights as its modules draw them."""
    return HybridDecoder(config) if config.hybrid else Decoder(config)


def official(name: str) -> str:
    """The name that files on the hub have for a tensor."""
    layer, separator, rest = name.partition(".block_sparse_moe.")
    return layer + separator + RENAMED.get(rest, rest)


class Balance:
    """How evenly the tokens of a step went over the experts: metrics, and the loss that evens them out.

    The loss is that of Switch Transformers (arXiv 2101.03961, equations 4 to 6): the number of experts times the sum
    over them of the share of tokens that chose one and its mean probability, of all layers together, as transformers
    computes it. Its coefficient is the config's, 0 unless `output_router_logits` is true. Without experts all is empty.
    """

    def __init__(self, config: ModelConfig, tokens: int, ranks: Ranks):
        """tokens: prompts and responses of the step, over all ranks."""
        self.shape, self.tokens, self.ranks = config.hybrid, tokens, ranks
        self.load = None  # [layers, experts] tokens of this rank that chose each
        if self.shape and self.shape.experts:
            shape = (config.num_hidden_layers, self.shape.experts)
            self.load = torch.zeros(shape, dtype=torch.float64, device=ranks.device)

    def add(self, routing: dict[int, Routing]) -> Tensor | float:
        """Takes note of a micro-batch; returns its part of the step's loss: that of its tokens, by their number."""
        if not routing:
            return 0.0
        layers = [routing[layer] for layer in sorted(routing)]
        load = torch.stack([layer.load for layer in layers])
        self.load += load
        if not self.shape.balance_coef:
            return 0.0
        probability = torch.stack([layer.probability for layer in layers])
        tokens = layers[0].tokens
        rows = max(1, tokens) * len(layers)
        loss = self.shape.experts * (load.sum(0) * probability.sum(0)).sum() / rows**2
        return self.shape.balance_coef * loss * tokens / self.tokens

    def metrics(self) -> dict[str, float]:
        """Loads are relative to an even one, 1; the largest and the smallest are those of any layer's experts."""
        if self.load is None:
            return {}
        load = self.ranks.sum_(self.load)
        relative = load * self.shape.experts / load.sum(1, keepdim=True)
        chosen = self.tokens * self.shape.experts_per_token * len(load)
        metrics = {
            "experts/load_max": relative.max().item(),
            "experts/load_min": relative.min().item(),
            "experts/dropped": 1 - load.sum().item() / max(chosen, 1),
        }
        for expert, mean in enumerate(relative.mean(0).tolist()):
            metrics[f"experts/load_{expert}"] = mean
        return metrics
