"""The sampling engine: continuous batching over a paged KV cache.

Requests enter and leave at every step. Who runs and in which blocks is decided in scheduler.py; `Engine` moves the
tensors. A step is a prefill, packed up to a budget of tokens, as long as some running sequence has more than one token
that is not in the cache; else every running sequence decodes one token.

On a CPU the blocks are as long as the longest sequence, one contiguous slot each, because gathering small blocks is
slow there; the same scheduler then moves sequences together so that the decoding ones are the first rows of the cache.
On CUDA blocks are small, decoding runs as CUDA graphs for a ladder of batch sizes, and the host looks at the drawn
tokens only every few steps.
"""

import math
import sys
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from nanosafe.io.machine import host_memory
from nanosafe.kernels.sample import draw, triton
from nanosafe.model.attention import Chunk, KVCache, PagedDecode, Prefill, SlotDecode
from nanosafe.model.config import ModelConfig
from nanosafe.model.decoder import Decoder
from nanosafe.model.granite import groups_on_host
from nanosafe.sampler.packed import packed_view
from nanosafe.sampler.scheduler import BlockPool, Copy, Scheduler, Sequence

STEPS_PER_LOOK = 8  # decode steps between two looks of the host at what was drawn, on CUDA
# Rows of the graphs: an idle row costs next to nothing, a capture as much as several steps.
GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)


class Columns(NamedTuple):
    """What a step must know of its sequences, one row each, made by the host.

    What belongs together lies together: so it takes four copies to a device, not one for each column.
    """

    integers: Tensor  # [6, B] last token, its position, slot of the state, number of the token to be drawn, seed, top-k
    floats: Tensor  # [3, B] temperature, min-p, and where the last token's log-prob will be
    top_p: Tensor  # [B] float64
    tables: Tensor  # [B, M] int32 block tables

    @classmethod
    def of(cls, sequences: list[Sequence], size: int, width: int, cache: KVCache) -> "Columns":
        """Of `sequences`, filled up to `size` rows, and to `width` blocks each, that use scratch memory alone."""
        idle = Sequence([0], 1, frozenset(), seed=0, temperature=0.0, slot=cache.scratch_slot)
        each = sequences + [idle] * (size - len(sequences))
        integers = torch.tensor([
            [(s.token_ids or s.prompt)[-1] for s in each],
            [len(s) - 1 for s in each],
            [s.slot for s in each],
            [len(s.token_ids) for s in each],
            [s.seed for s in each],
            [s.top_k for s in each],
        ])
        floats = torch.tensor([[s.temperature for s in each], [s.min_p for s in each], [0.0] * size])
        top_p = torch.tensor([s.top_p for s in each], dtype=torch.float64)
        return cls(integers, floats, top_p, cls.tables_of(each, width, cache))

    @staticmethod
    def tables_of(sequences: list[Sequence], width: int, cache: KVCache) -> Tensor:
        tables = [s.blocks + [cache.scratch] * (width - len(s.blocks)) for s in sequences]
        return torch.tensor(tables, dtype=torch.int32)


class Rows:
    """The tensors of sequences that draw together. A decode step changes them in place."""

    def __init__(self, columns: Columns, device: torch.device):
        self.integers, self.floats, self.top_p, self.tables = (column.to(device) for column in columns)
        self.tokens, self.positions, self.slots, self.steps, self.seeds, self.top_k = self.integers.unbind()
        self.temperature, self.min_p, self.logprobs = self.floats.unbind()

    def fill(self, columns: Columns) -> None:
        """Take the values of as many rows."""
        self.integers.copy_(columns.integers)
        self.floats.copy_(columns.floats)
        self.top_p.copy_(columns.top_p)
        self.fill_tables(columns.tables)

    def fill_tables(self, tables: Tensor) -> None:
        """Take block tables [B', M'] that may be fewer and narrower: no row reads beyond its own blocks."""
        self.tables[: tables.shape[0], : tables.shape[1]].copy_(tables)

    def draw(self, logits: Tensor) -> None:
        """Put the tokens drawn from logits [B, V] in place of the last ones."""
        drawn = draw(logits, self.temperature, self.top_k, self.top_p, self.min_p, self.seeds, self.steps)
        self.tokens.copy_(drawn[0])
        self.logprobs.copy_(drawn[1])
        self.positions += 1
        self.steps += 1


