"""The plan of RL with the default recipe for six models on three machines, and with LoRA, as docs/plan.md.

    python benchmarks/plan.py                  # no GPU, no download: formulas of nanosafe/plan/__init__.py
    python benchmarks/plan.py --print          # leaves docs/plan.md as it is

Where the default flags do not fit, the settings with the fewest changes that do are shown. Prints one JSON line last.
"""

import json
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanosafe import plan
from nanosafe.plan import memory

MODELS = ("qwen3-8b", "r1-qwen-7b", "r1-llama-8b", "qwen3-32b", "granite-4.0-tiny", "llama-3.3-70b")
MACHINES = ((1, 80), (1, 141), (8, 80))
# With LoRA (docs/lora.md), and what it takes beside that to fit; and 70B on eight of the larger cards
MORE = (
    ("qwen3-8b", 1, 24, {"lora_rank": 32, "reward_model": "skywork-v2-qwen3-1.7b", "offload": True,
                         "tokens_per_microbatch": 4096, "max_response_tokens": 2048}),
    ("qwen3-8b", 1, 48, {"lora_rank": 32}),
    ("qwen3-8b", 1, 80, {"lora_rank": 32}),
    ("llama-3.3-70b", 8, 141, {}),
)  # fmt: skip
HEADER = ("model", "GPUs", "fits", "flags", "peak GB of usable", "KV pool: sequences", "hours", "GB per checkpoint")
ABOUT = """# What RL of each model needs

Made by `python benchmarks/plan.py` from the formulas of `nanosafe/plan`: **nothing here is measured**. REINFORCE++
with the default recipe (reward model skywork-v2-llama-8b, 500 steps of 128 prompts, responses up to 4,096 tokens) in
bfloat16; `train_rl.py --model MODEL --plan COUNTxGB` prints the same in full. Where the default flags do not fit, the
fewest changes that do are shown; --lora-rank, which trains adapters alone ([lora.md](lora.md)), is the last of them.

- GB are 10^9 bytes. A card sold as 80 (141) GB gives 78 (139) GiB, of which 3 % and 1 GB are taken off.
- The peak is that of tensors, the KV pool included, which takes 80 % of what is left. Sequences: how many of full
  length it holds at once on each GPU.
- Hours are an estimate. Assumed: prompts of 128 tokens, responses evenly spread up to the longest; 6 FLOP per parameter
  and token in the update, 8 where whole layers are recomputed (--recompute, by default the least that fits), 2 in each
  forward, at 40 % of 989 TFLOP/s; decoding at 60 % of 3.35 TB/s, on cards of 141 GB of 4.8 TB/s. Not counted:
  attention's FLOP, communication, optimizer, saving, evaluation.
- Measured peaks beside these: not measured on a GPU so far. `python benchmarks/gpu.py --only train rl rl8b` on a card
  measures both, and prints the plan's figure beside each.
"""


def row(model: str, count: int, card: int, given: dict) -> dict:
    """given: changes of the recipe."""
    machine, args = plan.Machine(count, plan.card_bytes(card)), plan.settings("rl", model, **given)
    fits = plan.make("rl", args, machine).fits
    found = list(plan.remedies("rl", args, machine))
    here = next((change for other, change in found if other == machine), None)
    if here is None:
        here = plan.first_that_fits("rl", args, machine, lora=True)
    args = Namespace(**vars(args) | (here or {}))
    made = plan.make("rl", args, machine)
    size = memory.sizes(plan.policy_config(args))
    out = {"model": model, "gpus": f"{count}x{card}", "fits": made.fits, "by_default": fits,
           "flags": here if here is None else given | here,
           "peak_gb": round(made.peak / 1e9, 1), "usable_gb": round(machine.usable / 1e9, 1),
           "sequences": made.blocks // made.table_width,
           "checkpoint_gb": round(memory.checkpoint_bytes(size, 2, args.low_memory) / 1e9)}
    instead = []
    for other, change in found:
        if other != machine:
            instead.append(f"{other.count}x{141 if other.bytes > 100e9 else card} {plan.as_flags(change)}")
    if made.fits:
        timed = machine.bytes >= plan.SMALLEST_TIMED
        out["hours"] = round(plan.hours("rl", args, machine, made), 1) if timed else None
        # LoRA where it is not asked for is a second choice.
        out["instead"] = instead if "lora_rank" in (here or {}) else []
    else:
        out["refused"], out["instead"] = made.refused, instead
    return out


def cells(r: dict) -> list[str]:
    """A row of the table."""
    peak, disk = f"{r['peak_gb']:.1f} of {r['usable_gb']:.1f}", str(r["checkpoint_gb"])
    if r["fits"]:
        flags = plan.as_flags(r["flags"]) if r["flags"] else "default"
        if r["instead"]:
            flags += "; all parameters: " + "; ".join(r["instead"])
        hours = f"{r['hours']:.0f}" if r["hours"] else "-"
        return [r["model"], r["gpus"], "yes", flags, peak, str(r["sequences"]), hours, disk]
    instead = "instead: " + "; ".join(r["instead"]) if r["instead"] else "nothing that was tried helps"
    why = "refused, a GPU without --rollout-shards must hold all weights to sample; " if r["refused"] else ""
    return [r["model"], r["gpus"], "**no**", why + instead, peak, "-", "-", disk]


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--print", action="store_true", help="do not write docs/plan.md")
    args = parser.parse_args()
    rows = [row(model, *machine, {}) for model in MODELS for machine in MACHINES]
    rows += [row(model, count, card, given) for model, count, card, given in MORE]
    lines = [ABOUT.rstrip(), "", f"| {' | '.join(HEADER)} |", "|" + "---|" * len(HEADER)]
    lines += [f"| {' | '.join(cells(r))} |" for r in rows]
    text = "\n".join([*lines, ""])
    print(text)
    if not args.print:
        path = Path(__file__).resolve().parents[1] / "docs" / "plan.md"
        path.write_text(text)
        print(f"wrote {path}")
    print(json.dumps({"benchmark": "plan", "rows": rows}))


if __name__ == "__main__":
    main()
