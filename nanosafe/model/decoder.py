"""The decoder: one pre-norm transformer for Qwen2, Qwen3, Llama 3.1 and Granite 3, with an LM head or a score head.

Tokens are packed, never padded: `hidden` maps a flat run of tokens [N] and their positions [N] to hidden states
[N, D], and training, reward scoring, prefill and decode all use it. What a layer attends to is passed in (`backend`,
see attention.py), so this file knows nothing of batching, caches or parallelism. Module names are the checkpoint's
names, so loading is a strict copy. There are no buffers: what RoPE needs is computed in float32 from the config, where
no `.to(bfloat16)` can reach it.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanosafe.kernels.compiled import compiled_in_training

# They are nn.Linear and F.linear, but for a faster product on some CPUs.
from nanosafe.kernels.cpu_matmul import Linear, linear
from nanosafe.kernels.decode_step import plain_add_norm, plain_rotate
from nanosafe.model.attention import AttentionBackend, PackedDocuments
from nanosafe.model.config import ModelConfig, Rope
from nanosafe.model.lora import add_adapters
from nanosafe.model.recompute import checkpointed


class Attention(nn.Module):
    """Grouped-query attention with RoPE, or without where cos is None; Qwen3 normalises each head of q and k first."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.scale = layer, config.head_dim, config.attention_multiplier
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = Linear(q_size, config.hidden_size, bias=config.o_bias)
        self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, backend: AttentionBackend) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # [N, H, head_dim]
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # [N, H_kv, head_dim]
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if cos is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return self.o_proj(backend.attend(self.layer, q, k, v, self.scale).flatten(-2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    recompute = "none"  # of RECOMPUTE: what training computes anew in the backward pass

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.residual_multiplier = config.residual_multiplier
        # Gradient checkpointing tells products apart by their number of input features: see `keep_products`.
        self.cheap_widths = [] if config.hybrid else [config.intermediate_size]  # down_proj's
        if config.lora:
            self.cheap_widths.append(config.lora[0])  # the rank
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.build(config, layer)

    def build(self, config: ModelConfig, layer: int) -> None:
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, backend: AttentionBackend) -> Tensor:
        return checkpointed(self.block, self.recompute, self.cheap_widths, x, cos, sin, backend)

    def block(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, backend: AttentionBackend) -> Tensor:
        scale, norm = self.residual_multiplier, self.post_attention_layernorm
        attended = self.self_attn(self.input_layernorm(x), cos, sin, backend)
        x, normed = add_norm(x, attended, norm.weight, norm.eps, scale)
        del attended  # or it would take memory until the end of the layer
        return x.add(self.mlp(normed), alpha=scale)


class Body(nn.Module):
    """Embedding, layers and final norm: what the checkpoint's names call `model.`"""

    def __init__(self, config: ModelConfig, layer_class: type[Layer]):
        super().__init__()
        embedding = torch.empty(config.vocab_size, config.hidden_size)
        if not embedding.is_meta:  # where random values would import 2 s of torch, for nothing
            nn.init.normal_(embedding)
        self.embed_tokens = nn.Embedding.from_pretrained(embedding, freeze=False)
        self.layers = nn.ModuleList(layer_class(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A language model (`lm_head`, or the embedding where tied) or a reward model (`score`)."""

    layer_class = Layer  # granite.py has another, and `make_decoder`, which chooses

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Body(config, self.layer_class)
        if config.num_labels:
            self.score = Linear(config.hidden_size, config.num_labels, bias=False)
        elif not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.lora:
            add_adapters(self, *config.lora)

    @property
    def head_weight(self) -> Tensor:
        """[V, D]: the language-model head, which is the embedding itself in a tied model."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def recompute(self, what: str) -> None:
        """Gradient checkpointing: what backward passes compute anew, one of RECOMPUTE."""
        for layer in self.model.layers:
            layer.recompute = what

    def hidden(self, tokens: Tensor, positions: Tensor, backend: AttentionBackend) -> Tensor:
        """tokens [N], positions [N] (from 0 in each document) -> hidden states [N, D] after the final norm."""
        x = self.model.embed_tokens(tokens)
        if self.config.embedding_multiplier != 1:
            x = x * self.config.embedding_multiplier
        cos = sin = None
        if self.config.rope:
            cos, sin = rope_tables(self.config.rope, self.config.head_dim, positions)
        for layer in self.model.layers:
            x = layer(x, cos, sin, backend)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> float32 logits [..., V]."""
        if hidden.is_cuda and hidden.dtype.itemsize == 2 and not torch.is_grad_enabled():
            # Never rounded to half precision: the logits of kernels/logprob.py, so that sampler and trainer agree.
            rows = torch.mm(hidden.flatten(0, -2), self.head_weight.T, out_dtype=torch.float32)
            logits = rows.unflatten(0, hidden.shape[:-1])
        else:
            logits = linear(hidden, self.head_weight).float()
        return logits if self.config.logits_scaling == 1 else logits / self.config.logits_scaling

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, T] -> float32 logits [B, T, V]; causal, every token is real (no padding semantics)."""
        B, T = input_ids.shape
        documents = PackedDocuments([T] * B, device=input_ids.device)
        hidden = self.hidden(input_ids.flatten(), documents.positions, documents)
        return self.logits(hidden).unflatten(0, (B, T))


@compiled_in_training
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return F.silu(gate) * up
    return F.silu(gate).mul_(up)  # one tensor less, which a backward pass would need


add_norm, rotate = compiled_in_training(plain_add_norm), compiled_in_training(plain_rotate)


def rope_tables(rope: Rope, head_dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """positions [N] -> cos, sin [N, 1, head_dim], float32: for a pair (a, b), (cos, cos) and (-sin, sin)."""
    frequencies, factor = rope_frequencies(rope, head_dim, positions.device)
    angles = (positions.float()[:, None] * frequencies)[:, None, :]
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


@lru_cache(maxsize=64)
def rope_frequencies(rope: Rope, head_dim: int, device: torch.device) -> tuple[Tensor, float]:
    """Angle per position for each pair of dimensions, [head_dim/2] float32, and the factor on cos and sin.

    Computed in float32 in the order the checkpoints were trained with: at position 1e5 one bit here is 1e-2 radians.
    llama3: Llama 3.1's rule (low frequencies divided by `factor`, a linear blend between two wavelengths). yarn:
    arXiv 2309.00071, section 3.2-3.4. linear: arXiv 2306.15595.
    """
    powers = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    frequencies, factor = 1.0 / powers, 1.0
    if rope.type == "linear":
        frequencies = frequencies / rope.factor
    elif rope.type == "llama3":
        # How many turns a pair makes within the original context decides how far it is slowed down.
        turns = rope.original_max_positions / (2 * math.pi / frequencies)
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = keep.clamp(0, 1)  # 0: slowed by `factor`; 1: as it was
        frequencies = (1 - keep) * frequencies / rope.factor + keep * frequencies
    elif rope.type == "yarn":
        low = _yarn_dimension(rope, head_dim, rope.beta_fast)
        high = _yarn_dimension(rope, head_dim, rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001
        pairs = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
        slow = ((pairs - low) / (high - low)).clamp(0, 1)
        frequencies = (1.0 / (rope.factor * powers)) * slow + frequencies * (1 - slow)
        factor = _yarn_attention_factor(rope) * rope.attn_factor
    return frequencies.to(device), factor


def _yarn_dimension(rope: Rope, head_dim: int, turns: float) -> float:
    """The (fractional) pair of dimensions that makes `turns` full turns within the original context."""
    wavelength = rope.original_max_positions / (turns * 2 * math.pi)
    return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))


def _yarn_attention_factor(rope: Rope) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
