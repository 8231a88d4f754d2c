"""What the training scripts share around their loops: flags, settings and where each came from, readable errors."""

import argparse
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date

import torch

from nanosafe.io.machine import thread_settings
from nanosafe.model.recompute import RECOMPUTE
from nanosafe.parallel import Ranks
from nanosafe.recipes import RECIPES, TINY_RECIPES
from nanosafe.train.tracking import require_trackers

UNSET = object()
LARGEST = torch.finfo(torch.float32).max  # what is computed with a number is computed in float32


def iso_date(text: str) -> str:
    return date.fromisoformat(text).isoformat()


# Of every script that renders prompts.
THINKING = dict(
    choices=("on", "off"), default="on",
    help="whether the chat template asks for a thought, where it can do both: Qwen3, Granite "
    "(default: %(default)s)",
)
DATE = dict(
    type=iso_date, metavar="YYYY-MM-DD",
    help="the day that some chat templates write, as Llama 3.2's and Granite 3.3's (default: today; "
    "what was begun keeps its day)",
)


def new_parser(description: str) -> ArgumentParser:
    """A parser with the flags that mean the same in every training script."""
    raw = argparse.RawDescriptionHelpFormatter  # keeps the lines of the description
    parser = ArgumentParser(description=description, formatter_class=raw)
    add = parser.add_argument
    add("--model", default="tiny",
        help="tiny, tiny-llama or tiny-granite (the tiny world, no download; tiny@SEED grows another), "
        "alias (qwen3-8b), hub id (owner/name, owner/name@revision) or folder (default: %(default)s)")
    add("--out", help="run folder (default: runs/SCRIPT-MODEL)")
    add("--seed", type=int, default=0, help="all randomness follows from it (default: %(default)s)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--dtype", choices=("float32", "bfloat16"),
        help="compute type; masters are float32 (default: bfloat16 on cuda, float32 on cpu)")
    add("--resume", choices=("auto", "never"), default="auto",
        help="auto: go on from the run folder's newest checkpoint (default); never: refuse such a "
        "folder")
    add("--thinking", **THINKING)
    add("--date", **DATE)
    add("--save-every", type=positive_int, default=50,
        help="steps between checkpoints (default: %(default)s)")
    add("--keep", type=positive_int, default=2,
        help="how many checkpoints are kept (default: %(default)s)")
    add("--low-memory", action="store_true",
        help="one GPU, bfloat16: masters as weight + 16-bit remainder (exact float32), moments in 8 "
        "bits; a parameter then takes 6 bytes instead of 14")
    add("--offload", action="store_true",
        help="keep reference and reward model in CPU memory; each comes to the GPU for its turn in a "
        "step")
    add("--recompute", choices=RECOMPUTE,
        help="what the backward pass computes anew instead of keeping it: none; some, all but "
        "products and attention, for half the memory; layer, whole layers, for the least memory and a "
        "third more FLOP (default: the fastest that fits by the plan, on a CPU none)")
    add("--plan", nargs="?", const="", metavar="NxGB",
        help="only print what the run needs (memory of each GPU, hours, disk, downloads), whether it "
        "fits and what helps; nothing is downloaded. 8x80: on 8 GPUs of 80 GB (default: the visible "
        "ones, else 1x80)")
    add("--random-weights", action="store_true",
        help="dry run without a download: the true shape (also of a folder with a config.json alone) "
        "with random weights, written once to the cache; reward model alike; tiny-star data")
    add("--tensorboard", action="store_true", help="also log to OUT/tensorboard")
    add("--wandb", action="store_true", help="also log to Weights & Biases")
    return parser


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def finite_float(text: str) -> float:
    if not abs(float(text)) <= LARGEST:
        raise ArgumentTypeError(f"must be a finite number, not {text!r}")
    return float(text)


def positive_float(text: str) -> float:
    if not finite_float(text) > 0:
        raise ArgumentTypeError(f"must be greater than 0, not {text!r}")
    return float(text)


def settings(parser: ArgumentParser, argv: list[str] | None, script: str,
             recipe: Callable[[str, str], dict]) -> tuple[Namespace, dict[str, list[str]]]:
    """Flags to settings: what the command line leaves open comes from the model's recipe, then from the flag's default.

    script: "rl" or "sft"; recipe(script, model): its defaults for a model. Returns the settings, and the names of
    those from the command line, the recipe and the defaults.
    """
    flags = [action for action in parser._actions if action.dest != "help"]
    _show_recipes(flags, script)
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


def _show_recipes(flags: list[argparse.Action], script: str) -> None:
    """Write the recipes' values into the flags' help."""
    for flag in flags:
        for label, recipes in (("default", RECIPES), ("tiny", TINY_RECIPES)):
            if flag.dest in recipes[script]:
                flag.help = f"{flag.help or ''} ({label}: {recipes[script][flag.dest]})".lstrip()


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
    if args.low_memory and (ranks.world > 1 or args.dtype != "bfloat16"):
        raise ValueError("--low-memory is for one process that computes in bfloat16: several spread "
                         "the masters over their GPUs, so leave it out; for one, add --dtype bfloat16")
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


def visible(text: str) -> str:
    """`text` with control characters written out: a file's could rule the user's terminal."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


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
        # Without clean-up: leaving the process group would wait for ranks that may never come.
        os._exit(1)
