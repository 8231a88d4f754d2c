"""--plan: what a training run will need, said before anything is downloaded.

For each phase of a step, the bytes that each GPU holds, part by part (memory.py); from them whether the run fits and,
if not, which settings help, found by trying them. Also downloads, disk and an estimate of hours. Nothing is measured
here; a run on a GPU can set its own peak (memory/peak_gb) beside these.

GB are 10^9 bytes. A card sold as 80 or 141 GB has that many GiB less what its driver keeps: see `card_bytes`.
"""

import math
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import torch

from nanosafe.model.activations import forward_bytes
from nanosafe.model.attention import KVCache
from nanosafe.model.recompute import RECOMPUTE
from nanosafe.names import recipe
from nanosafe.parallel import Ranks
from nanosafe.plan import memory
from nanosafe.plan.machine import Machine, card_bytes, find_config, gb, policy_config
from nanosafe.sampler.spread import check_spread, part_config
from nanosafe.text.data import sft_steps
from nanosafe.train.cli import check_parallel
from nanosafe.train.own_reward import is_function
from nanosafe.train.weighted_reward import reward_specs

SCORED_TOKENS = 16384  # of a micro-batch of the reward model, RewardModel.score's default
MOST_GPUS = 64  # that are tried
LORA_RANK = 32  # that is tried
# Of hours: bf16 FLOP/s (H100 and H200 have the same cores) and bytes/s by data sheet; CPU to GPU, for --offload.
PEAK_FLOPS, BANDWIDTH, LARGE_BANDWIDTH, LINK = 989e12, 3.35e12, 4.8e12, 25e9
SMALLEST_TIMED, LARGE_CARD = 75e9, 100e9  # bytes of memory from which a card is taken for an H100, and for an H200
# Assumed: what training reaches of the one, decoding of the other
COMPUTE_SHARE, MEMORY_SHARE = 0.4, 0.6
# Activations are kept instead of recomputed only up to this share of the memory: no GPU has confirmed the counts.
UPDATE_SHARE = 0.85
# Assumed mean prompt; STAR-1's rows; assumed tokens of each
PROMPT_TOKENS, SFT_ROWS, SFT_TOKENS = 128, 1000, 1000


class Plan(NamedTuple):
    # Phase -> part -> bytes on each GPU; "step" is the optimizer's
    phases: dict[str, dict[str, float]]
    machine: Machine
    blocks: int  # of the KV pool
    table_width: int  # blocks of the longest sequence
    refused: str | None  # why no setting can help
    recompute: str  # of RECOMPUTE: the flag or, without one, what was chosen

    @property
    def totals(self) -> dict[str, float]:
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def peak(self) -> float:
        """Bytes of tensors at the worst moment: what torch.cuda.max_memory_allocated should come to."""
        return max(self.totals.values())

    @property
    def fits(self) -> bool:
        return not self.refused and self.peak <= self.machine.usable and self.blocks >= self.table_width


def choose_recompute(script: str, args: Namespace, ranks: Ranks) -> str:
    """--recompute or, where it was not given, what the plan chooses for these ranks: the same on all."""
    if args.recompute is not None:
        return args.recompute
    if ranks.device.type == "cpu":
        return RECOMPUTE[0]
    smallest = min(ranks.gather([torch.cuda.get_device_properties(ranks.device).total_memory]))
    plan = make(script, args, Machine(ranks.world, smallest))
    ranks.print(f"from the plan: recompute {plan.recompute} (an update should need "
                f"{gb(plan.totals['update'])} of {gb(plan.machine.usable)} GB on each GPU)")
    return plan.recompute


# The plan.


def settings(script: str, model: str, **changes) -> Namespace:
    """Flags of train_rl.py or train_sft.py ("rl", "sft") that are read here, as the recipe has them, with `changes`."""
    flags = dict(model=model, dtype="bfloat16", low_memory=False, offload=False, recompute=None, keep=2,
                 steps=None, lora_rank=None, rollout_shards=1, shard_frozen=False)
    return Namespace(**flags | recipe(script, model) | changes)


