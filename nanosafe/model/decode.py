"""The decoder's forward pass for one new token of each sequence, by fewer and larger kernels.

`Decoder.hidden` is the reference: the same arithmetic in the same order, one module after the other. A decode step
spends much of its time between two small kernels, so here what lies between the matrix products is one kernel each
(kernels/decode_step.py), and a residual is added together with the norm that comes next. A single sequence can do
without most of these, too: its products take in what is around them (kernels/row_product.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanosafe.kernels.decode_step import HeadNorms, Pages, add_norm, rotate_and_write, swiglu
from nanosafe.kernels.paged_attention import paged_attention
from nanosafe.kernels.row_product import Affine, Norm, Residual, row_product
from nanosafe.model.attention import AttentionBackend, PagedDecode
from nanosafe.model.decoder import MLP, Attention, Decoder, Layer, rope_tables
from nanosafe.model.lora import product_with_update

# Whether a single sequence decodes by row_product: 7 launches a layer instead of 10 or 11. Off, for no GPU has shown
# yet that the kernel reads weights as fast as cuBLAS does; benchmarks/gpu.py times both.
ROW_PRODUCTS = False


def decode_hidden(model: Decoder, tokens: Tensor, backend: PagedDecode) -> Tensor:
    """tokens [B] at backend.positions [B] -> hidden states [B, D] after the final norm; their keys and values are
    written to the cache. For inference, and for decoders that `takes_kernels` says yes to."""
    config = model.config
    x = model.model.embed_tokens(tokens)  # [B, D]
    if config.embedding_multiplier != 1:
        x = x * config.embedding_multiplier
    rope = None
    if config.rope:
        rope = rope_tables(config.rope, config.head_dim, backend.positions)
    by_row = ROW_PRODUCTS and len(x) == 1 and not config.lora  # An adapter is two products more.
    stream = (RowStream if by_row else Stream)(x, config.residual_multiplier)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        q, k, v = stream.products(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
        stream.add_product(attention.o_proj, attend(attention, q, k, v, rope, backend))
        stream.add_product(mlp.down_proj, stream.gated(layer.post_attention_layernorm, mlp))
    return stream.normed(model.model.norm)


class Stream:
    """The residual stream x [B, D]. What is added to it waits for the next norm, for both are one kernel."""

    def __init__(self, x: Tensor, scale: float):
        """scale: of everything that is added."""
        self.x, self.scale, self.update = x, scale, None

    def normed(self, norm: nn.RMSNorm) -> Tensor:
        """[B, D]"""
        if self.update is None:
            return norm(self.x)
        self.x, normed = add_norm(self.x, self.update, norm.weight, norm.eps, self.scale)
        self.update = None
        return normed

    def products(self, norm: nn.RMSNorm, *layers: nn.Linear) -> list[Tensor]:
        """layer(norm(x)) of each layer, [B, out] each."""
        return products(self.normed(norm), *layers)

    def gated(self, norm: nn.RMSNorm, mlp: MLP) -> Tensor:
        """silu(gate) * up of the normed stream, [B, F]."""
        return swiglu(*self.products(norm, mlp.gate_proj, mlp.up_proj))

    def add_product(self, layer: nn.Linear, y: Tensor) -> None:
        """Add layer(y) to the stream; y [B, in]."""
        self.update = layer(y)


class RowStream(Stream):
    """The same of one row, [1, D]: norms and additions belong to the kernels of the products."""

    def products(self, norm: nn.RMSNorm, *layers: nn.Linear) -> list[Tensor]:
        norm, together = Norm(norm.weight, norm.eps), joined_layers(layers)
        if together is None:
            return [row_product(self.x, affine(layer), norm=norm) for layer in layers]
        return row_product(self.x, together, norm=norm).split([layer.out_features for layer in layers], dim=1)

    def gated(self, norm: nn.RMSNorm, mlp: MLP) -> Tensor:
        return row_product(self.x, affine(mlp.gate_proj), affine(mlp.up_proj), Norm(norm.weight, norm.eps))

    def add_product(self, layer: nn.Linear, y: Tensor) -> None:
        self.x = row_product(y, affine(layer), residual=Residual(self.x, self.scale))


def affine(layer: nn.Linear) -> Affine:
    return Affine(layer.weight, layer.bias)


def attend(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor] | None, backend: PagedDecode
) -> Tensor:
    """What `Attention.forward` does between its products: q [B, H * head_dim], k, v [B, H_kv * head_dim] -> as q. Keys
    and values are written as soon as they are rotated."""
    q = q.unflatten(-1, (-1, attention.head_dim))  # [B, H, head_dim]
    k = k.unflatten(-1, (-1, attention.head_dim))  # [B, H_kv, head_dim]
    v = v.unflatten(-1, (-1, attention.head_dim))
    norms = None
    if attention.q_norm is not None:
        norms = HeadNorms(attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.eps)
    keys, values = backend.cache.keys[attention.layer], backend.cache.values[attention.layer]
    q = rotate_and_write(q, k, v, norms, rope, Pages(keys, values, backend.blocks, backend.offsets))
    return paged_attention(q, keys, values, backend.tables, backend.lengths, attention.scale).flatten(1)


def products(x: Tensor, *layers: nn.Linear) -> list[Tensor]:
    """layer(x) of each layer, [B, out] each: slices of one product where `join_projections` has been."""
    together = joined_layers(layers)
    if together is None:
        return [layer(x) for layer in layers]
    parts = F.linear(x, *together).split([layer.out_features for layer in layers], dim=1)
    return [product_with_update(layer, part, x) for layer, part in zip(layers, parts, strict=True)]


def joined_layers(layers: tuple[nn.Linear, ...]) -> Affine | None:
    """The one layer whose results are those of `layers` behind one another; None if their storage is not joined."""
    weight, bias = joined([layer.weight for layer in layers]), None
    if layers[0].bias is not None:
        bias = joined([layer.bias for layer in layers])
    if weight is None or (bias is None and layers[0].bias is not None):
        return None
    return Affine(weight, bias)


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
