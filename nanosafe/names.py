"""What a name on the command line stands for: an alias, a folder, a hub id, a rule, or something of the tiny world.

The core takes folders and files. This is the one file that knows both it and the tiny world: a name goes in, and a
folder, rows, a reward or a recipe comes out.
"""

import re
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from nanosafe.io.fields import CONFIG, check
from nanosafe.io.files import read_json
from nanosafe.io.hub import find_checkpoint, find_files
from nanosafe.model.adapter_files import Adapter
from nanosafe.model.config import ModelConfig
from nanosafe.model.decoder import Decoder
from nanosafe.model.lora import adapted, start_adapters
from nanosafe.model.weights import load_checkpoint
from nanosafe.parallel import Ranks
from nanosafe.recipes import RECIPES, TINY_RECIPES
from nanosafe.text.data import Pair, Row
from nanosafe.text.forms import as_pair, as_row
from nanosafe.text.readers import read_records
from nanosafe.text.tokenizer import Tokenizer
from nanosafe.tiny import build, datasets, judge
from nanosafe.train.own_reward import OwnReward, is_function
from nanosafe.train.reward_model import RewardModel
from nanosafe.train.rewards import RULES, Conversation, Reward
from nanosafe.train.weighted_reward import WeightedReward

# How LoRA's policy samples, see model/lora.py
ROLLOUTS = {
    "cuda": "add the adapters in the forward pass, as training does",
    "cpu": "multiply by packed copies of the weights with the adapters merged in",
}


def checkpoint(name_or_path: str | Path, *, weights: bool = True) -> Path:
    """The folder of a model: of the tiny world, grown if need be, or what `find_checkpoint` finds."""
    name = str(name_or_path)
    if build.is_tiny(name) and not Path(name).exists():
        return build.tiny_checkpoint(name)
    return find_checkpoint(name_or_path, weights=weights)


def load_model(name_or_path: str | Path, *, device: str | torch.device = "cpu",
               dtype: torch.dtype | None = None, ranks: Ranks | None = None, keep_dtype: bool = False,
               lora: tuple[int, float] | None = None) -> Decoder:
    """The language model `name_or_path` (see `checkpoint`) on `device` in `dtype`, in eval mode.

    dtype: as the scripts' --dtype, by default float32 on a CPU and bfloat16 on CUDA.

    Its `config.eos_ids` include the tokenizer's end-of-turn ids.
    ranks: of several, each keeps its rows of every tensor and computes in `dtype`. The rows are float32, which AdamW
    wants for masters; keep_dtype: `dtype`, for what is frozen or trains with --low-memory.
    lora: as in load_checkpoint. A folder of adapters, such as a checkpoint of a run with --lora-rank, is the model that
    they name with them merged in.
    Raises what find_checkpoint and load_checkpoint raise, and ValueError for a reward model.
    """
    folder = checkpoint(name_or_path)
    if ModelConfig.from_folder(folder).num_labels:
        raise ValueError(f"{name_or_path} is a reward model (it has a score head): use load_reward_model")
    dtype = dtype or default_dtype(device)
    if (folder / "adapter_config.json").exists():
        adapter = Adapter(folder)
        model = load_model(adapter.base, device=device, dtype=dtype, ranks=ranks, keep_dtype=keep_dtype,
                           lora=lora)
        adapter.merge_into(model)
    else:
        model = load_checkpoint(folder, device, dtype, ranks, keep_dtype, lora)
    with suppress(ValueError, OSError):  # without a tokenizer, or with a broken one, it is a model
        model.config = replace(model.config, eos_ids=Tokenizer(folder).eos_ids)
    return model


def load_policy(args: Namespace, base: Path, resumed: Path | None, ranks: Ranks) -> Decoder:
    """The model to train: `base`, or the checkpoint `resumed` of a run; with --lora-rank `base` and adapters."""
    options = dict(device=ranks.device, dtype=getattr(torch, args.dtype), ranks=ranks, keep_dtype=args.low_memory)
    if not args.lora_rank:
        return load_model(resumed or base, **options)
    model = load_model(base, **options, lora=(args.lora_rank, args.lora_alpha))
    if resumed:
        Adapter(resumed).copy_to(model)
    else:
        start_adapters(model, args.seed)
    layers, count = adapted(model), sum(weight.numel() for weight in model.parameters())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    ranks.print(f"LoRA: rank {args.lora_rank}, alpha {args.lora_alpha:g} on {len(layers)} linear layers: "
                f"{trained:,} of {count:,} parameters train, the rest is frozen in {args.dtype}; rollouts "
                f"{ROLLOUTS[ranks.device.type]}")
    return model


