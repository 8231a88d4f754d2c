"""The decoder's forward pass for one new token of each sequence, by fewer and larger kernels.

`Decoder.hidden` is the reference: the same arithmetic in the same order, one module after the other. A decode step
spends much of its time between two small kernels, so here what lies between the matrix products is one kernel each
(kernels/decode_step.py), and a residual is added together with the norm that comes next.
"""

from torch import Tensor

from nanosafe.kernels.decode_step import HeadNorms, Pages, add_norm, rotate_and_write, swiglu
from nanosafe.kernels.paged_attention import paged_attention
from nanosafe.model.attention import AttentionBackend, PagedDecode
from nanosafe.model.decoder import Attention, Decoder, Layer, rope_tables


def decode_hidden(model: Decoder, tokens: Tensor, backend: PagedDecode) -> Tensor:
    """tokens [B] at backend.positions [B] -> hidden states [B, D] after the final norm; their keys and values are
    written to the cache. For inference, and for decoders that `takes_kernels` says yes to."""
    config, layers = model.config, model.model.layers
    x = model.model.embed_tokens(tokens)  # [B, D]
    if config.embedding_multiplier != 1:
        x = x * config.embedding_multiplier
    rope = None
    if config.rope:
        rope = rope_tables(config.rope, config.head_dim, backend.positions)
    next_norms = [layer.input_layernorm for layer in layers[1:]] + [model.model.norm]
    normed = layers[0].input_layernorm(x)
    for layer, next_norm in zip(layers, next_norms, strict=True):
        attended = attend(layer.self_attn, normed, rope, backend)
        norm = layer.post_attention_layernorm
        x, normed = add_norm(x, attended, norm.weight, norm.eps, layer.residual_multiplier)
        mlp = layer.mlp
        fed = mlp.down_proj(swiglu(mlp.gate_proj(normed), mlp.up_proj(normed)))
        x, normed = add_norm(x, fed, next_norm.weight, next_norm.eps, layer.residual_multiplier)
    return normed


def attend(attention: Attention, x: Tensor, rope: tuple[Tensor, Tensor] | None, backend: PagedDecode) -> Tensor:
    """`Attention.forward` of x [B, D], with keys and values written as soon as they are rotated."""
    q = attention.q_proj(x).unflatten(-1, (-1, attention.head_dim))  # [B, H, head_dim]
    k = attention.k_proj(x).unflatten(-1, (-1, attention.head_dim))  # [B, H_kv, head_dim]
    v = attention.v_proj(x).unflatten(-1, (-1, attention.head_dim))
    norms = None
    if attention.q_norm is not None:
        norms = HeadNorms(attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.eps)
    keys, values = backend.cache.keys[attention.layer], backend.cache.values[attention.layer]
    q = rotate_and_write(q, k, v, norms, rope, Pages(keys, values, backend.blocks, backend.offsets))
    mixed = paged_attention(q, keys, values, backend.tables, backend.lengths, attention.scale)
    return attention.o_proj(mixed.flatten(1))


def takes_kernels(model: Decoder, backend: AttentionBackend) -> bool:
    """Whether `decode_hidden` can run: a transformer whose layers are all attention and SwiGLU, pages on CUDA.

    A CPU decodes by other means (sampler/packed.py), and Granite 4's layers are of other kinds.
    """
    if not isinstance(backend, PagedDecode) or not backend.cache.keys.is_cuda:
        return False
    return all(type(layer) is Layer for layer in model.model.layers)
