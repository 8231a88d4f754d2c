"""What a layer attends to, behind one method: `attend(layer, q, k, v, scale)`.

The decoder hands each layer's query, key and value [N, heads, head_dim] to its `memory` and gets the attended values
[N, H, head_dim] back. `PackedDocuments` is the memory of training and scoring: documents lie one behind the other and
never see each other. `KVCache` holds the keys and values of sampling in blocks; `Prefill`, `PagedDecode` and
`SlotDecode` are the memories that fill and read it.

Mamba layers ask in the same way: `convolve` and `scan` (see kernels/scan.py) go on from what the memory holds of the
text so far. That is a state of fixed size, so the cache has one slot of it for each sequence that runs. Attention and
Mamba layers are counted each for themselves. `routed` tells where the tokens of a mixture of experts went.
"""

from inspect import signature
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn

from nanosafe.kernels.paged_attention import paged_attention
from nanosafe.kernels.scan import Runs, convolve, convolve_step, scan, scan_step
from nanosafe.model.config import ModelConfig

# PyTorch 2.11's has no such argument: its kernel, FlashAttention 2, takes fewer key heads than query heads as they are.
VARLEN_GROUPS_HEADS = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


class PackedDocuments:
    """Causal attention within each of several documents packed into one run of N = sum(lengths) tokens.

    No mask is ever built, so nothing grows with N^2. In half precision on CUDA all documents go through one kernel;
    elsewhere they go one by one, neighbours of equal length as one batch.
    """

    def __init__(self, lengths: list[int], device: torch.device | str = "cpu"):
        lengths = lengths or [0]  # no documents are one empty one, so that every weight still gets its (zero) gradient
        self.recurrences = Runs(lengths, device)
        self.routing: dict[int, Routing] = {}  # of each layer with experts
        # [N], from 0 in each document
        self.positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        self.longest = max(lengths)
        self.ends = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)  # [documents + 1]
        self.runs: list[tuple[int, int]] = []  # (documents, length of each)
        for length in lengths:
            if self.runs and self.runs[-1][1] == length:
                self.runs[-1] = (self.runs[-1][0] + 1, length)
            else:
                self.runs.append((1, length))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if varlen_works(q) and self.longest:
            return varlen_attn(q, k, v, self.ends, self.ends, self.longest, self.longest, scale=scale,
                               window_size=(-1, 0), **VARLEN_GROUPS_HEADS)  # (-1, 0): causal
        # split, not slices: the gradient of each slice would be a tensor of zeros as long as all N tokens.
        sizes, outputs = [documents * length for documents, length in self.runs], []
        for run, *parts in zip(self.runs, *(x.split(sizes) for x in (q, k, v)), strict=True):
            # [documents * length, heads, head_dim] -> [documents, heads, length, head_dim]
            a, b, c = (part.unflatten(0, run).transpose(1, 2) for part in parts)
            out = grouped_attention(a, b, c, is_causal=True, scale=scale)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)

    def convolve(self, layer: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return convolve(x, weight, bias, self.recurrences)[0]

    def scan(self, layer: int, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int) -> Tensor:
        return scan(x, dt, A, B, C, self.recurrences, chunk_size)[0]

    def routed(self, layer: int, logits: Tensor, chosen: Tensor) -> None:
        """Takes note of the router's logits [N, experts] and of whom it chose for each token [N, k]."""
        load = torch.zeros(logits.shape[1], device=logits.device)
        load.index_add_(0, chosen.flatten(), load.new_ones(chosen.numel()))
        self.routing[layer] = Routing(load, logits.softmax(-1).sum(0), len(logits))


class Routing(NamedTuple):
    """What a layer's router did with a run of tokens."""

    load: Tensor  # [experts] tokens that chose each
    probability: Tensor  # [experts] sum over the tokens of the softmax over all experts
    tokens: int


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """PyTorch's attention of q [B, H, L, head_dim] over k, v [B, H_kv, M, head_dim]; H / H_kv query heads share a key
    head."""
    if q.is_cuda and q.dtype == torch.float32:
        # For grouped heads its only float32 kernel there makes all scores, [B, H, L, M].
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, **options)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)


