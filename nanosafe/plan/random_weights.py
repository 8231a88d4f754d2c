"""--random-weights: the true shape of a model without a download, for dry runs and benchmarks.

A folder in the official layout is written once to the cache of tiny/build.py: bfloat16 weights, scaled so that
activations keep their size, in shards that are made one at a time, and a stand-in tokenizer with its chat template.
From there on the run is an ordinary one of that folder. What it learns means nothing; its speed and memory are those of
the true model, with responses that nearly always run to the limit, since no token ends them sooner than by chance.
"""

import hashlib
import json
import os
import re
import shutil
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from nanosafe.io.files import sync
from nanosafe.io.hub import MODEL_INDEX
from nanosafe.io.locks import locked
from nanosafe.io.progress import progress
from nanosafe.model.config import ModelConfig
from nanosafe.model.granite import make_decoder
from nanosafe.model.weights import cut_into_files, write_safetensors
from nanosafe.parallel import Ranks
from nanosafe.plan.machine import find_config
from nanosafe.randomness import derive_seed
from nanosafe.tiny import build
from nanosafe.train.own_reward import is_function
from nanosafe.train.weighted_reward import reward_specs

SHARD_BYTES = 2 * 10**9  # what is in memory at a time
VOCABULARY = 1024  # of the stand-in tokenizer, or less where the model has fewer
CORPUS = ("How do I bake bread at home?",
          "Wait, let me think about that again. However, it is safe.", "I can help.")


def substitute(args: Namespace, given: list[str], ranks: Ranks) -> None:
    """Put folders of random weights in place of args.model and of a reward model that is an alias or has no weights;
    prompts and data come from the tiny world, and no questions are asked, unless that was `given`, names of flags on
    the command line."""

    def folder_for(name: str, what: str) -> str:
        with ranks.local_main_first():
            folder = str(random_checkpoint(name))
        ranks.print(f"--random-weights: {what} {name} is {folder}")
        return folder

    args.model = folder_for(args.model, "model")
    if hasattr(args, "reward_model"):
        specs = []
        for spec in reward_specs(args.reward_model):
            specs.append(spec if _stands_alone(spec) else folder_for(spec, "reward model"))
        args.reward_model = specs if isinstance(args.reward_model, list) else specs[0]
    for name in ("prompts", "data"):
        if hasattr(args, name) and name not in given:
            setattr(args, name, "tiny-star")
            ranks.print(f"--random-weights: {name} tiny-star, for nothing is downloaded")
    if "eval_every" not in given:
        args.eval_every = None  # the tiny world's recipe has one, but random weights know nothing to be asked


def _stands_alone(name: str) -> bool:
    """A rule, a function, a reward model of the tiny world, or a folder with weights."""
    if name.startswith("rule:") or is_function(name) or build.is_tiny(name):
        return True
    return any(Path(name).expanduser().glob("*.safetensors"))


def random_checkpoint(name: str, shard_bytes: int = SHARD_BYTES) -> Path:
    """The folder of random weights with the shape of `name` (see plan.find_config), written if the cache has none.

    Raises what find_config raises, ValueError for a vocabulary that no byte-level tokenizer fits, and OSError for a
    disk with too little room.
    """
    config, origin = find_config(name)
    identity = hashlib.sha256(json.dumps(config.raw, sort_keys=True).encode()).hexdigest()[:8]
    slug = re.sub(r"[^\w.]+", "-", name.rstrip("/").split("/")[-1]).strip("-.")
    folder = build.cache() / f"random-{slug}-{identity}"
    if not folder.is_dir():
        with locked(folder.with_suffix(".lock")):
            if not folder.is_dir():  # another process may have written it while this one waited
                work = folder.with_name(f"{folder.name}.building")
                shutil.rmtree(work, ignore_errors=True)
                try:
                    _write(config, work, shard_bytes)
                except OSError:  # a full disk, say: what was written would fill it for good
                    shutil.rmtree(work, ignore_errors=True)
                    raise
                os.rename(work, folder)
                sync(folder.parent)
    return folder


def _write(config: ModelConfig, folder: Path, shard_bytes: int) -> None:
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in make_decoder(config).named_parameters()}
    nbytes = {name: 2 * shape.numel() for name, shape in shapes.items()}  # bfloat16
    total = sum(nbytes.values())
    if (free := shutil.disk_usage(folder.parent).free) < total:
        raise OSError(f"{folder.parent} has {free / 1e9:.1f} GB free, the random weights take "
                      f"{total / 1e9:.1f}: set NANOSAFE_CACHE to a folder with more room")
    text = build.REWARD_TEXT if config.num_labels else build.FAMILIES["tiny"].text
    room = min(VOCABULARY, config.vocab_size - 2)  # <think> and </think> come on top
    if room < (least := 256 + len(text.specials)):
        raise ValueError(f"field 'vocab_size' = {config.vocab_size}: the stand-in tokenizer needs "
                         f"{least + 2}")
    _, ids = build.write_tokenizer(folder, text._replace(vocabulary=room), CORPUS)

    files, index = cut_into_files(nbytes, "model", shard_bytes)

    def fresh(name: str) -> torch.Tensor:
        tensor = torch.empty(shapes[name], dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(derive_seed(0, "weights", name))
        build.fill_random(name, tensor, config.num_hidden_layers, generator)
        return tensor

    with ThreadPoolExecutor() as pool:  # torch fills a tensor with one thread
        for file, names in progress(list(files.items()), "random weights", "shard"):
            write_safetensors(dict(zip(names, pool.map(fresh, names), strict=True)), folder / file)
            sync(folder / file)
    # The stand-in's ids replace the official ones, or its end of a turn would not end a response.
    raw = {key: value for key, value in config.raw.items() if key != "bos_token_id"} | ids | {"torch_dtype": "bfloat16"}
    for file, content in (("config.json", raw), *([(MODEL_INDEX, index)] if index else [])):
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")
        sync(folder / file)
