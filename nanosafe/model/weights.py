"""Weights: stream a folder's safetensors into the decoder, and save them back.

Only safetensors and JSON are read, never pickle. A load is a strict copy: every tensor of the model must be in the
checkpoint with its shape, and nothing else may be. On the CPU, in the dtype of the file, a parameter is the
memory-mapped file itself: a model starts without copying its weights. Of a model that is spread over several ranks,
each reads its own rows, and the files are written from the ranks' rows one at a time. LoRA's adapters have files of
their own (adapter_files.py).
"""

import json
import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from nanosafe.io.fields import EOS, check
from nanosafe.io.files import own_file, staged
from nanosafe.io.hub import INDEX, SINGLE, read_index
from nanosafe.io.machine import MAIN_RANK
from nanosafe.io.progress import progress
from nanosafe.model.config import ModelConfig
from nanosafe.model.decoder import Decoder
from nanosafe.model.granite import make_decoder, official
from nanosafe.model.lora import freeze_in, is_adapter, merge
from nanosafe.parallel import Ranks, full_tensor, local_shard, shard

MAX_SHARD_BYTES = 5 * 10**9
DTYPES = ("F32", "F16", "BF16")  # safetensors' names of what a checkpoint may hold
WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_checkpoint(
    folder: str | Path, device: str | torch.device, dtype: torch.dtype, ranks: Ranks | None = None,
    keep_dtype: bool = False, lora: tuple[int, float] | None = None,
) -> Decoder:  # fmt: skip
    """The model in `folder`, with either head, on `device` in `dtype`, in eval mode; ranks, keep_dtype: see load_model.

    lora: rank and alpha of adapters, which are zero, to a model that is frozen (lora.py).

    On the CPU, tensors already in `dtype` are views of a private (copy-on-write) mapping: changing them never changes
    the file. All others are converted one by one: peak memory is the model and its largest stored tensor.
    Raises ValueError listing every missing, unexpected, misshapen or quantised tensor, or naming the broken file.
    """
    folder, device = Path(folder), torch.device(device)
    config = replace(ModelConfig.from_folder(folder), lora=lora)
    if MAIN_RANK and config.rope and config.rope.attn_factor != 1:
        _say_once(f"{config.source}: rope_scaling's attn_factor is multiplied in, as in YaRN's own "
                  "code and vLLM; transformers leaves it out, so its logits differ")  # fmt: skip
    with torch.device("meta"):
        model = make_decoder(config)
    stored = StoredTensors(folder, "model")
    names = _check_tensors(model, stored, folder)
    loading = progress(names, f"loading {folder.name}", "tensor")
    if ranks is not None and ranks.world > 1:
        freeze_in(model, dtype)
        shard(model.to(dtype) if keep_dtype else model, ranks, dtype)
        parameters = dict(model.to_empty(device=device).named_parameters())
        with torch.no_grad():
            for name in filter(is_adapter, parameters):
                parameters[name].zero_()
            for name in loading:
                parameters[name].copy_(stored.read(name, like=parameters[name]))
        return model.eval()
    # Tensors that stay as they are in the file share one mapping of it.
    tensors, mapped, file = {}, None, None
    for name in loading:
        if stored[name].path != mapped:
            mapped = stored[name].path
            file = open_file(mapped)
        tensors[name] = file.get_tensor(stored[name].key)
        if device.type != "cpu" or tensors[name].dtype != dtype:
            tensors[name] = tensors[name].to(device).to(dtype)
            # The next tensor gets a mapping of its own, and the pages just read go with this one.
            mapped = None
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            tensors[name] = torch.zeros(parameter.shape, device=device, dtype=dtype)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


@cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Stored(NamedTuple):
    """Where and what a tensor is, from its file's header alone."""

    path: Path
    key: str  # its name there
    dtype: str
    shape: list[int]


class StoredTensors(dict[str, Stored]):
    """The tensors of FOLDER/STEM.safetensors, or of shards and their index; none is read until it is asked for."""

    def __init__(self, folder: Path, stem: str):
        single, index = folder / SINGLE.format(stem), folder / INDEX.format(stem)
        if single.exists() or not index.exists():  # transformers, too, prefers the single file
            weight_map, files = {}, [single.name]
        else:
            weight_map = read_index(index)
            files = sorted(set(weight_map.values()))
        for path in [folder / name for name in files]:
            file = open_file(path)
            for name in file.keys():
                if weight_map.get(name, path.name) == path.name:
                    header = file.get_slice(name)
                    self[official(name)] = Stored(path, name, header.get_dtype(), header.get_shape())
        lacking = [f"no {name} in {file}" for name, file in weight_map.items() if official(name) not in self]
        if lacking:
            raise ValueError(f"{index} is wrong, download the model again: there is {', '.join(lacking)}")

    def read(self, name: str, like: Tensor) -> Tensor:
        """The tensor `name`; if `like`, of its shape, is spread over the ranks, this rank's rows of it, spread so."""
        file = open_file(self[name].path)
        if isinstance(like, DTensor) and self[name].shape == list(like.shape):
            return local_shard(file.get_slice(self[name].key).__getitem__, like)
        return file.get_tensor(self[name].key)


def open_file(path: Path) -> safe_open:
    try:
        return safe_open(own_file(path), "pt")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: download the model again") from None
    except (SafetensorError, OSError) as error:
        cure = "delete it (if it is a link, with the file it points to) and download it again"
        raise ValueError(f"{path} is not a whole safetensors file ({error}): {cure}") from None


