"""The sampling engine: continuous batching over a paged KV cache.

Requests enter and leave at every step. `BlockPool` counts who holds which cache block, `Scheduler` decides who runs and
what is prefilled, both without a tensor; `Engine` moves the tensors. A step is a prefill, packed up to a budget of
tokens, as long as some running sequence has more than one token that is not in the cache; else every running sequence
decodes one token. When blocks run out, the youngest sequence gives all of its own back and is computed anew later.

On a CPU the blocks are as long as the longest sequence, one contiguous slot each, because gathering small blocks is
slow there; the same scheduler then moves sequences together so that the decoding ones are the first rows of the cache.
On CUDA blocks are small, decoding runs as CUDA graphs for a ladder of batch sizes, and the host looks at the drawn
tokens only every few steps.
"""

import heapq
import math
import sys
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from nanosafe.config import ModelConfig
from nanosafe.granite import groups_on_host
from nanosafe.host_memory import host_memory
from nanosafe.kernels.draw import draw, triton
from nanosafe.memory import Chunk, KVCache, PagedDecode, Prefill, SlotDecode
from nanosafe.model import Decoder
from nanosafe.packed import packed_view

SHORTEST_SHARED = 16  # tokens; a shorter common prefix is not worth waiting for or copying
STEPS_PER_LOOK = 8  # decode steps between two looks of the host at what was drawn, on CUDA
# Rows of the graphs: an idle row costs next to nothing, a capture as much as several steps.
GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)


@dataclass(eq=False)
class Sequence:
    """One completion in the making."""

    prompt: list[int]
    max_new_tokens: int
    stop_ids: frozenset[int]
    seed: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    token_ids: list[int] = field(default_factory=list)  # drawn so far
    logprobs: list[float] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)  # the block table
    slot: int = 0  # where the cache keeps the state of its Mamba layers
    cached: int = 0  # leading tokens whose keys and values are in the cache

    def __len__(self) -> int:
        return len(self.prompt) + len(self.token_ids)

    @property
    def pending(self) -> int:
        """Tokens not in the cache: 1 when it is ready to decode, for the last token drawn was never computed."""
        return len(self) - self.cached

    @property
    def longest(self) -> int:
        """Positions it can come to need; the last token drawn needs none."""
        return len(self.prompt) + self.max_new_tokens - 1

    @property
    def finish_reason(self) -> str | None:
        if self.token_ids and self.token_ids[-1] in self.stop_ids:
            return "stop"
        return "length" if len(self.token_ids) >= self.max_new_tokens else None


