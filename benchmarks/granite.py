"""Decoding with Mamba-2 layers beside attention: cost of a token as the context grows, and memory of a sequence.

Three models of one width and depth and of nearly the same number of parameters: `mamba`, whose layers are all Mamba-2;
`hybrid`, one layer in ten of attention as in Granite 4; `transformer`, all attention, with a wider MLP to make up for
its smaller mixer. Each decodes single tokens of B sequences whose caches are full up to the context; rounds alternate
between models and contexts, and the median counts. Memory of a sequence follows from the shapes, for these models and
for the true shape of granite-4.0-tiny. The last line is one JSON object.

    python benchmarks/granite.py                                          # on a CPU, about two minutes
    python benchmarks/granite.py --width 1536 --layers 40 --batch 64      # on a GPU
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanosafe.io.machine import cpu_name
from nanosafe.model.attention import KVCache, PagedDecode, SlotDecode  # noqa: E402
from nanosafe.model.config import ModelConfig
from nanosafe.model.granite import make_decoder  # noqa: E402
from nanosafe.plan.shapes import SHAPES
from nanosafe.sampler.graphs import DecodeGraph  # noqa: E402

CONTEXTS = (128, 512, 1024, 2048, 4096, 8192)
BLOCK = 64  # positions of a cache block on CUDA, the engine's


def configs(width: int, layers: int) -> dict[str, ModelConfig]:
    """Granite 4's proportions without experts; heads of 64 in Mamba layers, of 128 in attention."""
    def made(kinds: list[str], mlp: int) -> ModelConfig:
        return ModelConfig.from_dict(SHAPES["granite-4.0-tiny"] | dict(
            hidden_size=width, num_hidden_layers=layers, layer_types=kinds, mamba_n_heads=width // 32,
            num_attention_heads=width // 128, num_key_value_heads=max(1, width // 384), num_local_experts=0,
            shared_intermediate_size=mlp, vocab_size=8192))  # fmt: skip

    kinds = {"mamba": ["mamba"] * layers, "transformer": ["attention"] * layers,
             "hybrid": ["attention" if i % 10 == 5 else "mamba" for i in range(layers)]}
    wanted = parameters(made(kinds["mamba"], 2 * width))
    found = {}
    for name, each in kinds.items():
        narrow = parameters(made(each, 2 * width))
        found[name] = made(each, 2 * width + round((wanted - narrow) / (3 * width * layers)))
    return found


def parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in make_decoder(config).parameters())


class Decoding:
    """A model with the caches of `batch` sequences, ready to decode one token of each at any context."""

    def __init__(self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype):
        self.model, longest = make_decoder(config).to(device, dtype).eval(), max(CONTEXTS) + 1
        self.pages = -(-longest // BLOCK)
        blocks, size = (batch * self.pages, BLOCK) if device.type == "cuda" else (batch, longest)
        self.cache = KVCache(config, blocks, size, device, dtype, slots=batch)
        for held in (self.cache.keys, self.cache.values, self.cache.recurrent.past, self.cache.recurrent.states):
            held.normal_()
        self.slots = torch.arange(batch, device=device)
        self.tokens = self.slots % config.vocab_size
        self.tables = torch.arange(batch * self.pages, device=device, dtype=torch.int32).view(batch, -1)
        self.positions, self.run = torch.zeros_like(self.slots), self.step
        if device.type == "cuda":  # as the sampler does; else the time would be that of launching kernels
            self.run = DecodeGraph(Decoding.step, self, None).replay

    @torch.no_grad()
    def step(self) -> None:
        memory = (PagedDecode(self.cache, self.tables, self.positions, self.slots) if self.slots.is_cuda
                  else SlotDecode(self.cache, self.positions, self.slots))
        self.model.hidden(self.tokens, self.positions, memory)

    def seconds(self, context: int, steps: int) -> float:
        """Of one step, the mean of several."""
        self.positions.fill_(context)
        start = self.now()
        for _ in range(steps):
            self.run()
        return (self.now() - start) / steps

    def now(self) -> float:
        if self.slots.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def memory_of(config: ModelConfig, dtype: torch.dtype) -> dict[int, float]:
    """MB of one sequence at each context."""
    slot, position = (f(config, dtype) for f in (KVCache.bytes_per_slot, KVCache.bytes_per_position))
    return {context: round((slot + context * position) / 1e6, 2) for context in CONTEXTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384, help="hidden size, a multiple of 384")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4, help="sequences that decode together")
    parser.add_argument("--steps", type=int, default=8, help="decode steps of a measurement")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    shapes = configs(args.width, args.layers)
    models = {name: Decoding(config, args.batch, device, dtype) for name, config in shapes.items()}
    times: dict[tuple[str, int], list[float]] = {(name, context): [] for name in models for context in CONTEXTS}
    for decoding in models.values():
        decoding.seconds(CONTEXTS[0], 2)
    for _ in range(args.rounds):
        for name, context in times:
            times[name, context].append(models[name].seconds(context, args.steps))
    true = ModelConfig.from_dict(SHAPES["granite-4.0-tiny"])
    attention = replace(true, hybrid=replace(true.hybrid, layer_types=("attention",) * true.num_hidden_layers))
    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(), "dtype": str(dtype), **vars(args), "models": {},
        "true_shape_mb": {"granite-4.0-tiny": memory_of(true, torch.bfloat16),
                          "all attention": memory_of(attention, torch.bfloat16)},
    }  # fmt: skip
    print(f"{'':24}" + "".join(f"{context:>10}" for context in CONTEXTS))
    for name, config in shapes.items():
        ms = {context: 1e3 * statistics.median(times[name, context]) for context in CONTEXTS}
        held = memory_of(config, dtype)
        growth = ms[CONTEXTS[-1]] / ms[CONTEXTS[0]]
        result["models"][name] = {"parameters": parameters(config), "ms": ms, "growth": growth, "mb": held}
        print(f"{name + ' ms a step':24}" + "".join(f"{value:10.2f}" for value in ms.values()) + f"   x{growth:.2f}")
        print(f"{name + ' MB a sequence':24}" + "".join(f"{value:10.2f}" for value in held.values()))
    for name, held in result["true_shape_mb"].items():
        print(f"{name + ' MB':24}" + "".join(f"{value:10.2f}" for value in held.values()))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
