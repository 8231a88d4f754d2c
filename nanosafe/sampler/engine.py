"""The engine: continuous batching over a paged KV cache.

Requests enter and leave at every step. The scheduler says who runs and in which blocks, the runner moves the tensors,
and `Engine` makes a step of the two: a prefill, packed up to a budget of tokens, as long as some running sequence has
more than one token that is not in the cache; else every running sequence decodes.
"""

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from nanosafe.io.machine import host_memory
from nanosafe.kernels import triton
from nanosafe.model.attention import KVCache
from nanosafe.model.config import ModelConfig
from nanosafe.model.decoder import Decoder
from nanosafe.model.granite import groups_on_host
from nanosafe.sampler.graphs import GraphRunner
from nanosafe.sampler.packed import packed_view
from nanosafe.sampler.runner import PagedRunner, SlotRunner
from nanosafe.sampler.scheduler import BlockPool, Scheduler, Sequence
from nanosafe.sampler.spread import SpreadDecoder


@dataclass(frozen=True)
class EngineOptions:
    max_tokens: int  # of the longest sequence
    requests: int | None = None  # that will come, where their number is known
    max_batch: int | None = None  # that decode together (default: 64 on a CPU, 256 on CUDA)
    # Memory of the KV cache, at most half of it for the states of Mamba layers (default: of what is free, half on a CPU
    # and 80 % on CUDA).
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


def choose_runner(model: Decoder, options: EngineOptions) -> type[PagedRunner]:
    """The one place where CUDA graphs, slots and pages are told apart."""
    # The plain forms of the kernels, and some mixtures of experts, read values on the host, which no graph can.
    if model.head_weight.device.type == "cuda" and triton is not None and not groups_on_host(model):
        return GraphRunner
    if options.block_size is None or options.block_size >= options.max_tokens:
        return SlotRunner
    return PagedRunner


class CacheSize(NamedTuple):
    max_batch: int  # sequences that decode together
    blocks: int
    block_size: int
    table_width: int  # blocks of the longest sequence


def cache_size(config: ModelConfig, dtype: torch.dtype, options: EngineOptions, runner: type[PagedRunner]) -> CacheSize:
    """How options.cache_bytes are divided; there may be fewer blocks than the longest sequence needs."""
    max_batch = min(options.max_batch or runner.max_batch, options.requests or sys.maxsize)
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


def make_cache(model: Decoder, options: EngineOptions, runner: type[PagedRunner]) -> tuple[KVCache, int]:
    """The cache, and how many sequences decode together; raises ValueError where the longest alone does not fit."""
    config, device, dtype = model.config, model.head_weight.device, model.head_weight.dtype
    if options.cache_bytes is None:
        free = free_memory(device)
        if isinstance(model, SpreadDecoder):
            free = model.group.least(free)  # one scheduler, so one size
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
    return KVCache(config, size.blocks, size.block_size, device, dtype, slots), size.max_batch


class Engine:
    """Runs sequences of up to `max_tokens` tokens: `add` them, then call `step` while `busy`.

    The model's weights are read in place, so the model must not change while the engine is used.
    """

    def __init__(self, model: Decoder, **options):
        """The options are the fields of EngineOptions."""
        options = EngineOptions(**options)
        runner = choose_runner(model, options)
        device, config = model.head_weight.device, model.config
        pack = options.pack and device.type == "cpu"
        view = packed_view(model, free_memory(device)) if pack else model
        self.cache, max_batch = make_cache(model, options, runner)
        pool = BlockPool(self.cache.scratch, self.cache.block_size)  # all blocks but the scratch one
        self.table_width = pool.blocks_for(options.max_tokens)  # blocks of the longest sequence
        self.runner = runner(view, self.cache, self.table_width, options.banned_token_ids, options.filters)
        prefill_tokens = options.prefill_tokens or default_prefill_tokens(config, device.type)
        recurrent = config.attention_layers < config.num_hidden_layers
        self.scheduler = Scheduler(pool, max_batch, prefill_tokens, recurrent)

    def add(self, sequence: Sequence) -> None:
        if sequence.longest > self.table_width * self.cache.block_size:
            raise ValueError(f"a sequence of {sequence.longest} tokens is longer than the engine's max_tokens")
        self.scheduler.waiting.append(sequence)

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running)

    @torch.no_grad()
    def step(self) -> list[Sequence]:
        """One prefill, or one round of decoding; returns the sequences that drew tokens. Finished ones leave."""
        with torch.cuda.device_of(self.cache.values):  # where Triton launches and graphs capture
            self._admit()
            chunks = self.scheduler.prefill()
            drew = self._prefill(chunks) if chunks else self._decode()
        for sequence in drew:
            if sequence.finish_reason:
                self.scheduler.remove(sequence)
        return drew

    def _admit(self) -> None:
        for source, target, positions in self.scheduler.admit():
            self.cache.copy(source, target, positions)
        if self.scheduler.recurrent:
            for slot, donor in self.scheduler.begins:
                self.cache.recurrent.begin(slot, donor)
        self.scheduler.begins.clear()

    def _prefill(self, chunks: list[tuple[Sequence, int]]) -> list[Sequence]:
        # Those with nothing in the cache first, as Prefill wants them; neighbours of equal length attend as one batch.
        chunks.sort(key=lambda chunk: (chunk[0].cached > 0, chunk[1]))
        ready, batch = self.runner.prefill(chunks)
        if ready:
            self._append(ready, [batch.tokens], [batch.logprobs])
        return ready

    def _decode(self) -> list[Sequence]:
        running = self.scheduler.running
        room = min(s.max_new_tokens - len(s.token_ids) for s in running)
        steps = min(self.runner.steps_per_look, room)
        self.scheduler.grow(steps)  # may preempt some of the running ones
        self.runner.arrange(self.scheduler)
        sequences = sorted(running, key=lambda s: s.blocks[0])
        batch, step = self.runner.prepare_decode(sequences)
        tokens, logprobs = [], []
        for _ in range(steps):
            step()
            tokens.append(batch.tokens.clone())
            logprobs.append(batch.logprobs.clone())
        self._append(sequences, tokens, logprobs)
        return sequences

    def _append(self, sequences: list[Sequence], tokens: list[Tensor], logprobs: list[Tensor]) -> None:
        """Write down what was drawn, one tensor [B] for each step; what a sequence drew after its end is dropped."""
        # Rows beyond the sequences only filled the batch up.
        rows = zip(sequences, torch.stack(tokens, 1).tolist(), torch.stack(logprobs, 1).tolist(), strict=False)
        for sequence, row_tokens, row_logprobs in rows:
            for token, logprob in zip(row_tokens, row_logprobs, strict=True):
                if not math.isfinite(logprob):
                    raise ValueError(
                        f"the model of {self.runner.model.config.source} gave a token the log-prob {logprob}: "
                        f"its weights hold NaN or infinity, or overflow in {self.cache.keys.dtype}; "
                        "try --dtype float32 or an earlier checkpoint"
                    )
                sequence.token_ids.append(token)
                sequence.logprobs.append(logprob)
                if sequence.finish_reason:
                    break
            sequence.cached = len(sequence) - 1


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