def load_reference(args: Namespace, base: Path, policy: Decoder, ranks: Ranks) -> Decoder | None:
    """The model that the KL is taken to: what `policy` was at the start. None where there is no KL.

    With --lora-rank it is the policy itself, which scores without its adapters then: nothing is loaded.
    """
    if not args.kl_coef:
        return None
    if args.lora_rank:
        return policy
    home = "cpu" if args.offload else ranks.device
    shared = ranks if args.shard_frozen else None
    model = load_model(base, device=home, dtype=getattr(torch, args.dtype), ranks=shared, keep_dtype=True)
    return model.requires_grad_(False)


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """The tokenizer of an alias, hub repository or folder; of a repository only the small files are fetched."""
    return Tokenizer(checkpoint(name_or_path, weights=False))


def load_reward_model(name_or_path: str | Path, *, device: str | torch.device = "cpu",
                      dtype: torch.dtype | None = None) -> RewardModel:
    """The *ForSequenceClassification model with one label in `name_or_path`, in eval mode; dtype as in `load_model`.

    Raises what `find_checkpoint`, `load_checkpoint` and `Tokenizer` raise, and ValueError for a language model.
    """
    return RewardModel.load(checkpoint(name_or_path), device, dtype or default_dtype(device))


def default_dtype(device: str | torch.device) -> torch.dtype:
    """The compute type where none is asked for: a CPU gains nothing by half precision that is worth its rounding."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def load_reward(spec: str | Sequence[str], *, weights: Sequence[float] | None = None, **options) -> Reward:
    """The reward `spec`, or of several their sum with `weights` (default: 1); options: those of `load_one_reward`."""
    if isinstance(spec, str):
        return load_one_reward(spec, **options)
    parts = {one: load_one_reward(one, **options) for one in spec}
    return WeightedReward(parts, weights or [1.0] * len(parts))


def load_one_reward(spec: str, *, scope: str = "response", device: str | torch.device = "cpu",
                    dtype: torch.dtype | None = None, offload: bool = False, date: str | None = None,
                    ranks: Ranks | None = None) -> Reward:
    """rule:math, rule:refusal, rule:tiny-judge, a function FILE.py:NAME, or a reward model (alias, hub id or folder).

    offload, ranks: as in RewardModel.load; date: the day that its template writes, as in Tokenizer. scope: as in
    `rewards.conversation`; a reward model whose template deletes thoughts is refused with a ValueError for "response".
    """
    rules = RULES | {"rule:tiny-judge": tiny_judge}
    if spec in rules:
        return rules[spec]
    if spec.startswith("rule:"):
        raise ValueError(f"unknown rule {spec!r}; known: {', '.join(rules)}, or give a reward model")
    if is_function(spec):
        return OwnReward(spec)
    model = RewardModel.load(checkpoint(spec), device, dtype or default_dtype(device), offload=offload,
                             ranks=ranks)
    # Scores of a run that is resumed must not change with the day.
    model.tokenizer.date = date or model.tokenizer.date
    model.check_scope(scope, spec)
    return model


def tiny_judge(conversations: Sequence[Conversation], rows: Sequence[Row]) -> Tensor:
    """The exact judge of the tiny world as a reward."""
    return torch.tensor([judge.judge_reward(c[-2]["content"], c[-1]["content"]) for c in conversations])


def load_rows(name: str) -> list[Row]:
    """Rows of a data set: see `find_records` for the name and `forms.as_row` for their fields.

    Raises what find_records raises, or ValueError naming the file, the row and the field.
    """
    return [as_row(record, source) for record, source in find_records(name)]


def load_pairs(name: str) -> list[Pair]:
    """Labelled pairs, found like rows: see `forms.as_pair`. Raises what load_rows raises."""
    return [as_pair(record, source) for record, source in find_records(name)]


def find_records(name: str) -> list[tuple[dict, str]]:
    """The records of a data set, at least one, each with its place.

    name: a local .json, .jsonl, .csv or .parquet file, a data set on the hub (see `hub.find_dataset`), or one of the
    tiny world (tiny-star, tiny-star@SEED). A .json file is a list of rows, or has one row per line like .jsonl.
    """
    generated = datasets.dataset(name)
    if generated is not None:
        return [(record, f"{name}, row {i}") for i, record in enumerate(generated, 1)]
    return [record for path in find_files(name) for record in read_records(path)]


def recipe(script: str, model: str) -> dict:
    """The defaults of `script` (rl, sft) for `model`: if it lives in the tiny world, that world's, of its seed."""
    seed = tiny_seed(model)
    if seed is None:
        return RECIPES[script]
    settings = dict(RECIPES[script])
    # Data and reward model are those of the world that the model grew in.
    for name, value in TINY_RECIPES[script].items():
        settings[name] = f"{value}@{seed}" if str(value).startswith("tiny-") else value
    return settings


def tiny_seed(model: str) -> int | None:
    """The seed that a model of the tiny world grew from, by its name or by the config.json of a folder; else None."""
    name = re.fullmatch(r"tiny(?:-llama|-granite)?(?:@(\d+))?", model)
    if name:
        return int(name[1] or 0)
    path, field = Path(model).expanduser() / "config.json", "nanosafe_seed"
    if not path.is_file():
        return None
    return check(read_json(path), {field: CONFIG[field]}, path)[field]
