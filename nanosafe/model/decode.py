"""The decoder's forward pass for one new token of each sequence, by fewer and larger kernels.

`Decoder.hidden` is the reference: the same arithmetic in the same order, one module after the other. A decode step
spends much of its time between two small kernels, so here what lies between the matrix products is one kernel each
(kernels/decode_step.py), and a residual is added together with the norm that comes next.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanosafe.kernels.decode_step import HeadNorms, Pages, add_norm, rotate_and_write, swiglu
from nanosafe.kernels.paged_attention import paged_attention
from nanosafe.model.attention import AttentionBackend, PagedDecode
from nanosafe.model.decoder import MLP, Attention, Decoder, Layer, rope_tables
from nanosafe.model.lora import product_with_update


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
        fed = mlp.down_proj(swiglu(*products(normed, mlp.gate_proj, mlp.up_proj)))
        x, normed = add_norm(x, fed, next_norm.weight, next_norm.eps, layer.residual_multiplier)
    return normed


def attend(attention: Attention, x: Tensor, rope: tuple[Tensor, Tensor] | None, backend: PagedDecode) -> Tensor:
    """`Attention.forward` of x [B, D], with keys and values written as soon as they are rotated."""
    q, k, v = products(x, attention.q_proj, attention.k_proj, attention.v_proj)
    q = q.unflatten(-1, (-1, attention.head_dim))  # [B, H, head_dim]
    k = k.unflatten(-1, (-1, attention.head_dim))  # [B, H_kv, head_dim]
    v = v.unflatten(-1, (-1, attention.head_dim))
    norms = None
    if attention.q_norm is not None:
        norms = HeadNorms(attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.eps)
    keys, values = backend.cache.keys[attention.layer], backend.cache.values[attention.layer]
    q = rotate_and_write(q, k, v, norms, rope, Pages(keys, values, backend.blocks, backend.offsets))
    mixed = paged_attention(q, keys, values, backend.tables, backend.lengths, attention.scale)
    return attention.o_proj(mixed.flatten(1))


def products(x: Tensor, *layers: nn.Linear) -> list[Tensor]:
    """layer(x) of each layer, [B, out] each: slices of one product where `join_projections` has been."""
    weight = joined([layer.weight for layer in layers])
    bias = None
    if layers[0].bias is not None:
        bias = joined([layer.bias for layer in layers])
    if weight is None or (bias is None and layers[0].bias is not None):
        return [layer(x) for layer in layers]
    parts = F.linear(x, weight, bias).split([layer.out_features for layer in layers], dim=1)
    return [product_with_update(layer, part, x) for layer, part in zip(layers, parts, strict=True)]


def joined(tensors: list[Tensor]) -> Tensor | None:
    """The one tensor whose slices along the first dimension these are, without a copy; None if they lie elsewhere."""
    first = tensors[0]
    end = first.storage_offset()
    for tensor in tensors:
        same_storage = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same_storage or tensor.storage_offset() != end or not tensor.is_contiguous():
            return None
        end += tensor.numel()
    rows = sum(len(tensor) for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


@torch.no_grad()
def join_projections(model: Decoder) -> None:
    """Lay q, k and v, and gate and up, of each layer behind one another in one storage, of which the parameters become
    slices. They stay the same parameters with the same values, so training and saving know nothing of it.

    Copies only what is not joined yet, so at most q, k and v or gate and up of one layer exist twice at a time.
    """
    for layer in model.model.layers:
        if not is_plain(layer):
            continue
        attention, mlp = layer.self_attn, layer.mlp
        groups = [(attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)]
        for projections in groups:
            join_storage([projection.weight for projection in projections])
            if projections[0].bias is not None:
                join_storage([projection.bias for projection in projections])


def join_storage(parameters: list[nn.Parameter]) -> None:
    """Make the parameters slices, along the first dimension, of one new tensor, unless they are slices of one."""
    if joined(parameters) is not None:
        return
    slices = torch.cat(parameters).split([len(parameter) for parameter in parameters])
    for parameter, place in zip(parameters, slices, strict=True):
        parameter.data = place


def takes_kernels(model: Decoder, backend: AttentionBackend) -> bool:
    """Whether `decode_hidden` can run: a transformer whose layers are all attention and SwiGLU, pages on CUDA.

    A CPU decodes by other means (sampler/packed.py), and Granite 4's layers are of other kinds.
    """
    if not isinstance(backend, PagedDecode) or not backend.cache.keys.is_cuda:
        return False
    return all(is_plain(layer) for layer in model.model.layers)


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is the decoder's own, with the decoder's own weights: neither Granite 4's, packed nor sharded."""
    return type(layer) is Layer and type(layer.self_attn) is Attention and type(layer.mlp) is MLP
