"""Decoding by CUDA graphs: one launch a step instead of hundreds.

A graph has a fixed number of rows, so there is one for each of a ladder of batch sizes, captured when it is first
needed; rows without a sequence run idle. The host looks at what was drawn only every few steps. Graphs hold the cache's
addresses, so they end with the engine: its memory must go back before training goes on.
"""

from collections.abc import Callable
from functools import cache

import torch

from nanosafe.model.decode import join_projections
from nanosafe.sampler.runner import InputBatch, PagedRunner, block_tables, most_blocks
from nanosafe.sampler.scheduler import Sequence

# Rows of the graphs: an idle row costs next to nothing, a capture as much as several steps.
GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)


class DecodeGraph:
    """A decode step of `batch`, in place, as a CUDA graph."""

    def __init__(self, step: Callable, batch: InputBatch, memory_pool):
        """step(batch) advances a batch; this one is idle, and the graph keeps its tensors."""
        self.batch, self.graph = batch, torch.cuda.CUDAGraph()
        side = capture_stream(batch.tokens.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(batch)  # compiles kernels and sets libraries up, which must not happen while capturing
            batch.positions.zero_()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph, pool=memory_pool, stream=side):
            step(batch)
        self.replay = self.graph.replay


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures: cuBLAS keeps a workspace, 32 MiB on Hopper, for every stream it has seen."""
    return torch.cuda.Stream(device)


class GraphRunner(PagedRunner):
    steps_per_sync = 8
    max_batch = 256
    memory_share = 0.8
    block_size = 64

    def __init__(self, *arguments):
        super().__init__(*arguments)
        join_projections(self.model)  # Nothing, if the last rollout has done it and no weight has moved since.
        self.graphs: dict[int, DecodeGraph] = {}
        self.memory_pool = torch.cuda.graph_pool_handle()
        self.decoded: list[Sequence] = []  # by the last graph
        self.decoded_blocks = 0  # how many they had

    def prepare_decode(self, sequences: list[Sequence]) -> tuple[InputBatch, Callable[[], None]]:
        size = graph_size(len(sequences))
        if size not in self.graphs:
            self.graphs[size] = self.capture(size)
        batch, width = self.graphs[size].batch, most_blocks(sequences)
        blocks = sum(len(s.blocks) for s in sequences)
        if sequences != self.decoded:
            batch.copy_(InputBatch(sequences, self.cache, torch.device("cpu"), size, width))
        elif blocks != self.decoded_blocks:  # All else is as the last replay left it.
            batch.copy_tables_(block_tables(sequences, self.cache, width))
        self.decoded, self.decoded_blocks = sequences, blocks
        return batch, self.graphs[size].replay

    def capture(self, size: int) -> DecodeGraph:
        """A decode step of `size` rows, idle until they are filled."""
        idle = InputBatch([], self.cache, self.device, size, self.table_width)
        return DecodeGraph(self.advance, idle, self.memory_pool)


def graph_size(sequences: int) -> int:
    """Rows of the graph for that many sequences."""
    for size in GRAPH_SIZES:
        if size >= sequences:
            return size
    return -(-sequences // 128) * 128