def make(script: str, args: Namespace, machine: Machine) -> Plan:
    """The plan of train_rl.py or train_sft.py with flags `args` on `machine`. Raises what find_config raises.

    Without --recompute it has the fastest setting with which an update fits, on a CPU always the fastest.
    """
    if args.recompute is None:
        for recompute in RECOMPUTE:
            plan = make(script, Namespace(**vars(args) | {"recompute": recompute}), machine)
            if machine.kind == "cpu" or plan.totals["update"] <= UPDATE_SHARE * machine.usable:
                break
        return plan
    config = policy_config(args)
    size, world, s = memory.sizes(config), machine.count, bytes_of(args)
    if args.low_memory and s != 2:
        raise ValueError("--low-memory splits bfloat16 weights: add --dtype bfloat16, or leave it out")
    state = memory.training_state(size, s, world, args.low_memory)
    state_and_gradients = state | {"gradients": memory.gradients(size, world)}
    longest = args.max_tokens if script == "sft" else args.max_prompt_tokens + args.max_response_tokens
    tokens = max(args.tokens_per_microbatch, longest)  # a longer document goes alone
    update = state_and_gradients | {
        "shard buffers": memory.sharding_buffers(size, s, world, training=True),
        "activations": memory.training_activations(config, size, s, tokens, args.recompute, world),
    }
    step = state_and_gradients | {
        "optimizer": memory.optimizer_workspace(size, args.low_memory, machine.kind)
    }
    if script == "sft":
        return Plan({"update": update, "step": step}, machine, blocks=0, table_width=0,
                    refused=None, recompute=args.recompute)

    check_parallel(args, world)
    shards = args.rollout_shards
    check_spread(config, shards, args.model)
    part = part_config(config, shards)  # what a rank has of a model that samples
    rows = math.ceil(args.prompts_per_step * args.samples_per_prompt * shards / world)
    working = memory.engine_working(part, s, rows, longest, machine.kind)
    gathered = memory.rollout_weights(config, s, world, shards)
    phases = {
        "rollout": state | {"gathered weights": gathered, "activations": working},
        "reward": state | {"activations": 0},
        "log-probs": state | {
            "shard buffers": memory.sharding_buffers(size, s, world, training=False),
            "activations": tokens * forward_bytes(config, s) + memory.head_tile(config, s, tokens),
        },
        "update": update,
        "step": step,
    }  # fmt: skip
    frozen = memory.Frozen(s, world, args.offload, args.shard_frozen)
    if args.kl_coef and not args.lora_rank:  # LoRA's reference is the policy without its adapters.
        frozen.add(phases, "reference", size, "log-probs")
    for name in reward_models(args):
        judge, _ = find_config(name)
        frozen.add(phases, "reward model", memory.sizes(judge), "reward")
        activations = max(SCORED_TOKENS, longest) * forward_bytes(judge, s)
        phases["reward"]["activations"] = max(phases["reward"]["activations"], activations)

    free = machine.usable - sum(phases["rollout"].values())
    cache = memory.engine_cache(part, s, free, rows, longest, machine.kind)
    blocks, width, block = max(0, cache.blocks), cache.table_width, memory.block_bytes(part, s, cache)
    # The least that it needs; one more is scratch
    phases["rollout"]["KV pool"] = (max(blocks, width) + 1) * block
    phases["rollout"]["states"] = memory.state_bytes(config, s, cache.max_batch)
    refused = None
    # However many GPUs there are, a rollout has all weights on each, or on each group's.
    least = (gathered or s * size.total) + working + (width + 1) * block
    least += 2 * KVCache.bytes_per_slot(config, memory.compute_type(s))
    if least > machine.usable:
        spread = "" if shards == 1 else f" over {shards}"
        refused = (f"refused: sampling needs all weights{spread} on one GPU "
                   f"({gb(gathered or s * size.total)} GB in --dtype, {gb(least)} with one sequence), each has "
                   f"{gb(machine.usable)}: a larger card, a smaller model or more --rollout-shards helps")
    return Plan(phases, machine, blocks, width, refused, args.recompute)


def reward_models(args: Namespace) -> list[str]:
    """Those of --reward-model that are models."""
    specs = reward_specs(args.reward_model)
    return [spec for spec in specs if not (spec.startswith("rule:") or is_function(spec))]


def bytes_of(args: Namespace) -> int:
    return getattr(torch, args.dtype).itemsize


def remedies(script: str, args: Namespace, machine: Machine) -> Iterator[tuple[Machine, dict]]:
    """Settings under which the run fits: on this machine, on more such GPUs, on GPUs of 141 GB; each with the first
    change that helps."""
    change = first_that_fits(script, args, machine)
    if change is not None:
        yield machine, change
    if machine.kind != "cuda":
        return
    larger = [(2 * machine.count, machine.bytes)]  # number of GPUs to begin with, bytes of each
    if machine.bytes < card_bytes(141):
        larger.append((machine.count, card_bytes(141)))
    for count, nbytes in larger:
        while count <= MOST_GPUS:
            other = Machine(count, nbytes)
            change = first_that_fits(script, args, other)
            if change is not None:
                yield other, change
                break
            count *= 2


