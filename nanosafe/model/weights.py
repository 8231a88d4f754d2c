"""Weights: stream a folder's safetensors into the decoder, and save them back.

Only safetensors and JSON are read, never pickle. A load is a strict copy: every tensor of the model must be in the
checkpoint with its shape, and nothing else may be. On the CPU, in the dtype of the file, a parameter is the
memory-mapped file itself: a model starts without copying its weights. Of a model that is spread over several ranks,
each reads its own rows, and the files are written from the ranks' rows one at a time.
"""

import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from nanosafe.io.fields import EOS, check
from nanosafe.io.files import own_file, staged
from nanosafe.io.hub import INDEX, SINGLE, read_index
from nanosafe.io.machine import MAIN_RANK
from nanosafe.model.config import ModelConfig
from nanosafe.model.decoder import Decoder
from nanosafe.parallel import Ranks, full_tensor, local_shard, shard

MAX_SHARD_BYTES = 5 * 10**9
DTYPES = ("F32", "F16", "BF16")  # safetensors' names of what a checkpoint may hold
# transformers 5's names of some tensors of Granite 4, and those that the files on the hub, and transformers' own, have.
RENAMED = {"experts.gate_up_proj": "input_linear.weight", "experts.down_proj": "output_linear.weight",
           "router.weight": "router.layer.weight"}  # fmt: skip
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_checkpoint(
    folder: str | Path, device: str | torch.device, dtype: torch.dtype, ranks: Ranks | None = None
) -> Decoder:
    """The model in `folder`, whichever head it has, on `device` in `dtype`, in eval mode; ranks: as in load_model.

    On the CPU, tensors already in `dtype` are views of a private (copy-on-write) mapping: changing them never changes
    the file. All others are converted one by one: peak memory is the model and its largest stored tensor.
    Raises ValueError listing every missing, unexpected, misshapen or quantised tensor, or naming the broken file.
    """
    folder, device = Path(folder), torch.device(device)
    config = ModelConfig.from_folder(folder)
    if MAIN_RANK and config.rope and config.rope.attn_factor != 1:
        _say_once(f"{config.source}: rope_scaling's attn_factor is multiplied in, as in YaRN's own "
                  "code and vLLM; transformers leaves it out, so its logits differ")
    with torch.device("meta"), _NoInit():
        model = Decoder(config)
    stored = StoredTensors(folder, "model")
    names = _check_tensors(model, stored, folder)
    progress = tqdm(names, f"loading {folder.name}", unit="tensor", delay=2, disable=not MAIN_RANK)
    if ranks is not None and ranks.world > 1:
        shard(model, ranks, dtype)
        parameters = dict(model.to_empty(device=device).named_parameters())
        with torch.no_grad():
            for name in progress:
                parameters[name].copy_(stored.read(name, like=parameters[name]))
        return model.eval()
    tensors, opened = {}, None
    for name in progress:
        if stored[name].path != opened:
            opened = stored[name].path
            file = _open(opened)
        tensors[name] = file.get_tensor(stored[name].key)
        if device.type != "cpu" or tensors[name].dtype != dtype:
            tensors[name] = tensors[name].to(device).to(dtype)
            opened = None  # the next tensor gets a mapping of its own, and the pages just read go with this one
    model.load_state_dict(tensors, assign=True)
    return model.eval()


@cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _NoInit(TorchFunctionMode):
    """Skips the embedding's random values: nothing keeps them, and on the meta device they import 2 s of torch."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return kwargs["tensor"] if function is torch.nn.init.normal_ else function(*args, **(kwargs or {}))


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
        for path in [folder / file for file in files]:
            file = _open(path)
            for name in file.keys():
                if weight_map.get(name, path.name) == path.name:
                    header = file.get_slice(name)
                    self[official(name)] = Stored(path, name, header.get_dtype(), header.get_shape())
        if lacking := [f"{name} in {file}" for name, file in weight_map.items() if official(name) not in self]:
            raise ValueError(f"{index} is wrong, download the model again: there is no {', no '.join(lacking)}")

    def read(self, name: str, like: Tensor) -> Tensor:
        """The tensor `name`; if `like`, of its shape, is spread over the ranks, this rank's rows of it, spread so."""
        file = _open(self[name].path)
        if isinstance(like, DTensor) and self[name].shape == list(like.shape):
            return local_shard(file.get_slice(self[name].key).__getitem__, like)
        return file.get_tensor(self[name].key)


def official(name: str) -> str:
    """The name that files on the hub have for a tensor."""
    layer, found, rest = name.partition(".block_sparse_moe.")
    return layer + found + RENAMED.get(rest, rest)


def _open(path: Path) -> safe_open:
    try:
        return safe_open(own_file(path), "pt")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: download the model again") from None
    except (SafetensorError, OSError) as error:
        cure = "delete it (if it is a link, with the file it points to) and download it again"
        raise ValueError(f"{path} is not a whole safetensors file ({error}): {cure}") from None