class BlockPool:
    """Which blocks are free, and how many sequences hold each of the others."""

    def __init__(self, blocks: int, block_size: int):
        self.total, self.block_size = blocks, block_size
        self.free = list(range(blocks))  # a heap: the lowest number first keeps slots together
        self.holders = [0] * blocks

    def take(self) -> int:
        block = heapq.heappop(self.free)
        self.holders[block] = 1
        return block

    def share(self, block: int) -> int:
        self.holders[block] += 1
        return block

    def drop(self, block: int) -> None:
        self.holders[block] -= 1
        if self.holders[block] == 0:
            heapq.heappush(self.free, block)

    def blocks_for(self, positions: int) -> int:
        return -(-positions // self.block_size)


Copy = tuple[int, int, int]  # source block, target block, how many positions
Begin = tuple[int, int | None]  # a slot, and the slot whose state it begins with


class Scheduler:
    """Who runs: first come, first served, in at most `max_batch` rows and the blocks of the pool.

    recurrent: the model has Mamba layers, whose state is of exactly the tokens computed and cannot go back. So a
    prefill leaves the last token to decoding: there, a state fits every sequence that begins with the same prompt.
    """

    def __init__(self, pool: BlockPool, max_batch: int, prefill_tokens: int, recurrent: bool = False):
        self.pool, self.max_batch, self.prefill_tokens, self.recurrent = pool, max_batch, prefill_tokens, recurrent
        self.slots = BlockPool(max_batch, 1)  # of states
        self.begins: list[Begin] = []  # states to be set, in order, before a step
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # the oldest first

    def admit(self) -> list[Copy]:
        """Let waiting sequences run while rows and blocks last. Returns the copies to make in the cache before a step.

        A sequence takes over what a running one has in the cache of a common prefix of their prompts: whole blocks are
        shared, the rest is copied. It waits where a running one is about to compute SHORTEST_SHARED tokens or more of
        that prefix, so that the n samples of a longer prompt are prefilled once; its place is kept meanwhile.
        """
        copies, held_back = [], []
        while self.waiting and len(self.running) + len(held_back) < self.max_batch:
            sequence = self.waiting.popleft()
            donor, cached, coming = self._donor(sequence)
            if coming - cached >= SHORTEST_SHARED:
                held_back.append(sequence)
                continue
            shared, rest = divmod(cached, self.pool.block_size)
            needed = self.pool.blocks_for(len(sequence)) - shared
            # One block more for every sequence that may still grow, or the new one would soon be sent back.
            growing = sum(len(s.blocks) < self.pool.blocks_for(s.longest) for s in self.running)
            if self.running and needed + growing > len(self.pool.free):
                held_back.append(sequence)
                break
            if donor:
                sequence.blocks = [self.pool.share(block) for block in donor.blocks[:shared]]
            sequence.blocks += [self.pool.take() for _ in range(needed)]
            if rest:
                copies.append((donor.blocks[shared], sequence.blocks[shared], rest))
            sequence.cached, sequence.slot = cached, self.slots.take()
            self.begins.append((sequence.slot, donor.slot if donor else None))
            self.running.append(sequence)
        self.waiting.extendleft(reversed(held_back))
        return copies

    def _donor(self, sequence: Sequence) -> tuple[Sequence | None, int, int]:
        """The running sequence with the most cached tokens of a common prefix, how many, and how many there will be."""
        donor, most, coming = None, 0, 0
        for other in self.running:
            if other.prompt[:SHORTEST_SHARED] != sequence.prompt[:SHORTEST_SHARED]:
                continue
            # One token is always left to compute: its hidden state draws the next.
            common = min(common_prefix(sequence.prompt, other.prompt), len(sequence) - 1)
            if self.recurrent and other.cached > common:
                continue  # its state is of more than the common tokens
            if common >= SHORTEST_SHARED:
                stop = len(other) - 1 if self.recurrent else common  # where its prefill can be taken over
                coming = max(coming, stop if stop <= common else 0)
                if (cached := min(common, other.cached)) > most:
                    donor, most = other, cached
                    if most == len(sequence) - 1:
                        break
        return donor, most, coming

    def prefill(self) -> list[tuple[Sequence, int]]:
        """Running sequences that are not ready to decode, each with how many tokens to compute now.

        As many whole ones as the budget takes, or a part of one that is longer than the budget.
        """
        chunks, room = [], self.prefill_tokens
        for sequence in self.running:
            if sequence.pending > 1:
                count = sequence.pending - self.recurrent
                if chunks and count > room:
                    break
                chunks.append((sequence, min(count, room)))
                room -= chunks[-1][1]
        return chunks

    def grow(self, steps: int) -> None:
        """Give every running sequence blocks for `steps` more tokens; where none is left, the youngest goes back."""
        for sequence in list(self.running):
            while self.pool.blocks_for(sequence.cached + steps) > len(sequence.blocks) and sequence in self.running:
                if self.pool.free:
                    sequence.blocks.append(self.pool.take())
                else:
                    youngest = self.running[-1]
                    self.remove(youngest)
                    self.waiting.appendleft(youngest)

    def compact(self) -> list[Copy]:
        """Where blocks are slots: move sequences so that n running ones hold blocks 0 .. n - 1. Returns the copies."""
        copies = []
        for sequence in self.running:
            [block] = sequence.blocks
            if block >= len(self.running):
                sequence.blocks = [self.pool.take()]
                copies.append((block, sequence.blocks[0], sequence.cached))
                self.pool.drop(block)
        return copies

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of the running ones and give its blocks back."""
        self.running.remove(sequence)
        for block in sequence.blocks:
            self.pool.drop(block)
        self.slots.drop(sequence.slot)
        sequence.blocks, sequence.cached = [], 0


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many leading tokens two prompts share."""
    return bisect_left(range(1, min(len(a), len(b)) + 1), True, key=lambda n: a[:n] != b[:n])


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
        self.columns = Columns(*(column.to(device) for column in columns))
        self.integers, self.floats, self.top_p, self.tables = self.columns
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
                self.cache.begin(slot, source)
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
