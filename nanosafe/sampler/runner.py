"""How the model runs over the cache: prefills, decode steps, and the tensors that these need of their sequences.

`PagedRunner` works with any blocks, `SlotRunner` where each block holds a whole sequence, and `GraphRunner` (graphs.py)
replays decode steps as CUDA graphs. The engine chooses one of them.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from nanosafe.kernels.sample import SamplingTensors, draw
from nanosafe.model.attention import AttentionBackend, Chunk, KVCache, PagedDecode, Prefill, SlotDecode
from nanosafe.model.decode import decode_hidden, takes_kernels
from nanosafe.model.decoder import Decoder
from nanosafe.sampler.scheduler import Scheduler, Sequence
from nanosafe.sampler.spread import TensorParallelDecoder


class InputBatch:
    """The tensors of sequences that draw together, one row each. A decode step changes them in place.

    What belongs together lies together: so it takes four copies to a device, not one for each column.
    """

    def __init__(self, sequences: list[Sequence], cache: KVCache, device: torch.device, size: int, width: int):
        """Of `sequences`, filled up to `size` rows, and to `width` blocks each, that use scratch memory alone."""
        idle = Sequence([0], 1, frozenset(), seed=0, temperature=0.0, slot=cache.scratch_slot)
        rows = sequences + [idle] * (size - len(sequences))
        integers, floats = [], []
        for s in rows:
            last = (s.token_ids or s.prompt)[-1]
            integers.append((last, len(s) - 1, s.slot, len(s.token_ids), s.seed, s.top_k))
            floats.append((s.temperature, s.min_p, 0.0))
        self.integers = torch.tensor(integers).T.contiguous().to(device)  # [6, B]
        self.floats = torch.tensor(floats).T.contiguous().to(device)  # [3, B]
        self.top_p = torch.tensor([s.top_p for s in rows], dtype=torch.float64).to(device)  # [B]
        self.tables = block_tables(rows, cache, width).to(device)  # [B, M]
        # The last token and its position; and the number of the token to be drawn, whose log-prob is to come.
        self.tokens, self.positions, self.slots, self.steps, self.seeds, self.top_k = self.integers.unbind()
        self.temperature, self.min_p, self.logprobs = self.floats.unbind()

    def copy_(self, other: "InputBatch") -> None:
        """Take the values of a batch of as many rows."""
        self.integers.copy_(other.integers)
        self.floats.copy_(other.floats)
        self.top_p.copy_(other.top_p)
        self.copy_tables_(other.tables)

    def copy_tables_(self, tables: Tensor) -> None:
        """Take block tables [B', M'] that may be fewer and narrower: no row reads beyond its own blocks."""
        self.tables[: tables.shape[0], : tables.shape[1]].copy_(tables)


def block_tables(sequences: list[Sequence], cache: KVCache, width: int) -> Tensor:
    tables = [s.blocks + [cache.scratch] * (width - len(s.blocks)) for s in sequences]
    return torch.tensor(tables, dtype=torch.int32)


def most_blocks(sequences: list[Sequence]) -> int:
    return max(len(s.blocks) for s in sequences)


class PagedRunner:
    """Runs a model over the pages of its cache."""

    steps_per_sync = 1  # decode steps between two reads of the drawn tokens by the host
    # What an engine does unless it is told otherwise.
    max_batch = 64
    memory_share = 0.5  # of what is free, for the cache
    block_size: int | None = None  # None: a block is as long as the longest sequence

    def __init__(self, model: Decoder, cache: KVCache, table_width: int, banned_token_ids: Iterable[int] = (),
                 filters: bool = True):  # fmt: skip
        """table_width: blocks of the longest sequence; banned_token_ids, filters: as in EngineOptions."""
        self.model, self.cache, self.table_width = model, cache, table_width
        self.device = cache.values.device
        self.banned = torch.tensor(sorted(banned_token_ids), dtype=torch.long, device=self.device)
        self.draws_in_parts = isinstance(model, TensorParallelDecoder) and not filters and not len(self.banned)

    def prefill(self, chunks: list[tuple[Sequence, int]]) -> tuple[list[Sequence], InputBatch | None]:
        """Run `count` more tokens of each sequence. Those then wholly cached draw a token and are returned."""
        backend = Prefill(self.cache, [Chunk(s.blocks, s.cached, count, s.slot) for s, count in chunks])
        tokens, ready, last = [], [], []
        for sequence, count in chunks:
            tokens += (sequence.prompt + sequence.token_ids)[sequence.cached : sequence.cached + count]
            sequence.cached += count
            if not sequence.pending:
                ready.append(sequence)
                last.append(len(tokens) - 1)
        hidden = self.model.hidden(torch.tensor(tokens, device=self.device), backend.positions, backend)
        if not ready:
            return [], None
        batch = self.new_batch(ready)
        self.draw(batch, hidden[torch.tensor(last, device=self.device)])
        return ready, batch

    def prepare_decode(self, sequences: list[Sequence]) -> tuple[InputBatch, Callable[[], None]]:
        """The batch of the sequences, whose rows are the first ones, and what does one decode step of it in place."""
        batch = self.new_batch(sequences)
        return batch, partial(self.advance, batch)

    def new_batch(self, sequences: list[Sequence]) -> InputBatch:
        return InputBatch(sequences, self.cache, self.device, len(sequences), most_blocks(sequences))

    def advance(self, batch: InputBatch) -> None:
        """One decode step, without a look at any value on CUDA."""
        backend = self.decode_backend(batch)
        if takes_kernels(self.model, backend):
            hidden = decode_hidden(self.model, batch.tokens, backend)
        else:
            hidden = self.model.hidden(batch.tokens, batch.positions, backend)
        self.draw(batch, hidden)

    def decode_backend(self, batch: InputBatch) -> AttentionBackend:
        return PagedDecode(self.cache, batch.tables, batch.positions, batch.slots)

    def draw(self, batch: InputBatch, hidden: Tensor) -> None:
        """Put the tokens drawn at hidden states [B, D] in place of the last ones."""
        params = SamplingTensors(batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.seeds, batch.steps)
        if self.draws_in_parts:
            tokens, logprobs = self.model.draw(hidden, params)
        else:
            logits = self.model.logits(hidden)
            if len(self.banned):
                logits = logits.index_fill(1, self.banned, -math.inf)
            tokens, logprobs = draw(logits, params)
        batch.tokens.copy_(tokens)
        batch.logprobs.copy_(logprobs)
        batch.positions += 1
        batch.steps += 1

    def arrange(self, scheduler: Scheduler) -> None:
        """Move the running sequences to where `decode_backend` wants them."""


class SlotRunner(PagedRunner):
    """On a CPU each sequence has one contiguous slot, because gathering small blocks is slow there."""

    def arrange(self, scheduler: Scheduler) -> None:
        """The decoding sequences become the first rows of the cache, which is then read as it stands."""
        for source, target, positions in scheduler.compact():
            self.cache.copy(source, target, positions)

    def decode_backend(self, batch: InputBatch) -> AttentionBackend:
        return SlotDecode(self.cache, batch.positions, batch.slots)
