"""Sampling speed beside transformers' generate, alternating in one process, on random weights of a true shape.

Workloads: `ragged`, N requests whose prompts and outputs have uniform random lengths in a range (transformers gets them
as one padded batch, and only the tokens asked for count), and `fixed-B`, B equal requests. Decode speed is that of
a run less that of its prefill. The last line is one JSON object.

    python benchmarks/sampler.py                                  # a 1M-parameter Qwen3 folder, 256 ragged requests
    python benchmarks/sampler.py --shape qwen3-0.6b --ragged 32 --lengths 16 128 --fixed 1 16
"""

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

from nanosafe import SamplingParams, generate, load_model, save_model
from nanosafe.config import ModelConfig
from nanosafe.model import Decoder

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


def write_model(folder: Path, shape: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Decoder(ModelConfig.from_dict(SHAPES[shape])).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02)
    save_model(model, folder)


def ours(model, prompts: list[list[int]], lengths: list[int]) -> None:
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True, seed=i) for i, n in enumerate(lengths)]
    generate(model, prompts, params, max_batch=len(prompts))


def theirs(model, prompts: list[list[int]], lengths: list[int], cache: str) -> None:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    model.generate(ids, attention_mask=mask, max_new_tokens=max(lengths), min_new_tokens=max(lengths), do_sample=True,
                   top_k=0, top_p=1.0, temperature=1.0, cache_implementation=cache, pad_token_id=0)


def seconds(run, device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--ragged", type=int, default=256, help="requests of the ragged workload; 0 leaves it out")
    parser.add_argument("--lengths", type=int, nargs=2, default=(16, 128), help="range of prompt and of output lengths")
    parser.add_argument("--fixed", type=int, nargs="*", default=[], help="batch sizes, prompts of 64 and 48 new tokens")
    parser.add_argument("--caches", nargs="+", default=["dynamic", "static"], help="of transformers; its best counts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    import transformers

    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), args.shape, dtype)
        model = load_model(folder, device=device, dtype=dtype)
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    generator = random.Random(0)

    def draw() -> int:
        return generator.randint(*args.lengths)

    def prompt(length: int) -> list[int]:
        return [generator.randrange(3, model.config.vocab_size) for _ in range(length)]

    workloads = {f"fixed-{B}": ([prompt(64) for _ in range(B)], [48] * B) for B in args.fixed}
    if args.ragged:
        workloads["ragged"] = ([prompt(draw()) for _ in range(args.ragged)], [draw() for _ in range(args.ragged)])
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    result = {"benchmark": "sampler", "shape": args.shape, "dtype": args.dtype, "device": args.device,
              "machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
              "torch": torch.__version__, "transformers": transformers.__version__, "weight_bytes": weight_bytes,
              "repeats": args.repeats}
    if device.type == "cuda":
        result["machine"] = torch.cuda.get_device_name(device)
    for name, (prompts, lengths) in workloads.items():
        runs = {"nanosafe": lambda p=prompts, n=lengths: ours(model, p, n),
                "nanosafe prefill": lambda p=prompts: ours(model, p, [1] * len(p))}
        for cache in args.caches:
            runs[f"transformers {cache}"] = lambda p=prompts, n=lengths, c=cache: theirs(peer, p, n, c)
            runs[f"transformers {cache} prefill"] = lambda p=prompts, c=cache: theirs(peer, p, [1] * len(p), c)
        times = {run: [] for run in runs}
        for repeat in range(args.repeats + 1):
            for run, function in runs.items():
                elapsed = seconds(function, device)
                if repeat:  # the first is a warm-up
                    times[run].append(elapsed)
        median = {run: statistics.median(values) for run, values in times.items()}
        tokens = sum(lengths)
        row = {run: {"seconds": round(value, 3), "range": [round(f(times[run]), 3) for f in (min, max)]}
               for run, value in median.items()}
        for run in [run for run in runs if not run.endswith("prefill")]:
            row[run]["tokens_per_s"] = round(tokens / median[run], 1)
            decode = (tokens - len(lengths)) / (median[run] - median[f"{run} prefill"])
            row[run]["decode_tokens_per_s"] = round(decode, 1)
            print(f"{name:10} {run:22} {row[run]['tokens_per_s']:10.1f} tokens/s, "
                  f"decode {row[run]['decode_tokens_per_s']:10.1f} tokens/s")
        peers = [run for run in row if run.startswith("transformers") and not run.endswith("prefill")]
        for key in ("tokens_per_s", "decode_tokens_per_s"):
            row[f"ratio_{key}"] = round(row["nanosafe"][key] / max(row[run][key] for run in peers), 2)
        print(f"{name:10} ratio to transformers' best {row['ratio_tokens_per_s']}, "
              f"decode {row['ratio_decode_tokens_per_s']}")
        result[name] = row
    print(json.dumps(result))


if __name__ == "__main__":
    main()
