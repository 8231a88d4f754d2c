"""What the training scripts share around their loops: flags, settings and where each came from, readable errors."""

import json
import os
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from nanosafe.io.machine import thread_settings
from nanosafe.parallel import Ranks
from nanosafe.train.tracking import require_trackers

UNSET = object()
LORA_LR = 10  # LoRA's learning rate is that of full training times this


def settings(parser: ArgumentParser, argv: list[str] | None, script: str,
             recipe: Callable[[str, str], dict]) -> tuple[Namespace, dict[str, list[str]]]:
    """Flags to settings: what the command line leaves open comes from the model's recipe, then from the flag's default.

    script: "rl" or "sft"; recipe(script, model): its defaults for a model. Returns the settings, and the names of
    those from the command line, the recipe and the defaults.
    """
    flags = [action for action in parser._actions if action.dest != "help"]
    # argparse fills in a default only where the namespace has no value: what is UNSET was not given.
    given = parser.parse_args(argv, Namespace(**{flag.dest: UNSET for flag in flags}))
    model = parser.get_default("model") if given.model is UNSET else given.model
    defaults = recipe(script, model)
    args, origins = Namespace(), {"command line": [], "recipe": [], "default": []}
    for flag in flags:
        name = flag.dest
        if getattr(given, name) is not UNSET:
            origin, value = "command line", getattr(given, name)
        elif name in defaults:
            origin, value = "recipe", defaults[name]
        else:
            origin, value = "default", flag.default
        setattr(args, name, value)
        origins[origin].append(name)
    require_trackers(args)
    return args, origins


def start(args: Namespace, origins: dict[str, list[str]], script: str) -> Ranks:
    """Join the process group, settle what follows from the device, and print every setting under where it came from.

    Raises ValueError for settings that this process cannot follow.
    """
    ranks = Ranks(args.device)
    args.device = ranks.device.type
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if script == "rl" and args.old_logprobs is None:
        # In half precision sampler and trainer round differently.
        exact = args.device == "cpu" and args.dtype == "float32"
        args.old_logprobs = "sampler" if exact else "trainer"
    if args.low_memory and args.dtype != "bfloat16":
        raise ValueError("--low-memory splits bfloat16 weights: add --dtype bfloat16, or leave it out")
    check_parallel(args, ranks.world)
    if ranks.local_world % args.rollout_shards:
        ranks.print(f"warning: --rollout-shards {args.rollout_shards} does not divide the "
                    f"{ranks.local_world} processes of a node: some groups lie on two nodes, and "
                    "every layer's sums go over the network")
    if args.lora_rank:
        # Twice the rank: the scale alpha / R is 2 whatever the rank is.
        args.lora_alpha = args.lora_alpha or 2.0 * args.lora_rank
        if "lr" in origins["recipe"]:
            args.lr *= LORA_LR
            origins["recipe"].remove("lr")
            origins[f"recipe, times {LORA_LR} for LoRA"] = ["lr"]
    elif args.lora_alpha or args.save_adapter:
        raise ValueError("--lora-alpha and --save-adapter need --lora-rank: add it, or leave them out")
    if not args.out:
        name = args.model.rstrip("/").split("/")[-1].replace("@", "-")
        args.out = f"runs/{script}-{name}"
    processes = "1 process" if ranks.world == 1 else f"{ranks.world} processes"
    threads = f"{torch.get_num_threads()} CPU threads ({thread_settings()})"
    ranks.print(f"{processes} on {args.device} with {threads}, PyTorch {torch.__version__}")
    for origin, names in origins.items():
        shown = []
        for name in names:
            value = getattr(args, name)
            if isinstance(value, list):
                value = " ".join(map(str, value))
            if value not in (None, False):
                shown.append(f"{name} {value}")
        ranks.print(f"from the {origin}: {', '.join(shown)}")
    return ranks


def check_parallel(args: Namespace, world: int) -> None:
    """Raise ValueError for flags that `world` processes cannot follow."""
    shards = args.rollout_shards
    if shards > 1 and world == 1:
        raise ValueError(f"--rollout-shards {shards} spreads a model over {shards} processes, and this is one: start "
                         f"with torchrun --nproc_per_node={shards}, or leave it out")
    if world % shards:
        raise ValueError(f"--rollout-shards {shards} does not divide the {world} processes into groups")
    if args.shard_frozen and world == 1:
        raise ValueError("--shard-frozen spreads reference and reward model over several processes, and this is one: "
                         "leave it out; --offload keeps them in CPU memory")
    if args.shard_frozen and args.offload:
        raise ValueError("--shard-frozen keeps reference and reward model on the GPUs, --offload in CPU memory: "
                         "leave one out")


def visible(text: str) -> str:
    """`text` with control characters written out: a file's could rule the user's terminal."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def tell_torchrun(message: str) -> None:
    """Leave `message` where torchrun reads why a process failed: the box that ends its output then shows it."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        error = {"message": message, "timestamp": int(time.time())}
        with suppress(OSError):  # on a full disk, say: the message has been printed
            Path(path).write_text(json.dumps(error))


@contextmanager
def readable_errors() -> Iterator[None]:
    """A user's mistake (a missing file, a wrong field, a full disk) ends the script with its message alone."""
    try:
        yield
    except (ValueError, OSError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        if os.environ.get("NANOSAFE_TRACEBACK"):
            raise
        message = "interrupted" if isinstance(error, KeyboardInterrupt) else f"error: {error}"
        if isinstance(error, torch.OutOfMemoryError):
            message += "\nA smaller --tokens-per-microbatch or a smaller model needs less memory."
        rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
        message = f"{rank}{visible(message)}\n(NANOSAFE_TRACEBACK=1 shows where)"
        print(message, file=sys.stderr, flush=True)
        tell_torchrun(message)
        # Without clean-up: leaving the process group would wait for ranks that may never come.
        os._exit(1)
