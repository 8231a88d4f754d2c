"""What --plan knows without a download: the machine, and the config behind a model's name."""

import os
import re
from argparse import Namespace
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from nanosafe.io.hub import find_checkpoint, hub_errors_explained, hub_is_away
from nanosafe.io.machine import host_memory
from nanosafe.model.config import ModelConfig
from nanosafe.plan.memory import sizes
from nanosafe.plan.shapes import SHAPES
from nanosafe.recipes import ALIASES
from nanosafe.tiny import build

GIB = 1 << 30
# Of a GPU's memory, what torch's allocator never gets (CUDA context, libraries, NCCL) and what it loses to fragments.
CONTEXT, FRAGMENTS = 1e9, 0.03
HEADS_STORED = ("qwen3-0.6b", "qwen3-1.7b")  # tied, but their files hold the head too


class Machine(NamedTuple):
    count: int  # GPUs, one process each; on a CPU processes
    bytes: int  # of each, as torch reports it
    kind: str = "cuda"

    @property
    def usable(self) -> float:
        """What tensors of one process may come to."""
        context = CONTEXT if self.kind == "cuda" else 0
        return self.bytes * (1 - FRAGMENTS) - context

    def __str__(self) -> str:
        one, several = ("GPU", "GPUs") if self.kind == "cuda" else ("CPU process", "CPU processes")
        # A card is called what it is sold as, where that is a whole number.
        gib = self.bytes / GIB
        sold = round(max(gib + 2 if gib >= 78 else gib * 40 / 39, 0))
        size = sold if self.kind == "cuda" and card_bytes(sold) == self.bytes else gb(self.bytes)
        return f"{self.count} {one if self.count == 1 else several} of {size} GB"


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
    if torch.cuda.is_available() and device != "cpu":
        memory_of_each = torch.cuda.get_device_properties(0).total_memory
        return Machine(processes or torch.cuda.device_count(), memory_of_each)
    processes = processes or 1
    if device == "cpu" or tiny:
        of_node = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        return Machine(processes, host_memory()[0] // of_node, "cpu")
    return Machine(processes, card_bytes(80))


def find_config(name: str) -> tuple[ModelConfig, str]:
    """The config of a model, and where it is from: `known_config`, or config.json of a hub id, downloaded alone.

    Raises what find_checkpoint raises.
    """
    known = known_config(name)
    if known is not None:
        return known
    repo, _, revision = name.partition("@")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        find_checkpoint(name, weights=False)  # raises, and says which names are near
    return _hub_config(repo, revision), f"config.json of {name}, the only file downloaded"


@cache  # a plan asks many times, and each download asks the hub
def _hub_config(repo: str, revision: str) -> ModelConfig:
    from huggingface_hub import hf_hub_download  # half a second that the other names do not need

    with hub_errors_explained(repo, revision, "config.json"):
        file = hf_hub_download(repo, "config.json", revision=revision or None, local_files_only=hub_is_away())
        folder = Path(file).parent
    return ModelConfig.from_folder(folder)


def policy_config(args: Namespace) -> ModelConfig:
    """Of the model that trains, with its adapters."""
    config, _ = find_config(args.model)
    return replace(config, lora=(args.lora_rank, 1.0)) if args.lora_rank else config


def known_config(name: str) -> tuple[ModelConfig, str] | None:
    """The config of a folder, the tiny world or an alias (or the repository that it stands for), and where it is from;
    None where only the hub knows it."""
    base = name.partition("@")[0]
    if Path(name).expanduser().is_dir():
        folder = find_checkpoint(name)
        return ModelConfig.from_folder(folder), str(folder / "config.json")
    if build.is_tiny(name):
        shape, text = build.REWARD_SHAPE, build.REWARD_TEXT
        if base in build.FAMILIES:
            shape, text = build.FAMILIES[base].shape, build.FAMILIES[base].text
        with_tags = {"vocab_size": text.vocabulary + 2}  # <think> and </think>
        return ModelConfig.from_dict(shape | with_tags), "the tiny world"
    aliases = {repo.partition("@")[0]: alias for alias, repo in ALIASES.items()}
    alias = aliases.get(base, base)
    if alias in SHAPES:
        return ModelConfig.from_dict(SHAPES[alias]), "nanosafe/plan/shapes.py"
    return None


def download_bytes(name: str, config: ModelConfig) -> int:
    """Of a model on the hub, in bfloat16; 0 for the others."""
    if Path(name).expanduser().is_dir() or build.is_tiny(name) or name.startswith("rule:"):
        return 0
    size = sizes(config)
    return 2 * (size.total + (size.head if name in HEADS_STORED else 0))