def _check_tensors(model: Decoder, stored: StoredTensors, folder: Path) -> list[str]:
    """The tensors to load. One error for all that does not fit; a tied model's spare head must equal the embedding."""
    tied, vocab_size = model.config.tie_word_embeddings, model.config.vocab_size
    if tied and EMBEDDING not in stored and HEAD in stored:  # safetensors keeps one name of two
        stored[EMBEDDING] = stored.pop(HEAD)
    expected = {name: list(parameter.shape) for name, parameter in model.named_parameters() if not is_adapter(name)}
    missing = [f"{name} {shape}" for name, shape in expected.items() if name not in stored]
    names, unexpected, misshapen, odd = [], [], [], []
    for name, tensor in stored.items():
        if name in expected:
            names.append(name)
            if tensor.shape != expected[name]:
                misshapen.append(f"{name} {tensor.shape}, not {expected[name]}")
            if tensor.dtype not in DTYPES:
                odd.append(f"{name} {tensor.dtype}")
        # Old checkpoints store RoPE frequencies, and some tied models a head, as Qwen3-0.6B and 1.7B.
        elif not name.endswith(".rotary_emb.inv_freq") and not (name == HEAD and tied):
            unexpected.append(f"{name} {tensor.shape}")
    groups = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": misshapen,
        f"neither {' nor '.join(DTYPES)}": odd,
    }
    lines = []
    for title, problems in groups.items():
        if problems:
            lines.append("\n    ".join([f"  {title}:", *problems]))
    if EMBEDDING in stored and stored[EMBEDDING].shape[0] != vocab_size:
        lines.append(f"  vocab_size is {vocab_size} in config.json, {stored[EMBEDDING].shape[0]} in the checkpoint")
    if lines:
        raise ValueError("\n".join([f"the tensors in {folder} do not fit its config.json", *lines]))
    if HEAD in stored and tied:
        head = open_file(stored[HEAD].path).get_tensor(HEAD)
        embedding = open_file(stored[EMBEDDING].path).get_tensor(EMBEDDING)
        if head.dtype != embedding.dtype or not torch.equal(head, embedding):
            raise ValueError(f"{folder}: config.json says tie_word_embeddings, but {HEAD} differs from {EMBEDDING}")
    return names


def save_model(
    model: Decoder,
    folder: str | Path,
    tokenizer=None,
    *,
    dtype: torch.dtype | None = None,
    writes: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `model` (and `tokenizer`) to `folder` in the official layout, which transformers loads too.

    dtype: of the weights in the files (default: as they are). A model that is spread over ranks is saved by all of them
    together; only the one that `writes` touches the folder.
    One `model.safetensors`, or, beyond `max_shard_bytes`, shards and their index. All files are written and synced
    before the first is renamed into place, and what is left of an earlier save is deleted last: an error leaves an
    earlier model as it was, and a model may be saved over the files it is mapped from. The renames together are not one
    atomic step: whoever needs that saves to a new folder and renames it, as train/run_folder.py does.
    Adapters are merged first, in the model too, for a merged copy beside it may not fit.
    """
    merge(model)
    folder, dtype = Path(folder), dtype or model.model.embed_tokens.weight.dtype
    tensors = {name: tensor.to(dtype) for name, tensor in model.state_dict().items() if not is_adapter(name)}
    config = dict(model.config.raw)
    # transformers renamed torch_dtype to dtype, and reads both.
    for key in {"dtype", "torch_dtype"} & config.keys() or {"torch_dtype"}:
        config[key] = str(dtype).removeprefix("torch.")
    generation = generation_config(model.config, tokenizer)
    with staged(folder, writes) as new:
        written = save_tensors(tensors, new, "model", max_shard_bytes)
        if writes:
            (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if writes and generation is not None:
            (new / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    if not writes:
        return
    for old in folder.iterdir():
        if WEIGHT_FILE.fullmatch(old.name) and old.name not in written:
            old.unlink()
    if tokenizer is not None:
        tokenizer.save(folder)


def generation_config(config: ModelConfig, tokenizer=None) -> dict | None:
    """What generation_config.json held, with every id that ends a turn; None for no such file."""
    eos_ids = set(config.eos_ids)
    if tokenizer is not None:
        eos_ids |= set(tokenizer.eos_ids)
    generation = config.generation or {}
    named = generation if generation.get("eos_token_id") is not None else config.raw
    if eos_ids <= check(named, {"eos_token_id": EOS}, config.source)["eos_token_id"]:
        return config.generation
    return generation | {"eos_token_id": sorted(eos_ids)}


def save_tensors(
    tensors: dict[str, Tensor], folder: Path | None, stem: str, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[str]:
    """Write FOLDER/STEM.safetensors or, beyond `max_shard_bytes`, shards and their index; -> the names of the files.

    Tensors that are sharded over ranks are gathered one file at a time: all ranks call, those without a folder only
    to give their rows.
    """
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    files, index = cut_into_files(sizes, stem, max_shard_bytes)
    for file, names in files.items():
        content = {}
        for name in names:
            tensor = full_tensor(tensors[name])
            if folder is not None:
                content[name] = tensor.cpu()
        if folder is not None:
            write_safetensors(content, folder / file)
    written = list(files)
    if index:
        written.append(INDEX.format(stem))
        if folder is not None:
            (folder / written[-1]).write_text(json.dumps(index, indent=2) + "\n")
    return written


def cut_into_files(sizes: dict[str, int], stem: str, max_shard_bytes: int) -> tuple[dict[str, list[str]], dict | None]:
    """Tensors of `sizes` bytes, in order, to file names and the tensors of each; and the index, if there are several
    files."""
    shards, size = [[]], 0
    for name, nbytes in sizes.items():
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    if len(shards) == 1:
        return {SINGLE.format(stem): shards[0]}, None
    files, weight_map = {}, {}
    for number, names in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        files[file] = names
        weight_map |= dict.fromkeys(names, file)
    return files, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}


def write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Raises OSError where safetensors has an error of its own, as on a full disk."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"writing {path} failed: {error}") from None
