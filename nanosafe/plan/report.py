"""What --plan prints: plan.py's numbers as a table and sentences."""

from argparse import Namespace

import torch

from nanosafe.model.attention import KVCache
from nanosafe.model.config import tiny_seed
from nanosafe.plan import (
    BLOCK,
    COMPUTE_SHARE,
    MEMORY_SHARE,
    PEAK_FLOPS,
    PROMPT_TOKENS,
    SFT_ROWS,
    SFT_TOKENS,
    Machine,
    Plan,
    bandwidth,
    bytes_of,
    checkpoint_bytes,
    download_bytes,
    find_config,
    find_machine,
    gb,
    hours,
    make,
    remedies,
    seconds_per_step,
    sizes,
    steps_of,
)  # fmt: skip


def as_flags(change: dict) -> str:
    return " ".join(f"--{k.replace('_', '-')}" + (f" {v}" if not isinstance(v, bool) else "")
                    for k, v in change.items() if v is not False) or "the given flags"  # fmt: skip


def table(plan: Plan) -> list[str]:
    """Parts in rows, phases in columns."""
    parts = list(dict.fromkeys(part for phase in plan.phases.values() for part in phase))
    parts = [part for part in parts if any(phase.get(part) for phase in plan.phases.values())]
    cells = [["GB on each", *plan.phases]]
    cells += [[part, *(gb(p[part]) if p.get(part) else "" for p in plan.phases.values())] for part in parts]
    cells += [["sum", *map(gb, plan.totals.values())]]
    return ["".join([f"  {row[0]:<18}", *(f"{cell:>11}" for cell in row[1:])]) for row in cells]


def report(script: str, args: Namespace) -> str:
    """What --plan prints."""
    machine = find_machine(args.plan, args.device, tiny_seed(args.model) is not None)
    args = Namespace(**vars(args) | {"dtype": args.dtype or ("bfloat16" if machine.kind == "cuda" else "float32")})
    config, origin = find_config(args.model)
    plan, size, s = make(script, args, machine), sizes(config), bytes_of(args)
    lines = [f"plan of train_{script}.py --model {args.model} in {args.dtype} on {machine} "
             f"({gb(machine.usable)} for tensors); GB are 10^9 bytes",
             f"  {args.model}: {size.total:,} parameters" + f", {size.active:,} of them active for each token" *
             (size.active < size.total) + f" (shape: {origin})"]
    models = {args.model: config}
    if script == "rl" and not args.reward_model.startswith("rule:"):
        models[args.reward_model], origin = find_config(args.reward_model)
        lines.append(f"  {args.reward_model}: {sizes(models[args.reward_model]).total:,} parameters (shape: {origin})")
    lines += table(plan)
    if script == "rl":
        positions = plan.blocks * (BLOCK if machine.kind == "cuda" else 1)
        longest = args.max_prompt_tokens + args.max_response_tokens
        lines.append(f"  KV pool: {positions if machine.kind == 'cuda' else positions * longest:,} tokens, "
                     f"{plan.blocks // plan.table_width} sequences of the full {longest} at once"
                     f" ({KVCache.bytes_per_position(config, getattr(torch, args.dtype)):,} bytes a token)")
        if slot := KVCache.bytes_per_slot(config, getattr(torch, args.dtype)):
            lines.append(f"  states of the Mamba layers: {slot / 1e6:.1f} MB a sequence, however long, for at most "
                         f"{int(plan.phases['rollout']['states'] // slot) - 1} sequences at once")
    lines.append(f"  expected peak: {gb(plan.peak)} GB of tensors on each of {gb(machine.usable)} "
                 f"(CUDA's context and fragments are taken off)" if machine.kind == "cuda" else
                 f"  expected peak: {gb(plan.peak)} GB of tensors in each process")
    lines.append(f"  IT FITS: {'yes' if plan.fits else 'NO'}")
    if plan.refused:
        lines.append(f"  {plan.refused}")
    if not plan.fits:
        found = list(remedies(script, args, machine))
        for other, change in found:
            changed = Namespace(**vars(args) | change)
            time = hours(script, changed, other, make(script, changed, other))
            lines.append(f"  it fits on {other} with {as_flags(change)}, in about {time:.0f} h")
        lines += ["  no setting that was tried makes it fit (up to 64 GPUs, and cards of 141 GB)"] * (not found)
    one = checkpoint_bytes(size, s, args.low_memory)
    lines.append(f"  disk: {gb(one)} GB per checkpoint, up to {gb((args.keep + 1) * one + s * size.total)} GB with "
                 f"--keep {args.keep}, one being written, and final/")
    sources = [f"{name} {gb(download_bytes(name, c))} GB" for name, c in models.items() if download_bytes(name, c)]
    lines.append(f"  downloads: {', '.join(sources) or 'no model'}" + "; data sets are small" * bool(sources))
    return "\n".join(lines + time_lines(script, args, machine, plan))


def time_lines(script: str, args: Namespace, machine: Machine, plan: Plan) -> list[str]:
    if machine.kind != "cuda":
        return ["  hours: no estimate for a CPU"]
    if not plan.fits:
        return []
    seconds, steps = seconds_per_step(script, args, machine, plan), steps_of(script, args)
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    lengths = f"{SFT_ROWS} rows of {SFT_TOKENS} tokens" if script == "sft" else (
        f"prompts of {PROMPT_TOKENS} tokens, responses evenly spread up to {args.max_response_tokens}, decoding at "
        f"{MEMORY_SHARE:.0%} of {bandwidth(machine) / 1e12:g} TB/s")
    return [
        f"  hours: about {hours(script, args, machine, plan):.1f} for {steps} steps of {sum(seconds.values()):.1f} s "
        f"({parts}): an estimate, not measured",
        f"    assumed: {lengths}; {6 if args.no_recompute else 8} FLOP per parameter and token in the update, 2 in "
        f"each forward, at {COMPUTE_SHARE:.0%} of {PEAK_FLOPS / 1e12:.0f} TFLOP/s",
        "    not counted: attention's FLOP, communication, optimizer, saving, evaluation",
    ]