def varlen_works(q: Tensor) -> bool:
    """Whether PyTorch's kernel for packed documents takes such queries."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)


class KVCache:
    """Keys and values in blocks of `block_size` positions; a sequence owns a list of blocks, its block table.

    With blocks as long as the longest sequence, each is one contiguous slot. There is one block more than asked for:
    `scratch`, where rows that only fill up a batch may write. Filled with zeros because masked positions are multiplied
    by a zero weight, and 0 * NaN from uninitialised memory would be NaN.

    Of a model with Mamba layers it also holds, in `slots` slots and a scratch one, what their convolutions and scans
    keep of a sequence: `past` and `states`.
    """

    def __init__(self, config: ModelConfig, blocks: int, block_size: int, device: torch.device, dtype: torch.dtype,
                 slots: int = 0):
        shape = (config.attention_layers, blocks + 1, config.num_key_value_heads, block_size, config.head_dim)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        if device.type == "cpu" and dtype == torch.float32:
            # The same shape, but the positions of a block lie side by side: SlotDecode's products are faster so.
            self.keys = torch.zeros(*shape[:-2], config.head_dim, block_size).transpose(-2, -1)
        else:
            self.keys = torch.zeros_like(self.values)
        self.block_size, self.scratch, self.scratch_slot = block_size, blocks, slots
        if h := config.hybrid:
            layers = h.layer_types.count("mamba")
            self.past = torch.zeros(layers, slots + 1, h.conv_size - 1, h.channels, device=device, dtype=dtype)
            self.states = torch.zeros(layers, slots + 1, h.mamba_heads, h.mamba_head_dim, h.state_size, device=device)

    @staticmethod
    def bytes_per_position(config: ModelConfig, dtype: torch.dtype) -> int:
        return 2 * config.attention_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize

    @staticmethod
    def bytes_per_slot(config: ModelConfig, dtype: torch.dtype) -> int:
        if not (h := config.hybrid):
            return 0
        state = 4 * h.mamba_heads * h.mamba_head_dim * h.state_size  # float32: rounding would add up over the tokens
        return h.layer_types.count("mamba") * ((h.conv_size - 1) * h.channels * dtype.itemsize + state)

    def begin(self, slot: int, source: int | None) -> None:
        """A sequence starts in `slot` with what slot `source` holds or, without a source, with nothing."""
        for held in (self.past, self.states):
            held[:, slot] = 0 if source is None else held[:, source]

    def copy(self, source: int, target: int, positions: int) -> None:
        """Copy the first `positions` positions of one block into another."""
        self.keys[:, target, :, :positions] = self.keys[:, source, :, :positions]
        self.values[:, target, :, :positions] = self.values[:, source, :, :positions]

    def read(self, layer: int, table: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, H_kv, end, head_dim] of the first `end` positions of one sequence (table [M])."""
        table = table[: -(-end // self.block_size)]
        pages = (x[layer, table].transpose(0, 1).flatten(1, 2) for x in (self.keys, self.values))
        return tuple(x[None, :, :end] for x in pages)

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


class Prefill:
    """Several tokens of each of several sequences, packed; their keys and values are written, then attended to.

    Chunks that start at 0, which must come first, need nothing from the cache and go as packed documents; the others
    read what came before them out of their blocks.
    """

    def __init__(self, cache: KVCache, chunks: list[Chunk]):
        self.cache, device = cache, cache.keys.device
        self.fresh = [c.length for c in chunks if c.start == 0]
        self.documents = PackedDocuments(self.fresh, device)
        self.continued = [(torch.tensor(c.table, device=device), c.start + c.length, c.length)
                          for c in chunks if c.start]
        # [N] each
        self.positions = torch.cat([torch.arange(c.start, c.start + c.length) for c in chunks])
        tables = torch.nn.utils.rnn.pad_sequence([torch.tensor(c.table) for c in chunks], batch_first=True)
        rows = torch.repeat_interleave(torch.tensor([c.length for c in chunks]))
        self.blocks = tables[rows, self.positions // cache.block_size].to(device)
        self.offsets = (self.positions % cache.block_size).to(device)
        self.positions = self.positions.to(device)
        self.slots = torch.tensor([c.slot for c in chunks], device=device)
        self.recurrences = Runs([c.length for c in chunks], device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.cache.write(layer, self.blocks, self.offsets, k, v)
        done = sum(self.fresh)
        outputs = [self.documents.attend(layer, q[:done], k[:done], v[:done], scale)]
        for table, end, length in self.continued:
            keys, values = self.cache.read(layer, table, end)
            rows = q[done : (done := done + length)].transpose(0, 1)[None]  # [1, H, length, head_dim]
            mask = causal_lower_right(length, end)  # the last query sees everything, the one before it one less, ...
            out = grouped_attention(rows, keys, values, attn_mask=mask, scale=scale)
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs)

    def convolve(self, layer: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        past = self.cache.past[layer]
        out, past[self.slots] = convolve(x, weight, bias, self.recurrences, past[self.slots])
        return out

    def scan(self, layer: int, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int) -> Tensor:
        states = self.cache.states[layer]
        out, states[self.slots] = scan(x, dt, A, B, C, self.recurrences, chunk_size, states[self.slots])
        return out

    def routed(self, layer: int, logits: Tensor, chosen: Tensor) -> None:
        pass


class Step:
    """One new token for each of B sequences: what the Mamba layers ask, answered from slots [B] of the cache."""

    def __init__(self, cache: KVCache, slots: Tensor | None):
        self.cache, self.slots = cache, slots

    def convolve(self, layer: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        past = self.cache.past[layer]
        out, past[self.slots] = convolve_step(x, weight, bias, past[self.slots])
        return out

    def scan(self, layer: int, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int) -> Tensor:
        return scan_step(x, dt, A, B, C, self.cache.states[layer], self.slots)

    def routed(self, layer: int, logits: Tensor, chosen: Tensor) -> None:
        pass


class PagedDecode(Step):
    """One new token for each of B sequences, token b at `positions[b]`; it sees its sequence up to itself."""

    def __init__(self, cache: KVCache, tables: Tensor, positions: Tensor, slots: Tensor | None = None):
        super().__init__(cache, slots)
        self.tables = tables  # [B, M]
        # long, or every layer's write would convert them
        self.blocks = tables.gather(1, (positions // cache.block_size)[:, None])[:, 0].long()
        self.offsets = positions % cache.block_size
        self.lengths = (positions + 1).to(torch.int32)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.cache.write(layer, self.blocks, self.offsets, k, v)
        return paged_attention(q, self.cache.keys[layer], self.cache.values[layer], self.tables, self.lengths, scale)


class SlotDecode(Step):
    """PagedDecode where sequence b lies in block b alone: the cache is read as it stands, nothing is gathered."""

    def __init__(self, cache: KVCache, positions: Tensor, slots: Tensor | None = None):
        super().__init__(cache, slots)
        self.positions, self.blocks = positions, torch.arange(len(positions), device=positions.device)
        self.longest = int(positions.max()) + 1
        unseen = torch.arange(self.longest, device=positions.device) > positions[:, None]
        self.bias = None  # [B, 1, 1, longest], added to the scores
        if unseen.any():
            bias = torch.zeros_like(unseen, dtype=cache.keys.dtype).masked_fill_(unseen, -torch.inf)
            self.bias = bias[:, None, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.cache.write(layer, self.blocks, self.positions, k, v)
        keys, values = (x[layer, : len(q), :, : self.longest] for x in (self.cache.keys, self.cache.values))
        # The query heads that share a key head become query rows: SDPA's own grouping is several times slower for one
        # token.
        grouped = q.unflatten(1, (k.shape[1], -1))  # [B, H_kv, H / H_kv, head_dim]
        if q.dtype == torch.float32:  # bfloat16 scores would be rounded
            scores = (grouped * scale) @ keys.transpose(2, 3)  # [B, H_kv, H / H_kv, longest]
            scores = scores if self.bias is None else scores.add_(self.bias)
            return (scores.softmax(-1) @ values).flatten(1, 2)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self.bias, scale=scale)
        return out.flatten(1, 2)  # [B, H, head_dim]