def first_that_fits(script: str, args: Namespace, machine: Machine, lora: bool = False) -> dict | None:
    """The change of settings that does the least harm (none, slower, other results) and makes the run fit; lora: one
    with adapters, which train instead of all weights."""
    tries = [{}]
    if script == "rl":
        tries.append({"offload": True, "shard_frozen": False})
    if args.dtype == "bfloat16":
        tries += [change | {"low_memory": True} for change in tries]
    else:
        tries = [change | {"low_memory": False} for change in tries]
    half = {"tokens_per_microbatch": args.tokens_per_microbatch // 2}
    tries.append(tries[-1] | half)
    if script == "rl" and machine.count > 1:
        tries += spread_tries(args, machine)
    if lora:
        tries = [change | {"lora_rank": args.lora_rank or LORA_RANK, "low_memory": False} for change in tries]
    for change in tries:
        if make(script, Namespace(**vars(args) | change), machine).fits:
            return {name: value for name, value in change.items() if getattr(args, name) != value}
    return None


def spread_tries(args: Namespace, machine: Machine) -> Iterator[dict]:
    """--shard-frozen, and with it as few --rollout-shards as help; then with --low-memory, last with smaller
    micro-batches.
    """
    low, most = args.dtype == "bfloat16", args.tokens_per_microbatch
    for low_memory, tokens in ((False, most), (low, most), (low, most // 2)):
        others = dict(low_memory=low_memory, offload=False)
        for shards in (1, 2, 4, 8):
            with suppress(ValueError):  # what does not divide heads or GPUs
                check_spread(find_config(args.model)[0], shards, args.model)
                change = dict(rollout_shards=shards, shard_frozen=True, tokens_per_microbatch=tokens)
                check_parallel(Namespace(**vars(args) | others | change), machine.count)
                yield others | change


def as_flags(change: dict) -> str:
    """The change of settings as it is typed."""
    flags = []
    for name, value in change.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            flags.append(flag)
        elif value is not False:
            flags.append(f"{flag} {value}")
    return " ".join(flags) or "the given flags"


# Time.


def seconds_per_step(script: str, args: Namespace, machine: Machine, plan: Plan) -> dict[str, float]:
    """Estimated seconds of each phase: FLOP at COMPUTE_SHARE of the peak, decoding by bytes at MEMORY_SHARE of the
    bandwidth. Not counted: attention's FLOP, communication, optimizer, saving, evaluation."""
    config = policy_config(args)
    size, s = memory.sizes(config), bytes_of(args)
    flops = PEAK_FLOPS * COMPUTE_SHARE * machine.count
    # Per parameter and token: forward 2, backward 4, forward again 2
    training = 8 if plan.recompute == "layer" else 6
    if args.lora_rank:  # no gradients of frozen weights
        training -= 2
    if script == "sft":
        return {"update": training * size.active * args.batch_size * SFT_TOKENS / flops}
    rows = args.prompts_per_step * args.samples_per_prompt
    prompt, mean = min(PROMPT_TOKENS, args.max_prompt_tokens), args.max_response_tokens / 2
    tokens = rows * (prompt + mean)
    # Lengths are taken as uniform in (0, max]: rows that all fit together decode as long as the longest does, max
    # steps; others enter as rows leave, rows * mean / batch steps and a tail of mean.
    shards = args.rollout_shards
    part = part_config(config, shards)
    rows = math.ceil(rows * shards / machine.count)
    runner = memory.runner_of("cuda")
    # Sequences of mean length in the pool
    capacity = max(1, plan.blocks * runner.block_size // math.ceil(prompt + mean))
    steps = mean * (1 + max(1, rows / min(rows, runner.max_batch, capacity)))
    position = KVCache.bytes_per_position(part, memory.compute_type(s))
    slot = KVCache.bytes_per_slot(config, memory.compute_type(s))
    # A sequence of length n reads n * prompt + n^2 / 2 positions; the mean of n^2 is max^2 / 3.
    cache = rows * position * (mean * prompt + args.max_response_tokens**2 / 6)
    states = rows * mean * 2 * slot  # they are read and written
    # An embedding that is not the head too is only looked up: a few rows are read.
    weights = s * (size.total if config.tie_word_embeddings else size.total - size.head) / shards
    # H200's from 100 GB on, else H100's
    bandwidth = LARGE_BANDWIDTH if machine.bytes > LARGE_CARD else BANDWIDTH
    decoding = (steps * weights + cache + states) / (MEMORY_SHARE * bandwidth)
    seconds = {
        "rollout": decoding + 2 * size.active * tokens / flops,
        "reward": 0.0,
        "log-probs": 2 * size.active * tokens / flops,
        "update": training * size.active * tokens * args.epochs / flops,
    }
    if args.kl_coef:
        seconds["log-probs"] *= 2
        seconds["log-probs"] += s * size.total / LINK if args.offload and not args.lora_rank else 0
    for name in reward_models(args):
        judge = memory.sizes(find_config(name)[0]).total  # no reward model has experts
        seconds["reward"] += 2 * judge * tokens / flops + (s * judge / LINK if args.offload else 0)
    return seconds


def hours(script: str, args: Namespace, machine: Machine, plan: Plan) -> float:
    return sum(seconds_per_step(script, args, machine, plan).values()) * steps_of(args) / 3600


def steps_of(args: Namespace) -> int:
    return args.steps or sft_steps(args.epochs, SFT_ROWS, args.batch_size)
