"""Time and memory from the start of Python to the first logits of a 1.2 GB model, beside transformers.

Each measurement is a fresh process that imports, loads a folder with the shape of Qwen3-0.6B (random bf16 weights, tied
head) and runs a prompt of 16 tokens. The two alternate, with the files in the page cache. CPU seconds (all threads)
tell more than elapsed ones on a machine that does other work. Linux only (peak memory from /proc); run it as
`python benchmarks/load.py`. The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIG = dict(
    architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072,
    num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
    rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True, attention_bias=False, torch_dtype="bfloat16",
    bos_token_id=151643, eos_token_id=151645, hidden_act="silu",
)  # fmt: skip
PROMPT = list(range(1000, 1016))


def write_model(folder: Path) -> None:
    import torch

    from nanosafe.model.config import ModelConfig
    from nanosafe.model.decoder import Decoder
    from nanosafe.model.weights import save_model

    with torch.device("meta"):
        model = Decoder(ModelConfig.from_dict(CONFIG))
    model.to(torch.bfloat16).to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=0.02)
    save_model(model, folder)


def measure(peer: str, folder: Path) -> None:
    """One run, in its own process: prints the clock after each phase, the peak memory and the predicted token."""
    import torch

    if peer == "nanosafe":
        from nanosafe.names import load_model

        imported = time.monotonic()
        model = load_model(folder)
    else:
        from transformers import AutoModelForCausalLM

        imported = time.monotonic()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    loaded = time.monotonic()
    with torch.inference_mode():
        output = model(torch.tensor([PROMPT]))
        logits = output if peer == "nanosafe" else output.logits
        token = int(logits[0, -1].argmax())
    done = time.monotonic()
    # VmHWM, since getrusage's maximum is inherited from the parent process
    peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
    result = dict(imported=imported, loaded=loaded, done=done, cpu=time.process_time(), peak=peak, token=token)
    print(json.dumps(result))


def spawn(peer: str, folder: Path) -> dict[str, float]:
    started = time.monotonic()
    command = [sys.executable, str(Path(__file__).resolve()), "--run", peer, "--folder", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
    run = json.loads(out.splitlines()[-1])
    return dict(
        seconds=run["done"] - started,
        cpu_seconds=run["cpu"],
        import_seconds=run["imported"] - started,
        load_seconds=run["loaded"] - run["imported"],
        forward_seconds=run["done"] - run["loaded"],
        peak_gb=run["peak"] / 1e9,
        token=run["token"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="measured runs of each, after one that is not counted")
    parser.add_argument(
        "--folder", type=Path, help="a model folder to load (default: write a random one, delete it after)"
    )
    parser.add_argument(
        "--run", choices=["nanosafe", "transformers"], help="measure one run in this process and print it"
    )
    args = parser.parse_args()
    if args.run:
        return measure(args.run, args.folder)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not args.folder:
            sys.path.insert(0, str(ROOT))
            write_model(folder)
        runs = {"nanosafe": [], "transformers": []}
        for _ in range(args.repeats + 1):
            for peer, results in runs.items():
                results.append(spawn(peer, folder))
    tokens = {run["token"] for results in runs.values() for run in results}
    summary = {
        peer: {
            key: round(statistics.median(run[key] for run in results[1:]), 3) for key in results[0] if key != "token"
        }
        for peer, results in runs.items()
    }
    print(f"{'median of ' + str(args.repeats):16}" + "".join(f"{key:>17}" for key in summary["nanosafe"]))
    for peer, row in summary.items():
        print(f"{peer:16}" + "".join(f"{value:17.3f}" for value in row.values()))
    ratios = {
        key: round(summary["transformers"][key] / summary["nanosafe"][key], 2)
        for key in ("seconds", "cpu_seconds", "peak_gb")
    }
    print(json.dumps({"benchmark": "load", **summary, "transformers/nanosafe": ratios, "same_token": len(tokens) == 1}))


if __name__ == "__main__":
    main()
