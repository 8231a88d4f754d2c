"""What a layer attends to, behind one method: `attend(layer, q, k, v, scale)`.

The decoder hands each layer's query, key and value [N, heads, head_dim] to its `memory` and gets the attended values
[N, H, head_dim] back. `PackedDocuments` is the memory of training and scoring: documents lie one behind the other and
never see each other. `KVCache` holds one contiguous region of positions per slot; `Prefill` and `Decode` are the
memories that fill and read it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanosafe.config import ModelConfig


class PackedDocuments:
    """Causal attention within each of several documents packed into one run of N = sum(lengths) tokens.

    A loop of SDPA over documents: no mask is ever built, so nothing grows with N^2. Neighbours of equal length go as
    one batch.
    """

    def __init__(self, lengths: list[int], device: torch.device | str = "cpu"):
        lengths = lengths or [0]  # no documents are one empty one, so that every weight still gets its (zero) gradient
        # [N], from 0 in each document
        self.positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        self.runs: list[tuple[int, int]] = []  # (documents, length of each)
        for length in lengths:
            if self.runs and self.runs[-1][1] == length:
                self.runs[-1] = (self.runs[-1][0] + 1, length)
            else:
                self.runs.append((1, length))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        outputs, start = [], 0
        for documents, length in self.runs:
            rows = slice(start, start := start + documents * length)
            # [documents * length, heads, head_dim] -> [documents, heads, length, head_dim]
            a, b, c = (x[rows].unflatten(0, (documents, length)).transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(a, b, c, is_causal=True, scale=scale, enable_gqa=True)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)


class KVCache:
    """Keys and values of `slots` sequences, up to `capacity` positions each.

    Memory: 2 * layers * slots * H_kv * capacity * head_dim elements. Filled with zeros because masked positions are
    multiplied by a zero weight, and 0 * NaN from uninitialised memory would be NaN.
    """

    def __init__(self, config: ModelConfig, slots: int, capacity: int, device: torch.device, dtype: torch.dtype):
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    @staticmethod
    def bytes_per_slot(config: ModelConfig, capacity: int, dtype: torch.dtype) -> int:
        return 2 * config.num_hidden_layers * config.num_key_value_heads * capacity * config.head_dim * dtype.itemsize

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot into another."""
        self.keys[:, target, :, :length] = self.keys[:, source, :, :length]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]


class Prefill(PackedDocuments):
    """Whole prompts, packed; document i is also written into cache slot `slots[i]` from position 0."""

    def __init__(self, cache: KVCache, slots: list[int], lengths: list[int]):
        super().__init__(lengths, device=cache.keys.device)
        self.cache = cache
        self.rows = torch.repeat_interleave(torch.tensor(slots), torch.tensor(lengths)).to(cache.keys.device)  # [N]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.cache.keys[layer][self.rows, :, self.positions] = k
        self.cache.values[layer][self.rows, :, self.positions] = v
        return super().attend(layer, q, k, v, scale)


class Decode:
    """One new token for each of the first B slots, token b at `positions[b]`; it sees its slot up to itself."""

    def __init__(self, cache: KVCache, positions: Tensor):
        self.cache, self.positions = cache, positions
        self.rows = torch.arange(len(positions), device=positions.device)
        self.longest = int(positions.max()) + 1
        seen = torch.arange(self.longest, device=positions.device)[None, :] <= positions[:, None]
        self.mask = seen[:, None, None, :]  # [B, 1, 1, longest]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        keys, values, B = self.cache.keys[layer], self.cache.values[layer], len(q)
        keys[self.rows, :, self.positions] = k
        values[self.rows, :, self.positions] = v
        # The query heads that share a key head become query rows: SDPA's own grouping is several times slower for one
        # token.
        grouped = q.unflatten(1, (k.shape[1], -1))  # [B, H_kv, H / H_kv, head_dim]
        keys, values = keys[:B, :, : self.longest], values[:B, :, : self.longest]  # [B, H_kv, longest, head_dim]
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self.mask, scale=scale)
        return out.flatten(1, 2)  # [B, H, head_dim]
