"""What --plan prints: the table of bytes, whether the run fits, what helps if not, hours, disk and downloads."""

from argparse import Namespace

import torch

from nanosafe.io.machine import MAIN_RANK
from nanosafe.model.attention import KVCache
from nanosafe.names import tiny_seed
from nanosafe.plan import (
    COMPUTE_SHARE,
    LARGE_CARD,
    MEMORY_SHARE,
    MOST_GPUS,
    SMALLEST_TIMED,
    Plan,
    as_flags,
    bytes_of,
    first_that_fits,
    hours,
    make,
    memory,
    remedies,
    reward_models,
    seconds_per_step,
    steps_of,
)
from nanosafe.plan.machine import Machine, download_bytes, find_config, find_machine, gb, policy_config
from nanosafe.sampler.spread import part_config


def show_plan(script: str, args: Namespace) -> None:
    """Print what train_rl.py or train_sft.py ("rl", "sft") with flags `args` needs, on the main rank."""
    if MAIN_RANK:
        print(report(script, args), flush=True)


def report(script: str, args: Namespace) -> str:
    machine = find_machine(args.plan, args.device, tiny_seed(args.model) is not None)
    dtype = args.dtype or ("bfloat16" if machine.kind == "cuda" else "float32")
    args = Namespace(**vars(args) | {"dtype": dtype})
    plan, s = make(script, args, machine), bytes_of(args)
    models = [args.model]
    if script == "rl":
        models += reward_models(args)
    lines = [f"plan of train_{script}.py --model {args.model} in {dtype} on {machine} "
             f"({gb(machine.usable)} of {gb(machine.bytes)} GB for tensors; GB are 10^9 bytes)"]
    downloads = []
    for name in models:
        config, origin = find_config(name)
        size = memory.sizes(config)
        active = f", {size.active:,} of them active for each token" if size.active < size.total else ""
        lines.append(f"  {name}: {size.total:,} parameters{active} (shape: {origin})")
        if download_bytes(name, config):
            downloads.append(f"{name} {gb(download_bytes(name, config))} GB")
    lines += table(plan)
    if script == "rl":
        lines += cache_lines(args, plan)
        if args.offload and machine.kind == "cuda":
            lines.append(offload_line(args, machine))
    lines.append(f"  expected peak: {gb(plan.peak)} GB of tensors on each of {gb(machine.usable)}, "
                 f"with --recompute {plan.recompute}")
    lines.append(f"  IT FITS: {'yes' if plan.fits else 'NO'}")
    if plan.refused:
        lines.append(f"  {plan.refused}")
    if plan.fits:
        lines.append(time_line(script, args, machine, plan))
    else:
        found = list(remedies(script, args, machine))
        lora = None if args.lora_rank else first_that_fits(script, args, machine, lora=True)
        if lora:
            found.append((machine, lora))
        cures = [f"  it fits on {other} with {as_flags(change)}" for other, change in found]
        lines += cures or [f"  no setting that was tried makes it fit (up to {MOST_GPUS} GPUs, and "
                           "cards of 141 GB)"]
    size = memory.sizes(policy_config(args))
    one = memory.checkpoint_bytes(size, s, args.low_memory)
    lines.append(f"  disk: {gb(one)} GB per checkpoint, up to "
                 f"{gb((args.keep + 1) * one + s * size.total)} GB with --keep {args.keep}, one "
                 "being written, and final/")
    lines.append(f"  downloads: {', '.join(downloads) or 'no model'}; data sets are small")
    return "\n".join(lines)


def table(plan: Plan) -> list[str]:
    """Parts in rows, phases in columns."""
    parts = []
    for phase in plan.phases.values():
        parts += [part for part, nbytes in phase.items() if nbytes and part not in parts]
    rows = [["GB on each", *plan.phases]]
    for part in parts:
        rows.append([part, *(gb(phase[part]) if phase.get(part) else "" for phase in plan.phases.values())])
    rows.append(["sum", *map(gb, plan.totals.values())])
    lines = []
    for name, *cells in rows:
        lines.append(f"  {name:<18}" + "".join(f"{cell:>11}" for cell in cells))
    return lines


def cache_lines(args: Namespace, plan: Plan) -> list[str]:
    """How much the engine's cache holds."""
    config, dtype = find_config(args.model)[0], getattr(torch, args.dtype)
    config = part_config(config, args.rollout_shards)
    longest = args.max_prompt_tokens + args.max_response_tokens
    positions = plan.blocks * (memory.runner_of(plan.machine.kind).block_size or longest)
    each = KVCache.bytes_per_position(config, dtype)
    lines = [f"  KV pool: {positions:,} tokens, {plan.blocks // plan.table_width} sequences of the "
             f"full {longest} at once ({each:,} bytes a token)"]
    slot = KVCache.bytes_per_slot(config, dtype)
    if slot:
        sequences = int(plan.phases["rollout"]["states"] // slot) - 1
        lines.append(f"  states of the Mamba layers: {slot / 1e6:.1f} MB a sequence, however long, "
                     f"for at most {sequences} sequences at once")
    return lines


def offload_line(args: Namespace, machine: Machine) -> str:
    names = reward_models(args)
    if args.kl_coef and not args.lora_rank:
        names.append(args.model)
    each = bytes_of(args) * sum(memory.sizes(find_config(name)[0]).total for name in names)
    line = f"  --offload: {gb(each)} GB of models in the memory of the host"
    return line + (f" for each process, {gb(each * machine.count)} for all" if machine.count > 1 else "")


def time_line(script: str, args: Namespace, machine: Machine, plan: Plan) -> str:
    if machine.kind != "cuda" or machine.bytes < SMALLEST_TIMED:
        return "  time: no estimate for a CPU, or for a card that is smaller than an H100"
    seconds = seconds_per_step(script, args, machine, plan)
    parts = ", ".join(f"{name} {value:.2g}" for name, value in seconds.items())
    card = "H200" if machine.bytes > LARGE_CARD else "H100"
    total = duration(3600 * hours(script, args, machine, plan))
    return (f"  time: about {total} for {steps_of(args)} steps of {sum(seconds.values()):.2g} s "
            f"({parts}), if each card is an {card}: an estimate at {COMPUTE_SHARE:.0%} of its peak FLOP/s "
            f"and {MEMORY_SHARE:.0%} of its bandwidth, not measured; docs/plan.md says what is assumed")


def duration(seconds: float) -> str:
    """In the unit in which it is a number that one can picture."""
    if seconds < 120:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
