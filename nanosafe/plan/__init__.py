"""--plan: what a training run will need, said before anything is downloaded.

For each phase of a step, the bytes that each GPU holds, part by part; from them whether the run fits and, if not, which
settings help, found by trying them. Also downloads, disk and an estimate of hours. Every number is a formula of the
model's config, the flags and the number of GPUs; nothing is measured here. A run on a GPU can set its own peak
(memory/peak_gb) beside these. plan_report.py puts them into words.

GB are 10^9 bytes. A card sold as 80 or 141 GB has so many GiB less what its driver keeps: see `card_bytes`.
"""

import math
import os
import re
from argparse import Namespace
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from nanosafe.io.hub import find_checkpoint, hub_errors_explained
from nanosafe.io.machine import MAIN_RANK, host_memory
from nanosafe.kernels.logprob import CHUNK_BYTES
from nanosafe.kernels.split_adam import CHUNK
from nanosafe.model.attention import KVCache
from nanosafe.model.config import ModelConfig
from nanosafe.model.decoder import Decoder
from nanosafe.model.granite import Experts
from nanosafe.names import recipe, tiny_seed
from nanosafe.plan.shapes import SHAPES
from nanosafe.recipes import ALIASES
from nanosafe.sampler.engine import default_prefill_tokens
from nanosafe.text.data import sft_steps
from nanosafe.tiny import build

GIB = 1 << 30
# Of a GPU's memory, what torch's allocator never gets (CUDA context, libraries, NCCL) and what it loses to fragments.
CONTEXT, FRAGMENTS = 1e9, 0.03
SCORED_TOKENS = 16384  # of a micro-batch of the reward model, RewardModel.score's default
# engine.Engine's own settings: share of free memory for the cache, and rows; on CUDA positions per block.
POOL_SHARE, ROWS, BLOCK = {"cuda": 0.8, "cpu": 0.5}, {"cuda": 256, "cpu": 64}, 64
# Of hours. bf16 FLOP/s (H100 and H200 have the same cores) and bytes/s by data sheet.
PEAK_FLOPS, BANDWIDTH, LARGE_BANDWIDTH, LINK = 989e12, 3.35e12, 4.8e12, 25e9  # LINK: CPU to GPU, for --offload
COMPUTE_SHARE, MEMORY_SHARE = 0.4, 0.6  # assumed: what training reaches of the one, decoding of the other
PROMPT_TOKENS, SFT_ROWS, SFT_TOKENS = 128, 1000, 1000  # assumed mean prompt; STAR-1's rows; assumed tokens of each
HEADS_STORED = ("qwen3-0.6b", "qwen3-1.7b")  # tied, but their files hold the head too


class Machine(NamedTuple):
    count: int  # GPUs, one process each; on a CPU processes
    bytes: int  # of each, as torch reports it
    kind: str = "cuda"

    @property
    def usable(self) -> float:
        """What tensors of one process may come to."""
        return self.bytes * (1 - FRAGMENTS) - CONTEXT * (self.kind == "cuda")

    def __str__(self) -> str:
        what = "GPU" if self.kind == "cuda" else "CPU process"
        return f"{self.count} {what}{('s' if self.kind == 'cuda' else 'es') * (self.count > 1)} of {gb(self.bytes)} GB"


class Sizes(NamedTuple):
    """Numbers of parameters."""

    total: int
    block: int  # of one layer, the largest
    head: int  # V * D; 0 for a reward model, whose head is one row
    root: int  # all but the layers: embedding, last norm, head
    active: int  # without the experts that a token does not pass


class Plan(NamedTuple):
    phases: dict[str, dict[str, float]]  # phase -> part -> bytes on each GPU; "step" is the optimizer's
    machine: Machine
    blocks: int  # of the KV pool
    table_width: int  # blocks of the longest sequence
    refused: str | None  # why no setting can help

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


# The machine and the models.


