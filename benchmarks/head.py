"""Log-prob and entropy of the head, forward and forward + backward: time and peak memory beside other ways.

    nanosafe   token_logprob_entropy: tiles of the vocabulary, a hand-written pass over each tile both ways
    chunked    chunks of tokens in plain torch, as large as a tile: log_softmax and entropy per chunk, recomputed in
               backward by torch.utils.checkpoint
    full       all logits at once
    compiled   `full` through torch.compile
    torch_ce   F.linear_cross_entropy of torch 2.13 and later, in its own chunks (the log-prob alone, no entropy)
    liger      Liger's fused linear cross-entropy, where it is installed (the log-prob alone, no entropy)
    products   matrix products alone, in our tiles, each into memory that is there already: the floor

A head multiplies N x D hidden states by a D x V weight: 2 N D V floating-point operations forward and 4 N D V backward.
TFLOP/s count these, whatever else a side computes; what keeps no logits multiplies them out twice, so that its floor,
and that of `products`, is 8 N D V in all. Times are medians of runs that alternate between the sides in one process.
Peak memory is that of forward + backward in a process of its own, beyond the inputs; its bound is a tile of logits,
the two gradients and, in half precision, the hidden states' gradient in float32. A side that does not fit or does not
run here is left out, with the reason. The last line is one JSON object.

    python benchmarks/head.py                                  # CPU: N 4096, D 1024, V 151936, float32; half an hour
    python benchmarks/head.py --tokens 256 --dim 64 --vocab 5000                      # seconds
    python benchmarks/head.py --device cuda                    # N 8192, D 4096, V 131072, bfloat16
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nanosafe import token_logprob_entropy
from nanosafe.io.machine import cpu_name
from nanosafe.kernels.logprob import tile_columns

SIDES = ("nanosafe", "chunked", "full", "compiled", "torch_ce", "liger", "products")
DEFAULTS = {"cpu": dict(tokens=4096, dim=1024, vocab=151936, dtype="float32"),
            "cuda": dict(tokens=8192, dim=4096, vocab=131072, dtype="bfloat16")}


def full(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logp = F.linear(hidden, weight).float().log_softmax(dim=-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(dim=-1)


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> tuple[Tensor, ...]:
    parts = [checkpoint(full, h, weight, t, use_reentrant=False)
             for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def products(hidden: Tensor, weight: Tensor, memory: list[Tensor], backward: bool) -> None:
    logits, grad_hidden, grad_weight = memory
    columns = logits.shape[1]
    for part in weight.split(columns):
        torch.mm(hidden, part.T, out=logits[:, : len(part)])
    if backward:
        for part, grad in zip(weight.split(columns), grad_weight.split(columns), strict=True):
            tile = torch.mm(hidden, part.T, out=logits[:, : len(part)])
            torch.mm(tile, part, out=grad_hidden)
            torch.mm(tile.T, hidden, out=grad)


class Case:
    """The inputs, and how each side runs on them."""

    def __init__(self, args: argparse.Namespace):
        self.device, dtype = torch.device(args.device), getattr(torch, args.dtype)
        torch.manual_seed(0)
        self.hidden = torch.randn(args.tokens, args.dim, device=self.device, dtype=dtype, requires_grad=True)
        self.weight = torch.empty(args.vocab, args.dim, device=self.device, dtype=dtype)
        self.weight.normal_(std=2 * args.dim**-0.5).requires_grad_()  # logits with a standard deviation of 2
        self.targets = torch.randint(args.vocab, (args.tokens,), device=self.device)
        columns = args.columns or tile_columns(args.tokens, dtype, self.device.type == "cuda")
        self.columns = min(columns, args.vocab)
        self.rows = max(1, args.tokens * self.columns // args.vocab)  # of `chunked`
        self.memory: list[Tensor] = []

    def function(self, side: str):
        if side == "products":
            with torch.no_grad():
                self.memory = [self.hidden.new_empty(len(self.hidden), self.columns),
                               torch.empty_like(self.hidden), torch.empty_like(self.weight)]
        if side == "compiled":
            return torch.compile(full)
        if side == "torch_ce":
            options = torch.nn.LinearCrossEntropyOptions()
            return lambda *inputs: (-F.linear_cross_entropy(*inputs, reduction="none", options=options),)
        if side == "liger":
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
            return lambda hidden, weight, targets: (-loss(weight, hidden, targets),)
        return {"nanosafe": lambda *inputs: token_logprob_entropy(*inputs, columns=self.columns),
                "chunked": lambda *inputs: chunked(*inputs, self.rows), "full": full, "products": None}[side]

    def run(self, function, backward: bool) -> None:
        if function is None:
            with torch.no_grad():
                products(self.hidden, self.weight, self.memory, backward)
        else:
            with torch.set_grad_enabled(backward):
                outputs = function(self.hidden, self.weight, self.targets)
                if backward:
                    sum(output.sum() for output in outputs).backward()
        self.hidden.grad = self.weight.grad = None

    def seconds(self, function, backward: bool) -> float:
        start = time.perf_counter()
        self.run(function, backward)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def status(key: str, file: str = "/proc/self/status") -> int:
    return 1024 * int(re.search(rf"{key}:\s*(\d+) kB", Path(file).read_text())[1])


def measure_peak(args: argparse.Namespace, side: str) -> int:
    """In a process of its own: bytes by which memory grows, at the most, in forward + backward."""
    if args.device == "cpu":
        import resource  # so that what does not fit fails here, instead of the machine running out of memory

        limit = status("VmSize") + status("MemAvailable", "/proc/meminfo")
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    case = Case(args)
    before = torch.cuda.memory_allocated() if args.device == "cuda" else status("VmRSS")
    function = case.function(side)
    case.run(function, backward=True)
    if args.device == "cpu":
        return status("VmHWM") - before
    torch.cuda.reset_peak_memory_stats()  # the first run also compiled, and allocated what cuBLAS works in
    case.run(function, backward=True)
    return torch.cuda.max_memory_allocated() - before


def peak_of(side: str) -> tuple[float | None, str]:
    """(GB, "") or (None, why not)."""
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--peak", side], capture_output=True, text=True)
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"])[-1]
    return round(int(done.stdout.split()[-1]) / 1e9, 3), ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="N: response tokens of a micro-batch")
    parser.add_argument("--dim", type=int, help="D: width of the hidden states")
    parser.add_argument("--vocab", type=int, help="V")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of hidden states and weight")
    parser.add_argument("--device", choices=tuple(DEFAULTS), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--columns", type=int, help="of the vocabulary in a tile; by default as in training")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--repeats", type=int, default=3, help="measured runs, after one that is not counted")
    parser.add_argument("--peak", help=argparse.SUPPRESS)  # the side whose peak memory this process measures
    args = parser.parse_args()
    for name, value in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.peak:
        return print(measure_peak(args, args.peak))

    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    case, rows, functions = Case(args), {}, {}
    for side in args.sides:
        peak, reason = peak_of(side)
        if reason:
            print(f"{side:9} left out: {reason}")
            continue
        rows[side], functions[side] = {"peak_gb": peak}, case.function(side)
    times = {(side, backward): [] for side in functions for backward in (False, True)}
    for repeat in range(args.repeats + 1):
        for (side, backward), measured in times.items():
            elapsed = case.seconds(functions[side], backward)
            if repeat:  # the first is a warm-up
                measured.append(elapsed)
    product = args.tokens * args.dim * args.vocab
    for side, row in rows.items():
        for name, backward, flop in (("forward", False, 2 * product), ("both", True, 6 * product)):
            runs = times[side, backward]
            median = statistics.median(runs)
            row |= {f"{name}_ms": round(1e3 * median, 2), f"{name}_tflops": round(flop / median / 1e12, 3),
                    f"{name}_range": [round(1e3 * f(runs), 2) for f in (min, max)]}
            if "products" in rows:
                row[f"{name}_to_products"] = round(median / statistics.median(times["products", backward]), 3)
        print(f"{side:9}", ", ".join(f"{key} {value}" for key, value in row.items()))
    half = case.weight.dtype != torch.float32
    logits = args.tokens * case.columns * (4 if args.device == "cuda" else case.weight.itemsize)
    bound = logits + case.hidden.nbytes + case.weight.nbytes + (4 * case.hidden.numel() if half else 0)
    result = {"benchmark": "head", "device": args.device, "dtype": args.dtype, "N": args.tokens, "D": args.dim,
              "V": args.vocab, "machine": torch.cuda.get_device_name() if args.device == "cuda" else cpu_name(),
              "threads": torch.get_num_threads(), "torch": torch.__version__, "repeats": args.repeats,
              "columns": case.columns, "peak_bound_gb": round(bound / 1e9, 3), **rows}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
