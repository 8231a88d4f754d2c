"""What an engine is told of its size, and what it makes of it: a KV cache beside the memory that work takes."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from nanosafe.io.machine import host_memory
from nanosafe.model.activations import forward_bytes
from nanosafe.model.attention import KVCache
from nanosafe.model.config import ModelConfig
from nanosafe.model.decoder import Decoder
from nanosafe.sampler.runner import PagedRunner
from nanosafe.sampler.spread import TensorParallelDecoder


@dataclass(frozen=True)
class EngineOptions:
    max_tokens: int  # of the longest sequence
    requests: int | None = None  # that will come, where their number is known
    max_batch: int | None = None  # that decode together (default: 64 on a CPU, 256 on CUDA)
    # Memory of the KV cache, at most half of it for the states of Mamba layers (default: of what is free beside a
    # prefill and a draw, half on a CPU and 80 % on CUDA).
    cache_bytes: int | None = None
    prefill_tokens: int | None = None  # of one prefill (default: default_prefill_tokens)
    block_size: int | None = None  # positions (default: 64 on CUDA, elsewhere max_tokens)
    banned_token_ids: Iterable[int] = ()  # never drawn, and log-probs are those of what is left
    filters: bool = True  # whether any request has top-k, top-p or min-p: a spread model then gathers logits
    pack: bool = True  # On a CPU, multiply by weights that are packed once more, if memory allows.

    def __post_init__(self):
        for name in ("max_batch", "prefill_tokens", "block_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


class CacheSize(NamedTuple):
    max_batch: int  # sequences that decode together
    blocks: int
    block_size: int
    table_width: int  # blocks of the longest sequence


def batch_rows(options: EngineOptions, runner: type[PagedRunner]) -> int:
    """How many sequences decode together where memory allows it."""
    return min(options.max_batch or runner.max_batch, options.requests or sys.maxsize)


def cache_size(config: ModelConfig, dtype: torch.dtype, options: EngineOptions, runner: type[PagedRunner]) -> CacheSize:
    """How options.cache_bytes are divided; there may be fewer blocks than the longest sequence needs."""
    max_batch = batch_rows(options, runner)
    slot_bytes = KVCache.bytes_per_slot(config, dtype)
    if slot_bytes:
        # One more slot is scratch.
        max_batch = max(1, min(max_batch, options.cache_bytes // 2 // slot_bytes - 1))
    block_size = options.block_size or runner.block_size or options.max_tokens
    block_bytes = KVCache.bytes_per_position(config, dtype) * block_size
    table_width = -(-options.max_tokens // block_size)
    left = options.cache_bytes - (max_batch + 1) * slot_bytes
    blocks = min(left // max(1, block_bytes), max_batch * table_width)
    return CacheSize(max_batch, blocks, block_size, table_width)


def working_bytes(config: ModelConfig, dtype: torch.dtype, options: EngineOptions, runner: type[PagedRunner],
                  kind: str) -> int:
    """What one prefill and one draw take on a device of this kind, beside weights and cache."""
    tokens = min(options.prefill_tokens or default_prefill_tokens(config, kind),
                 options.max_tokens * (options.requests or sys.maxsize))
    # Logits in the compute type (on a CPU), in float32, and a copy that drawing makes.
    drawing = batch_rows(options, runner) * config.vocab_size * (dtype.itemsize + 8)
    return int(tokens * forward_bytes(config, dtype.itemsize)) + drawing


def make_cache(model: Decoder, options: EngineOptions, runner: type[PagedRunner]) -> tuple[KVCache, CacheSize]:
    """The cache and its size; raises ValueError where the longest sequence alone does not fit."""
    config, device, dtype = model.config, model.head_weight.device, model.head_weight.dtype
    if options.cache_bytes is None:
        free = free_memory(device)
        if isinstance(model, TensorParallelDecoder):
            free = model.group.least(free)  # one scheduler, so one size
        free = max(0, free - working_bytes(config, dtype, options, runner, device.type))
        options = replace(options, cache_bytes=int(free * runner.memory_share))
    size = cache_size(config, dtype, options, runner)
    slot_bytes = KVCache.bytes_per_slot(config, dtype)
    if size.blocks < size.table_width:
        needed = size.table_width * size.block_size * KVCache.bytes_per_position(config, dtype) + 2 * slot_bytes
        raise ValueError(
            f"a sequence of {options.max_tokens} tokens needs {needed / 2**20:,.1f} MiB of cache, but only "
            f"{options.cache_bytes / 2**20:,.1f} may be used: ask for fewer new tokens, or raise cache_bytes"
        )
    slots = size.max_batch if slot_bytes else 0
    return KVCache(config, size.blocks, size.block_size, device, dtype, slots), size


def default_prefill_tokens(config: ModelConfig, kind: str) -> int:
    """Tokens of one prefill on a device of this kind, cuda or cpu.

    On a CPU as many as keep an MLP's activations close to the cores and in memory that was used before, which is faster
    than fresh memory; from 256, below which reading the weights takes longer, to 2048. A power of two, which matrix
    products are tuned for: on 682 rows they take as long as on 768.
    """
    if kind == "cuda":
        return 8192
    rows = max(256, min(2048, 2**21 // config.intermediate_size))
    return 1 << (rows.bit_length() - 1)


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated now. On CUDA torch's allocator first gives back what it holds unused."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return host_memory()[1]  # Zeroed pages count only once they are written.
