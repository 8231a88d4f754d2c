"""Attention backends: what the layers of one forward pass attend to, behind one method, `attend`.

The decoder hands each layer's query, key and value to the backend and gets the attended values back, so it knows
nothing of batches and caches. `PackedDocuments` is the backend of training and scoring: documents lie one behind the
other and never see each other. `KVCache` holds the keys and values of sampling in blocks; `Prefill`, `PagedDecode` and
`SlotDecode` are the backends that write and read it.
"""

from inspect import signature
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn

from nanosafe.kernels.paged_attention import paged_attention
from nanosafe.kernels.scan import Segments
from nanosafe.model.config import ModelConfig
from nanosafe.model.hybrid import HybridState, StateCache

# PyTorch 2.11's has no such argument: its kernel, FlashAttention 2, takes fewer key heads than query heads as they are.
VARLEN_GROUPS_HEADS = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


class AttentionBackend:
    positions: Tensor  # [N] of the tokens of the forward pass in their documents
    hybrid: HybridState  # for the layers of Granite 4 that are not attention

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [N, H, head_dim], k and v [N, H_kv, head_dim] of attention layer `layer` -> [N, H, head_dim]."""
        raise NotImplementedError


class PackedDocuments(AttentionBackend):
    """Causal attention within each of several documents packed into one run of N = sum(lengths) tokens.

    No mask is ever built, so nothing grows with N^2. In half precision on CUDA all documents go through one kernel;
    elsewhere they go one by one, neighbours of equal length as one batch.
    """

    def __init__(self, lengths: list[int], device: torch.device | str = "cpu"):
        # No documents are one empty one, so that every weight still gets its (zero) gradient.
        lengths = lengths or [0]
        self.positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        self.hybrid = HybridState(Segments(lengths, device))
        self.longest = max(lengths)
        # [documents + 1], beginning with 0
        self.ends = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
        self.batches: list[tuple[int, int]] = []  # (documents, length of each)
        for length in lengths:
            if self.batches and self.batches[-1][1] == length:
                self.batches[-1] = (self.batches[-1][0] + 1, length)
            else:
                self.batches.append((1, length))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if varlen_works(q) and self.longest:
            return varlen_attn(
                q, k, v, self.ends, self.ends, self.longest, self.longest,
                scale=scale, window_size=(-1, 0), **VARLEN_GROUPS_HEADS,  # (-1, 0): causal
            )  # fmt: skip
        # split, not slices: the gradient of each slice would be a tensor of zeros as long as all N tokens.
        sizes = [documents * length for documents, length in self.batches]
        batches = zip(self.batches, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
        outputs = []
        for shape, *qkv in batches:
            # [documents * length, heads, head_dim] -> [documents, heads, length, head_dim]
            batch_q, batch_k, batch_v = (x.unflatten(0, shape).transpose(1, 2) for x in qkv)
            out = grouped_attention(batch_q, batch_k, batch_v, is_causal=True, scale=scale)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """PyTorch's attention of q [B, H, L, head_dim] over k, v [B, H_kv, M, head_dim]; H / H_kv query heads share a key
    head."""
    if q.is_cuda and q.dtype == torch.float32:
        # For grouped heads its only float32 kernel there makes all scores, [B, H, L, M].
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        return F.scaled_dot_product_attention(q, k, v, **options)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)


def varlen_works(q: Tensor) -> bool:
    """Whether PyTorch's kernel for packed documents takes such queries."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)


class KVCache:
    """Keys and values in blocks of `block_size` positions; a sequence owns a list of blocks, its block table.

    With blocks as long as the longest sequence, each is one contiguous slot. There is one block more than asked for:
    `scratch`, where rows that only fill up a batch may write. Filled with zeros because masked positions are multiplied
    by a zero weight, and 0 * NaN from uninitialised memory would be NaN. `recurrent` has what a hybrid keeps besides
    in one of `slots` slots for each sequence.
    """

    def __init__(self, config: ModelConfig, blocks: int, block_size: int, device: torch.device, dtype: torch.dtype,
                 slots: int = 0):  # fmt: skip
        shape = (config.attention_layers, blocks + 1, config.num_key_value_heads, block_size, config.head_dim)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        if device.type == "cpu" and dtype == torch.float32:
            # The same shape, but the positions of a block lie side by side: SlotDecode's products are faster so.
            self.keys = torch.zeros(*shape[:-2], config.head_dim, block_size).transpose(-2, -1)
        else:
            self.keys = torch.zeros_like(self.values)
        self.block_size, self.scratch, self.scratch_slot = block_size, blocks, slots
        self.recurrent = StateCache(config.hybrid, slots, device, dtype) if config.hybrid else None

    @staticmethod
    def bytes_per_position(config: ModelConfig, dtype: torch.dtype) -> int:
        return 2 * config.attention_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize

    @staticmethod
    def bytes_per_slot(config: ModelConfig, dtype: torch.dtype) -> int:
        return StateCache.bytes_per_slot(config.hybrid, dtype) if config.hybrid else 0

    def copy(self, source: int, target: int, positions: int) -> None:
        """Copy the first `positions` positions of one block into another."""
        self.keys[:, target, :, :positions] = self.keys[:, source, :, :positions]
        self.values[:, target, :, :positions] = self.values[:, source, :, :positions]

    def read(self, layer: int, table: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, H_kv, end, head_dim] of the first `end` positions of one sequence (table [M])."""
        table = table[: -(-end // self.block_size)]
        keys = self.keys[layer, table].transpose(0, 1).flatten(1, 2)
        values = self.values[layer, table].transpose(0, 1).flatten(1, 2)
        return keys[None, :, :end], values[None, :, :end]

    def write(self, layer: int, blocks: Tensor, offsets: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v [N, H_kv, head_dim] at place `offsets[i]` of block `blocks[i]`."""
        self.keys[layer][blocks, :, offsets] = k
        self.values[layer][blocks, :, offsets] = v