def card_bytes(size: float) -> int:
    """Bytes that torch reports of a card sold as `size` GB: in truth GiB, less 2 (141: 139, 80: 78) or a 40th."""
    return int((size - min(2, size / 40)) * GIB)


def gb(number: float) -> str:
    return f"{number / 1e9:.1f}" if number >= 5e7 or not number else f"{number / 1e9:.4f}"


def find_machine(text: str, device: str | None, tiny: bool) -> Machine:
    """`8x80` (or 80); else the CUDA devices that are visible; else this CPU, if it is asked for or enough; else 1x80.

    Raises ValueError for other texts.
    """
    if text:
        match = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", text)
        if not match:
            raise ValueError(f"--plan {text}: give GPUs as COUNTxGB, such as 8x80")
        return Machine(int(match[1] or 1), card_bytes(int(match[2])))
    processes = int(os.environ.get("WORLD_SIZE", 0))
    cuda = torch.cuda.is_available() and device != "cpu"
    if not cuda and (device == "cpu" or tiny):
        memory = host_memory()[0]
        return Machine(processes or 1, memory // (processes or 1), "cpu")
    if cuda:
        return Machine(processes or torch.cuda.device_count(), torch.cuda.get_device_properties(0).total_memory)
    return Machine(processes or 1, card_bytes(80))


def find_config(name: str) -> tuple[ModelConfig, str]:
    """The config of a model, and where it is from: `known_config`, or config.json of a hub id, downloaded alone.

    Raises what find_checkpoint raises.
    """
    if found := known_config(name):
        return found
    repo, _, revision = name.partition("@")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        find_checkpoint(name, weights=False)  # raises, and says which names are near
    from huggingface_hub import hf_hub_download

    with hub_errors_explained(repo, revision, "config.json"):
        folder = Path(hf_hub_download(repo, "config.json", revision=revision or None)).parent
    return ModelConfig.from_folder(folder), f"config.json of {name}, the only file downloaded"


def known_config(name: str) -> tuple[ModelConfig, str] | None:
    """The config of a folder, the tiny world or an alias (or the repository that it stands for), and where it is from;
    None where only the hub knows it."""
    base, repos = name.partition("@")[0], {repo.partition("@")[0]: alias for alias, repo in ALIASES.items()}
    if Path(name).expanduser().is_dir():
        folder = find_checkpoint(name)
        return ModelConfig.from_folder(folder), str(folder / "config.json")
    if build.is_tiny(name):
        policy = build.FAMILIES.get(base)
        shape, text = (policy.shape, policy.text) if policy else (build.REWARD_SHAPE, build.REWARD_TEXT)
        size = {"vocab_size": text.vocabulary + 2}  # with <think> and </think>
        return ModelConfig.from_dict(shape | size), "the tiny world"
    if (alias := repos.get(base, base)) in SHAPES:
        return ModelConfig.from_dict(SHAPES[alias]), "nanosafe/plan/shapes.py"
    return None


@lru_cache
def sizes(config: ModelConfig) -> Sizes:
    """Counted on the decoder itself, built on the meta device, which holds no data."""
    with torch.device("meta"):
        model = Decoder(config)
    total, *layers = (sum(p.numel() for p in m.parameters()) for m in (model, *model.model.layers))
    head = 0 if config.num_labels else config.vocab_size * config.hidden_size
    experts = sum(module.weight.numel() for module in model.modules() if isinstance(module, Experts))
    idle = experts - experts * config.hybrid.experts_per_token // config.hybrid.experts if experts else 0
    return Sizes(total, max(layers), head, total - sum(layers), total - idle)


# Parts, in bytes on each GPU. s: bytes of a number of the compute type.


def training_state(size: Sizes, s: int, world: int, low_memory: bool) -> dict[str, float]:
    """What is resident from start to end.

    One process: weights in --dtype, float32 masters unless these are the weights, two float32 moments; --low-memory: a
    16-bit remainder for the masters, moments of 8 bits with a float32 scale per 256. Several: the float32 parameters,
    which are the masters, and moments, all sharded.
    """
    P = size.total
    if low_memory:
        return {"weights": s * P, "masters": 2 * P, "moments": (2 + 4 / 256) * P}
    if world == 1:
        return {"weights": s * P, "masters": 4 * P * (s != 4), "moments": 8 * P}
    return {"masters": 4 * P / world, "moments": 8 * P / world}


def gradients(size: Sizes, world: int) -> float:
    """They add up in float32, sharded like the masters, and are freed after each step."""
    return 4 * size.total / world


def optimizer_workspace(size: Sizes, world: int, low_memory: bool, kind: str) -> float:
    """On CUDA both optimizers update in one pass. On a CPU split_adam.py goes by chunks, torch's AdamW by tensors."""
    if kind == "cuda":
        return 0
    return 10 * 4 * CHUNK if low_memory else 4 * size.head


def forward_bytes(config: ModelConfig, s: int) -> float:
    """Per token, without gradients: the worst moment of a layer."""
    D, F, hd = config.hidden_size, mlp_size(config), config.head_dim
    Q, K = config.num_attention_heads * hd, config.num_key_value_heads * hd
    mlp = s * (3 * D + 3 * F)  # x, x after attention, its norm; silu(gate), up, their product
    rope = s * (2 * D + Q + 2 * K) + 4 * 4 * Q  # x, its norm; q, k, v; in float32 q, both products and the sum
    experts = scan = 0
    if h := config.hybrid:
        inner, L = h.mamba_heads * h.mamba_head_dim, h.chunk_size
        experts = s * (4 + 3 * h.experts_per_token) * D
        # Counted, not derived (test_granite.py): decays of all pairs in a chunk, states.
        scan = 14 * inner + 11.5 * h.mamba_heads * L + 18.5 * inner * h.state_size / L
    return max(mlp, rope, experts, scan) + 2 * 4 * hd  # cos and sin


def mlp_size(config: ModelConfig) -> int:
    return config.hybrid.shared_intermediate_size if config.hybrid else config.intermediate_size


def saved_bytes(config: ModelConfig, s: int) -> float:
    """Per token: what autograd keeps of one layer's forward for its backward, the layer's input not counted."""
    D, F, hd = config.hidden_size, mlp_size(config), config.head_dim
    Q, K = config.num_attention_heads * hd, config.num_key_value_heads * hd
    # norm; q and k before their norms; q, k, v as attended; attended values, per document and joined; log-sum-exps
    attention = D + (Q + K) * config.qk_norm + (Q + 2 * K) + 2 * Q
    mlp = 2 * D + 4 * F  # residual sum, its norm; gate, silu(gate), up, their product
    mixer = s * attention + 4 * config.num_attention_heads
    if h := config.hybrid:
        inner, S, L = h.mamba_heads * h.mamba_head_dim, h.state_size, h.chunk_size
        # Counted (test_granite.py): fourteen tensors like the scan's input, in float32; B and C; of all pairs in a
        # chunk the decays and their products with C B^T; states.
        mixer = max(mixer, 57 * inner + 32 * h.groups * S + (8 * h.mamba_heads + 4) * L + 8 * inner * S / L)
        mlp += h.experts_per_token * (2 * D + 4 * config.intermediate_size)
    return mixer + s * mlp


def backward_bytes(config: ModelConfig, s: int) -> float:
    """Per token: a layer in its backward: what is saved, and in the MLP the gradients of gate, up or their product."""
    more = s * (3 * config.hidden_size + 2 * mlp_size(config))
    if h := config.hybrid:
        more += 2.4 * h.mamba_heads * h.chunk_size
    return saved_bytes(config, s) + more


def head_backward(size: Sizes, s: int) -> float:
    """Workspace of a chunk of logits, the head's gradient in float32 and in --dtype."""
    return CHUNK_BYTES + (4 + s) * size.head


def training_activations(config: ModelConfig, size: Sizes, s: int, tokens: int, recompute: bool, world: int) -> float:
    """Of one micro-batch of `tokens`, at the worst of three moments: the head's backward, a layer's, the root's.

    `recompute` keeps every layer's input, and of one layer at a time the rest. Beside the inputs there are the last
    hidden state, its norm, the selection for the head and the gradient. Several processes: at the end the gradient of
    embedding and head, in --dtype and in float32, is summed over the ranks.
    """
    layers, D = config.num_hidden_layers, config.hidden_size
    kept = tokens * s * D * (layers + 4) + tokens * 2 * 4 * config.head_dim  # cos and sin
    kept += 0 if recompute else tokens * saved_bytes(config, s) * layers
    layer = tokens * (backward_bytes(config, s) - (0 if recompute else saved_bytes(config, s))) + s * size.head
    return max(kept + head_backward(size, s), kept + layer, (s + 4) * size.root * (world > 1))


def sharding_buffers(size: Sizes, s: int, world: int, training: bool) -> float:
    """Several processes: the root's parameters stay gathered in --dtype, and of the layers the current and the next;
    in training also a layer's gradient in --dtype and, on its way to the other ranks, in float32."""
    return (s * size.root + (2 * s + (s + 4) * training) * size.block) * (world > 1)


def kv_pool(config: ModelConfig, s: int, free: float, rows: int, longest: int, kind: str) -> tuple[int, int, int]:
    """Blocks of the engine's cache when `free` bytes are, blocks of its longest sequence, bytes of a block."""
    size = BLOCK if kind == "cuda" else longest
    block = KVCache.bytes_per_position(config, compute_type(s)) * size
    width = math.ceil(longest / size)
    rows, states = state_slots(config, s, free, rows, kind)
    return min(max(0, int(free * POOL_SHARE[kind]) - states) // max(1, block), rows * width), width, block


def state_slots(config: ModelConfig, s: int, free: float, rows: int, kind: str) -> tuple[int, int]:
    """Rows of the engine that decode together when `free` bytes are, and the bytes of their Mamba layers' states."""
    rows = min(rows, ROWS[kind])
    if slot := KVCache.bytes_per_slot(config, compute_type(s)):
        rows = max(1, min(rows, int(free * POOL_SHARE[kind]) // 2 // slot - 1))
    return rows, (rows + 1) * slot


def compute_type(s: int) -> torch.dtype:
    return torch.float32 if s == 4 else torch.bfloat16


# The plan.


def settings(script: str, model: str, **changes) -> Namespace:
    """Flags of train_rl.py or train_sft.py ("rl", "sft") that are read here, as the recipe has them, with `changes`."""
    flags = dict(model=model, dtype="bfloat16", low_memory=False, offload=False, no_recompute=False, keep=2, steps=None)
    return Namespace(**flags | recipe(script, model) | changes)


def make(script: str, args: Namespace, machine: Machine) -> Plan:
    """The plan of train_rl.py or train_sft.py with flags `args` on `machine`. Raises what find_config raises."""
    config, _ = find_config(args.model)
    size, world, s = sizes(config), machine.count, bytes_of(args)
    if args.low_memory and (world > 1 or s != 2):
        raise ValueError("--low-memory is for one process in bfloat16: several shard their masters instead")
    base = training_state(size, s, world, args.low_memory)
    recompute = machine.kind == "cuda" and not args.no_recompute

    step = base | {"gradients": gradients(size, world),
                   "optimizer": optimizer_workspace(size, world, args.low_memory, machine.kind)}

    def update(longest: int) -> dict[str, float]:
        tokens = max(args.tokens_per_microbatch, longest)  # a longer document goes alone
        return base | {
            "gradients": gradients(size, world),
            "shard buffers": sharding_buffers(size, s, world, True),
            "activations": training_activations(config, size, s, tokens, recompute, world),
        }

    if script == "sft":
        return Plan({"update": update(args.max_tokens), "step": step}, machine, 0, 0, None)
    longest = args.max_prompt_tokens + args.max_response_tokens
    forward = max(args.tokens_per_microbatch, longest) * forward_bytes(config, s)
    frozen = {}
    if args.kl_coef:
        frozen["reference"] = (s * size.total, "log-probs")
    score = 0.0
    if not args.reward_model.startswith("rule:"):
        judge, _ = find_config(args.reward_model)
        frozen["reward model"] = (s * sizes(judge).total, "reward")
        score = max(SCORED_TOKENS, longest) * forward_bytes(judge, s)

    def resident(phase: str) -> dict[str, float]:  # each of the two is there in its own turn, or always
        return base | {name: total for name, (total, turn) in frozen.items() if turn == phase or not args.offload}

    rows = math.ceil(args.prompts_per_step * args.samples_per_prompt / world)
    batch = min(rows, ROWS[machine.kind])
    prefill = default_prefill_tokens(config, machine.kind)
    phases = {
        "rollout": resident("rollout") | {
            "gathered weights": s * size.total * (world > 1),
            # logits of all rows: in --dtype (on a CPU), in float32, and a copy that drawing makes
            "activations": prefill * forward_bytes(config, s) + batch * config.vocab_size * (s + 8),
        },
        "reward": resident("reward") | {"activations": score},
        "log-probs": resident("log-probs") | {
            "shard buffers": sharding_buffers(size, s, world, False), "activations": forward + CHUNK_BYTES,
        },
        "update": resident("update") | update(longest),
        "step": resident("step") | step,
    }  # fmt: skip
    free = machine.usable - sum(phases["rollout"].values())
    blocks, width, block = kv_pool(config, s, free, rows, longest, machine.kind)
    phases["rollout"]["KV pool"] = (max(blocks, width) + 1) * block  # the least that it needs; one more is scratch
    phases["rollout"]["states"] = state_slots(config, s, free, rows, machine.kind)[1]
    refused = None
    # A rollout has all weights on each GPU, however many there are.
    least = s * size.total + phases["rollout"]["activations"] + (width + 1) * block
    least += 2 * KVCache.bytes_per_slot(config, compute_type(s))
    if least > machine.usable:
        refused = (f"refused: sampling needs all weights on one GPU ({gb(s * size.total)} GB in --dtype, {gb(least)} "
                   f"with one sequence), each has {gb(machine.usable)}: only a larger card or a smaller model helps")
    return Plan(phases, machine, blocks, width, refused)


def bytes_of(args: Namespace) -> int:
    return getattr(torch, args.dtype).itemsize


def remedies(script: str, args: Namespace, machine: Machine) -> Iterator[tuple[Machine, dict]]:
    """Settings under which the run fits: on this machine, on more such GPUs, on as many of 141 GB; each with fewest
    changes. The order of trying is that of the harm done: none, slower, other results."""

    def first(machine: Machine) -> dict | None:
        one = machine.count == 1 and args.dtype == "bfloat16"
        fixed = {} if one else {"low_memory": False}
        tried = [fixed, *([{"offload": True} | fixed] if script == "rl" else [])]
        tried += [change | {"low_memory": True} for change in tried] if one else []
        best = tried[-1]
        budgets = [args.tokens_per_microbatch >> i for i in (1, 2) if args.tokens_per_microbatch >> i >= 2048]
        tried += [best | {"tokens_per_microbatch": budget} for budget in budgets]
        if script == "rl":
            tried += [tried[-1] | {"max_response_tokens": args.max_response_tokens >> i} for i in (1, 2)]
        for change in tried:
            if make(script, Namespace(**vars(args) | change), machine).fits:
                return {k: v for k, v in change.items() if getattr(args, k) != v}
        return None

    if (change := first(machine)) is not None:
        yield machine, change
    if machine.kind != "cuda":
        return
    for larger in (machine, machine._replace(bytes=max(machine.bytes, card_bytes(141)))):
        counts = [machine.count << i for i in range(7) if machine.count << i <= 64]
        for count in counts[1:] if larger == machine else counts:
            other = larger._replace(count=count)
            if (change := first(other)) is not None:
                yield other, change
                break
        if larger.bytes == card_bytes(141):
            break


# Time and disk.


def seconds_per_step(script: str, args: Namespace, machine: Machine, plan: Plan) -> dict:
    """Estimated seconds of each phase: FLOP at COMPUTE_SHARE of the peak, decoding by bytes at MEMORY_SHARE of the
    bandwidth. Not counted: attention's FLOP, communication, optimizer, saving, evaluation."""
    size, s, world = sizes(config := find_config(args.model)[0]), bytes_of(args), machine.count
    flops = PEAK_FLOPS * COMPUTE_SHARE * world
    training = 6 if args.no_recompute else 8  # per parameter and token: forward 2, backward 4, forward again 2
    if script == "sft":
        return {"update": training * size.active * args.batch_size * SFT_TOKENS / flops}
    rows = args.prompts_per_step * args.samples_per_prompt
    prompt, mean = min(PROMPT_TOKENS, args.max_prompt_tokens), args.max_response_tokens / 2
    tokens = rows * (prompt + mean)
    # Lengths uniform in (0, max]: rows that all fit together decode as long as the longest does, max steps; others
    # enter as rows leave, rows * mean / batch steps and a tail of mean.
    each = math.ceil(rows / world)
    capacity = max(1, plan.blocks * BLOCK // math.ceil(prompt + mean))  # sequences of mean length in the pool
    steps = mean * (1 + max(1, each / min(each, ROWS["cuda"], capacity)))
    kv = KVCache.bytes_per_position(config, compute_type(s))
    # A sequence of length n reads n * prompt + n^2 / 2 positions; the mean of n^2 is max^2 / 3.
    read = each * kv * (mean * prompt + args.max_response_tokens**2 / 6)
    read += each * mean * 2 * KVCache.bytes_per_slot(config, compute_type(s))  # states are read and written
    weights = s * (size.total - size.head * (not config.tie_word_embeddings))  # of the embedding a few rows are read
    decoding = (steps * weights + read) / (MEMORY_SHARE * bandwidth(machine))
    seconds = {"rollout": decoding + 2 * size.active * tokens / flops}
    judge = 0
    if not args.reward_model.startswith("rule:"):
        judge = sizes(find_config(args.reward_model)[0]).total  # no reward model has experts
    moved = args.offload / LINK * s
    seconds["reward"] = 2 * judge * tokens / flops + judge * moved
    seconds["log-probs"] = (4 if args.kl_coef else 2) * size.active * tokens / flops
    seconds["log-probs"] += size.total * moved * bool(args.kl_coef)
    seconds["update"] = training * size.active * tokens * args.epochs / flops
    return seconds


def bandwidth(machine: Machine) -> float:
    """Bytes/s of a GPU's memory: H200's from 100 GB on, else H100's."""
    return LARGE_BANDWIDTH if machine.bytes > 100e9 else BANDWIDTH


def steps_of(script: str, args: Namespace) -> int:
    return args.steps or sft_steps(args.epochs, SFT_ROWS, args.batch_size)


def hours(script: str, args: Namespace, machine: Machine, plan: Plan) -> float:
    return sum(seconds_per_step(script, args, machine, plan).values()) * steps_of(script, args) / 3600


def checkpoint_bytes(size: Sizes, s: int, low_memory: bool) -> float:
    """On disk: the model in --dtype, masters and moments; without masters where the model is float32 itself."""
    return sum(training_state(size, s, 1, low_memory).values())


def download_bytes(name: str, config: ModelConfig) -> int:
    """Of a model on the hub, in bfloat16; 0 for the others."""
    if Path(name).expanduser().is_dir() or build.is_tiny(name) or name.startswith("rule:"):
        return 0
    size = sizes(config)
    return 2 * (size.total + size.head * (name in HEADS_STORED))


# What --plan prints.


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


def show(script: str, args: Namespace) -> None:
    """Print the report, on the main rank."""
    if MAIN_RANK:
        print(report(script, args), flush=True)