class DecodeGraph:
    """A decode step of a fixed number of rows as a CUDA graph: one launch instead of hundreds."""

    def __init__(self, step, rows: Rows, memory_pool):
        """step(rows) advances rows in place; `rows` are idle ones, whose tensors the graph keeps."""
        self.rows, self.graph = rows, torch.cuda.CUDAGraph()
        side = capture_stream(rows.tokens.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(rows)  # compiles kernels and sets libraries up, which must not happen while capturing
            rows.positions.zero_()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph, pool=memory_pool, stream=side):
            step(rows)


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures: cuBLAS keeps a workspace, 32 MiB on Hopper, for every stream it has seen."""
    return torch.cuda.Stream(device)


class Engine:
    """Runs sequences of up to `max_tokens` tokens: `add` them, then call `step` while `busy`.

    The model's weights are read in place, so the model must not change while the engine is used; on a CPU they are also
    packed once more in the order its matrix product likes, where that pays (`pack`) and memory allows.
    """

    def __init__(self, model: Decoder, *, max_tokens: int, max_batch: int | None = None,
                 cache_bytes: int | None = None, prefill_tokens: int | None = None, block_size: int | None = None,
                 requests: int | None = None, banned_token_ids: Iterable[int] = (), pack: bool = True):
        """max_batch: sequences that decode together (default 64 on a CPU, 256 on CUDA), not more than `requests` where
        their number is known; cache_bytes: memory of the KV cache (default: of what is free, half on a CPU and 80 % on
        CUDA), of which at most half is for the states of Mamba layers; prefill_tokens: of one prefill (default: see
        default_prefill_tokens); block_size: positions per block (default: 64 on CUDA, one slot per sequence elsewhere);
        banned_token_ids: never drawn, and log-probs are those of what is left."""
        for name, value in (("max_batch", max_batch), ("prefill_tokens", prefill_tokens), ("block_size", block_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.device, dtype = model.head_weight.device, model.head_weight.dtype
        self.banned = torch.tensor(sorted(banned_token_ids), dtype=torch.long, device=self.device)
        # The plain twins read values on the host.
        self.graphed = self.device.type == "cuda" and triton is not None and not groups_on_host(model)
        max_batch = min(max_batch or (256 if self.graphed else 64), requests or sys.maxsize)
        prefill_tokens = prefill_tokens or default_prefill_tokens(model.config, self.device.type)
        block_size = block_size or (64 if self.graphed else max_tokens)
        self.slots = not self.graphed and block_size >= max_tokens
        pack = pack and self.device.type == "cpu"
        self.model = packed_view(model, free_memory(self.device)) if pack else model
        if cache_bytes is None:
            cache_bytes = int(free_memory(self.device) * (0.8 if self.graphed else 0.5))
        recurrent = model.config.attention_layers < model.config.num_hidden_layers
        slot_bytes = KVCache.bytes_per_slot(model.config, dtype)
        if recurrent:
            max_batch = max(1, min(max_batch, cache_bytes // 2 // slot_bytes - 1))  # one more is scratch
        slots = (max_batch + 1) * slot_bytes
        block_bytes = KVCache.bytes_per_position(model.config, dtype) * block_size
        self.table_width = -(-max_tokens // block_size)  # blocks of the longest sequence
        blocks = min((cache_bytes - slots) // max(1, block_bytes), max_batch * self.table_width)
        if blocks < self.table_width:
            needed = self.table_width * block_bytes + 2 * slot_bytes
            raise ValueError(
                f"a sequence of {max_tokens} tokens needs {needed / 2**20:,.1f} MiB of cache, "
                f"but only {cache_bytes / 2**20:,.1f} may be used: ask for fewer new tokens, or raise cache_bytes")
        self.cache = KVCache(model.config, blocks, block_size, self.device, dtype, max_batch if recurrent else 0)
        self.scheduler = Scheduler(BlockPool(blocks, block_size), max_batch, prefill_tokens, recurrent)
        # They hold the cache's addresses, so they end with it: its memory must go back before training goes on.
        self.graphs: dict[int, DecodeGraph] = {}
        # Whom the last graph decoded, and how many blocks they had.
        self.decoded: tuple[list[Sequence], int] = [], 0
        self.graph_memory = torch.cuda.graph_pool_handle() if self.graphed else None

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
            self._copy(self.scheduler.admit())
            self._begin()
            chunks = self.scheduler.prefill()
            drew = self._prefill(chunks) if chunks else self._decode()
        for sequence in drew:
            if sequence.finish_reason:
                self.scheduler.remove(sequence)
        return drew

    def _copy(self, copies: list[Copy]) -> None:
        for source, target, positions in copies:
            self.cache.copy(source, target, positions)

    def _begin(self) -> None:
        if self.scheduler.recurrent:
            for slot, source in self.scheduler.begins:
                self.cache.recurrent.begin(slot, source)
        self.scheduler.begins.clear()

    def _prefill(self, chunks: list[tuple[Sequence, int]]) -> list[Sequence]:
        # Those with nothing in the cache first, as Prefill wants them; neighbours of equal length attend as one batch.
        chunks.sort(key=lambda chunk: (chunk[0].cached > 0, chunk[1]))
        memory = Prefill(self.cache, [Chunk(s.blocks, s.cached, count, s.slot) for s, count in chunks])
        tokens = [token for s, count in chunks for token in (s.prompt + s.token_ids)[s.cached : s.cached + count]]
        hidden = self.model.hidden(torch.tensor(tokens, device=self.device), memory.positions, memory)
        ready, last, end = [], [], 0
        for sequence, count in chunks:
            end += count
            sequence.cached += count
            if not sequence.pending:
                ready.append(sequence)
                last.append(end - 1)
        if ready:
            rows = self._rows(ready)
            self._draw(rows, hidden[torch.tensor(last, device=self.device)])
            self._append(ready, [rows.tokens], [rows.logprobs])
        return ready

    def _decode(self) -> list[Sequence]:
        running = self.scheduler.running
        steps = 1
        if self.graphed:
            steps = min(STEPS_PER_LOOK, *(s.max_new_tokens - len(s.token_ids) for s in running))
        self.scheduler.grow(steps)
        if self.slots:
            self._copy(self.scheduler.compact())
        sequences = sorted(running, key=lambda s: s.blocks[0])
        graph = self._graph(sequences) if self.graphed else None
        rows = graph.rows if graph else self._rows(sequences)
        tokens, logprobs = [], []
        for _ in range(steps):
            graph.graph.replay() if graph else self.advance(rows)
            tokens.append(rows.tokens.clone())
            logprobs.append(rows.logprobs.clone())
        self._append(sequences, tokens, logprobs)
        return sequences

    def advance(self, rows: Rows) -> None:
        """One decode step of `rows`, in place and without a look at any value on CUDA."""
        if self.slots:
            memory = SlotDecode(self.cache, rows.positions, rows.slots)
        else:
            memory = PagedDecode(self.cache, rows.tables, rows.positions, rows.slots)
        self._draw(rows, self.model.hidden(rows.tokens, rows.positions, memory))

    def _draw(self, rows: Rows, hidden: Tensor) -> None:
        logits = self.model.logits(hidden)
        rows.draw(logits.index_fill(1, self.banned, -math.inf) if len(self.banned) else logits)

    def _append(self, sequences: list[Sequence], tokens: list[Tensor], logprobs: list[Tensor]) -> None:
        """Write down what was drawn, one tensor [B] for each step; what a sequence drew after its end is dropped."""
        for sequence, drawn, theirs in zip(
            sequences, torch.stack(tokens, 1).tolist(), torch.stack(logprobs, 1).tolist(), strict=False
        ):
            for token, logprob in zip(drawn, theirs, strict=True):
                if not math.isfinite(logprob):
                    raise ValueError(
                        f"the model of {self.model.config.source} gave a token the log-prob {logprob}: "
                        f"its weights hold NaN or infinity, or overflow in {self.cache.keys.dtype}; "
                        "try --dtype float32 or an earlier checkpoint")
                sequence.token_ids.append(token)
                sequence.logprobs.append(logprob)
                if sequence.finish_reason:
                    break
            sequence.cached = len(sequence) - 1

    def _rows(self, sequences: list[Sequence]) -> Rows:
        return Rows(Columns.of(sequences, len(sequences), widest(sequences), self.cache), self.device)

    def _graph(self, sequences: list[Sequence]) -> DecodeGraph:
        """The captured step of the next larger of GRAPH_SIZES, its rows those of `sequences`."""
        size = graph_size(len(sequences))
        if size not in self.graphs:
            self.graphs[size] = self.capture(size)
        rows, blocks = self.graphs[size].rows, sum(len(s.blocks) for s in sequences)
        if sequences != self.decoded[0]:
            rows.fill(Columns.of(sequences, size, widest(sequences), self.cache))
        elif blocks != self.decoded[1]:  # all else is as the last replay left it
            rows.fill_tables(Columns.tables_of(sequences, widest(sequences), self.cache))
        self.decoded = sequences, blocks
        return self.graphs[size]

    def capture(self, size: int) -> DecodeGraph:
        """A decode step of `size` rows, idle until they are filled."""
        idle = Rows(Columns.of([], size, self.table_width, self.cache), self.device)
        return DecodeGraph(self.advance, idle, self.graph_memory)


def widest(sequences: list[Sequence]) -> int:
    """Blocks of the sequence that has most."""
    return max(len(s.blocks) for s in sequences)


def graph_size(sequences: int) -> int:
    """Rows of the graph for so many sequences."""
    for size in GRAPH_SIZES:
        if size >= sequences:
            return size
    return -(-sequences // 128) * 128


def default_prefill_tokens(config: ModelConfig, kind: str) -> int:
    """Tokens of one prefill on a device of this kind, cuda or cpu.

    On a CPU as many as keep an MLP's activations close to the cores and in memory that was used before, which is faster
    than fresh memory; from 256, below which reading the weights takes longer, to 2048.
    """
    return 8192 if kind == "cuda" else max(256, min(2048, 2**21 // config.intermediate_size))


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated now. On CUDA torch's allocator first gives back what it holds unused."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return host_memory()[1]  # zeroed pages count only once they are written