class Chunk(NamedTuple):
    """Tokens of one sequence that are new to the cache: positions start .. start + length - 1."""

    table: list[int]
    start: int
    length: int
    slot: int = 0


class Prefill(AttentionBackend):
    """Several tokens of each of several sequences, packed; their keys and values are written, then attended to.

    Chunks that start at 0, which must come first, need nothing from the cache and go as packed documents; the others
    read what came before them out of their blocks.
    """

    def __init__(self, cache: KVCache, chunks: list[Chunk]):
        self.cache, device = cache, cache.keys.device
        lengths = [chunk.length for chunk in chunks]
        slots = torch.tensor([chunk.slot for chunk in chunks], device=device)
        self.hybrid = HybridState(Segments(lengths, device), cache.recurrent, slots)
        fresh, self.continued = [], []  # lengths of documents; (block table, end, length) of the other chunks
        positions, blocks = [], []
        for chunk in chunks:
            end, table = chunk.start + chunk.length, torch.tensor(chunk.table)
            positions.append(torch.arange(chunk.start, end))
            blocks.append(table[positions[-1] // cache.block_size])
            if chunk.start:
                self.continued.append((table.to(device), end, chunk.length))
            else:
                fresh.append(chunk.length)
        self.documents = PackedDocuments(fresh, device)
        positions, self.blocks = torch.cat(positions), torch.cat(blocks).to(device)
        self.offsets = (positions % cache.block_size).to(device)
        self.positions = positions.to(device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.cache.write(layer, self.blocks, self.offsets, k, v)
        done = len(self.documents.positions)
        outputs = [self.documents.attend(layer, q[:done], k[:done], v[:done], scale)]
        if not self.continued:
            return outputs[0]  # torch.cat would copy it
        for table, end, length in self.continued:
            keys, values = self.cache.read(layer, table, end)
            rows = q[done : done + length].transpose(0, 1)[None]  # [1, H, length, head_dim]
            # The last query sees everything, the one before it one less, ...
            mask = causal_lower_right(length, end)
            out = grouped_attention(rows, keys, values, attn_mask=mask, scale=scale)
            outputs.append(out[0].transpose(0, 1))
            done += length
        return torch.cat(outputs)


class PagedDecode(AttentionBackend):
    """One new token for each of B sequences, token b at `positions[b]`; it sees its sequence up to itself."""

    def __init__(self, cache: KVCache, tables: Tensor, positions: Tensor, slots: Tensor | None = None):
        self.cache, self.tables, self.positions = cache, tables, positions  # tables [B, M]
        self.hybrid = HybridState(None, cache.recurrent, slots)
        # long, or every layer's write would convert them
        self.blocks = tables.gather(1, (positions // cache.block_size)[:, None])[:, 0].long()
        self.offsets = positions % cache.block_size
        self.lengths = (positions + 1).to(torch.int32)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.cache.write(layer, self.blocks, self.offsets, k, v)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        return paged_attention(q, keys, values, self.tables, self.lengths, scale)


class SlotDecode(AttentionBackend):
    """PagedDecode where sequence b lies in block b alone: the cache is read as it stands, nothing is gathered."""

    def __init__(self, cache: KVCache, positions: Tensor, slots: Tensor | None = None):
        self.cache, self.positions = cache, positions
        self.hybrid = HybridState(None, cache.recurrent, slots)
        self.blocks = torch.arange(len(positions), device=positions.device)
        self.longest = int(positions.max()) + 1
        unseen = torch.arange(self.longest, device=positions.device) > positions[:, None]
        self.bias = None  # [B, 1, 1, longest], added to the scores
        if unseen.any():
            bias = torch.zeros_like(unseen, dtype=cache.keys.dtype).masked_fill_(unseen, -torch.inf)
            self.bias = bias[:, None, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.cache.write(layer, self.blocks, self.positions, k, v)
        keys = self.cache.keys[layer, : len(q), :, : self.longest]
        values = self.cache.values[layer, : len(q), :, : self.longest]
        # The query heads that share a key head become query rows: SDPA's own grouping is several times slower for one
        # token.
        grouped = q.unflatten(1, (k.shape[1], -1))  # [B, H_kv, H / H_kv, head_dim]
        if q.dtype != torch.float32:
            out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self.bias, scale=scale)
            return out.flatten(1, 2)  # [B, H, head_dim]
        # In bfloat16 the scores would be rounded.
        scores = (grouped * scale) @ keys.transpose(2, 3)  # [B, H_kv, H / H_kv, longest]
        if self.bias is not None:
            scores.add_(self.bias)
        return (scores.softmax(-1) @ values).flatten(1, 2)