def _check_tensors(model: Decoder, stored: StoredTensors, folder: Path) -> list[str]:
    """The tensors to load. One error for all that does not fit; a tied model's spare head must equal the embedding."""
    expected = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    tied = model.config.tie_word_embeddings
    if tied and EMBEDDING not in stored and HEAD in stored:  # safetensors keeps one name of two
        stored[EMBEDDING] = stored.pop(HEAD)
    # Spare: RoPE frequencies, which old checkpoints store; the head of a tied model, as in Qwen3-0.6B and 1.7B.
    spare = {name for name in stored if name.endswith(".rotary_emb.inv_freq") or name == HEAD and tied}
    both = [(name, stored[name], shape) for name, shape in expected.items() if name in stored]
    groups = {
        "missing": [f"{name} {shape}" for name, shape in expected.items() if name not in stored],
        "unexpected": [f"{name} {s.shape}" for name, s in stored.items() if name not in expected.keys() | spare],
        "of another shape": [f"{name} {s.shape}, not {shape}" for name, s, shape in both if s.shape != shape],
        f"neither {' nor '.join(DTYPES)}": [f"{name} {s.dtype}" for name, s, _ in both if s.dtype not in DTYPES],
    }
    lines = ["\n    ".join([f"  {title}:", *names]) for title, names in groups.items() if names]
    vocab_size = stored[EMBEDDING].shape[0] if EMBEDDING in stored else model.config.vocab_size
    if vocab_size != model.config.vocab_size:
        lines.append(f"  vocab_size is {model.config.vocab_size} in config.json, {vocab_size} in the checkpoint")
    if lines:
        raise ValueError("\n".join([f"the tensors in {folder} do not fit its config.json", *lines]))
    if HEAD in spare:
        head, embedding = (_open(stored[name].path).get_tensor(name) for name in (HEAD, EMBEDDING))
        if head.dtype != embedding.dtype or not torch.equal(head, embedding):
            raise ValueError(f"{folder}: config.json says tie_word_embeddings, but {HEAD} differs from {EMBEDDING}")
    return [name for name in stored if name in expected]


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
    """
    folder, dtype = Path(folder), dtype or model.model.embed_tokens.weight.dtype
    tensors = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    config = dict(model.config.raw)
    for key in {"dtype", "torch_dtype"} & config.keys() or {"torch_dtype"}:  # transformers renamed it, and reads both
        config[key] = str(dtype).removeprefix("torch.")
    generation = generation_config(model.config, tokenizer)
    jsons = {"config.json": config, "generation_config.json": generation}
    with staged(folder, writes) as new:
        written = save_tensors(tensors, new, "model", max_shard_bytes)
        for file, content in jsons.items():
            if writes and content is not None:
                (new / file).write_text(json.dumps(content, indent=2) + "\n")
    if not writes:
        return
    ours = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
    for old in folder.iterdir():
        if ours.fullmatch(old.name) and old.name not in written:
            old.unlink()
    if tokenizer is not None:
        tokenizer.save(folder)


def generation_config(config: ModelConfig, tokenizer=None) -> dict | None:
    """What generation_config.json held, with every id that ends a turn; None for no such file."""
    ids = set(config.eos_ids) | set(tokenizer.eos_ids if tokenizer else ())
    held = config.generation or {}
    named = held if held.get("eos_token_id") is not None else config.raw
    if ids <= check(named, {"eos_token_id": EOS}, config.source)["eos_token_id"]:
        return config.generation
    return held | {"eos_token_id": sorted(ids)}


def save_tensors(
    tensors: dict[str, Tensor], folder: Path | None, stem: str, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[str]:
    """Write FOLDER/STEM.safetensors or, beyond `max_shard_bytes`, shards and their index; -> the names of the files.

    Tensors that are spread over ranks are made whole one file at a time: all ranks call, those without a folder only
    to give their rows.
    """
    files, index = cut_into_files({name: tensor.nbytes for name, tensor in tensors.items()}, stem, max_shard_bytes)
    for file, names in files.items():
        content = {}
        for name in names:
            tensor = full_tensor(tensors[name])
            if folder is not None:
                content[name] = tensor.cpu()
        if folder is not None:
            write_safetensors(content, folder / file)
    if folder is not None and index:
        (folder / INDEX.format(stem)).write_text(json.dumps(index, indent=2) + "\n")
    return [*files, INDEX.format(stem)] if index else list(files)


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
    files = {f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards)}
    weight_map = {name: file for file, names in files.items() for name in names}
    return files, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}


def write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Raises OSError where safetensors has an error of its own, as on a full disk."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"writing {path} failed: {error}") from None


