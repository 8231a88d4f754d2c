"""The engine: continuous batching over a paged KV cache.

Requests enter and leave at every step. The scheduler says who runs and in which blocks, the runner moves the tensors,
and `Engine` makes a step of the two: a prefill, packed up to a budget of tokens, as long as some running sequence has
more than one token that is not in the cache; else every running sequence decodes.
"""

import math

import torch
from torch import Tensor

from nanosafe.kernels import triton
from nanosafe.model.decoder import Decoder
from nanosafe.model.granite import groups_on_host
from nanosafe.sampler.capacity import EngineOptions, default_prefill_tokens, free_memory, make_cache
from nanosafe.sampler.graphs import GraphRunner
from nanosafe.sampler.packed import packed_view
from nanosafe.sampler.runner import PagedRunner, SlotRunner
from nanosafe.sampler.scheduler import BlockPool, Scheduler, Sequence


def choose_runner(model: Decoder, options: EngineOptions) -> type[PagedRunner]:
    """The one place where CUDA graphs, slots and pages are told apart."""
    # The plain forms of the kernels, and some mixtures of experts, read values on the host, which no graph can.
    if model.head_weight.device.type == "cuda" and triton is not None and not groups_on_host(model):
        return GraphRunner
    if options.block_size is None or options.block_size >= options.max_tokens:
        return SlotRunner
    return PagedRunner


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
        self.cache, size = make_cache(model, options, runner)
        self.table_width = size.table_width
        self.runner = runner(view, self.cache, self.table_width, options.banned_token_ids, options.filters)
        prefill_tokens = options.prefill_tokens or default_prefill_tokens(config, device.type)
        recurrent = config.attention_layers < config.num_hidden_layers
        pool = BlockPool(size.blocks, size.block_size)
        self.scheduler = Scheduler(pool, size.max_batch, prefill_tokens, recurrent)

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
        steps = min(self.runner.steps_per_sync, room)
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
