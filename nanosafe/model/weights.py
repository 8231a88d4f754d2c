"""Weights: find a model (folder, alias or hub id), stream its safetensors into the decoder, save them back.

Only safetensors and JSON are read, never pickle. A load is a strict copy: every tensor of the model must be in the
checkpoint with its shape, and nothing else may be. On the CPU, in the dtype of the file, a parameter is the
memory-mapped file itself: a model starts without copying its weights. Of a model that is spread over several ranks,
each reads its own rows, and the files are written from the ranks' rows one at a time.
"""

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from difflib import get_close_matches
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

from nanosafe.io.fields import EOS, check, own_file, read_json
from nanosafe.model.config import ALIASES, ModelConfig
from nanosafe.model.decoder import Decoder
from nanosafe.parallel import Ranks, own_part, shard, whole

SINGLE, INDEX = "{}.safetensors", "{}.safetensors.index.json"  # of a stem: "model", or what else lies in a folder
MODEL, MODEL_INDEX = SINGLE.format("model"), INDEX.format("model")
MAX_SHARD_BYTES = 5 * 10**9
SMALL_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
               "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"]  # fmt: skip
DTYPES = ("F32", "F16", "BF16")  # safetensors' names of what a checkpoint may hold
# transformers 5's names of some tensors of Granite 4, and those that the files on the hub, and transformers' own, have.
RENAMED = {"experts.gate_up_proj": "input_linear.weight", "experts.down_proj": "output_linear.weight",
           "router.weight": "router.layer.weight"}  # fmt: skip
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MAIN_RANK = os.environ.get("RANK", "0") == "0"  # torchrun sets it; the other ranks show no progress bars


def find_checkpoint(name_or_path: str | Path, *, weights: bool = True) -> Path:
    """The local folder of a model: a folder is itself; an alias or hub id, either with `@revision`, is downloaded.

    Only the config, the tokenizer and, if `weights`, the safetensors that the index names are fetched, into
    huggingface_hub's cache (HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE work). A broken connection resumes where it
    stopped; a killed download keeps finished files, and since shards come one at a time, at most one begins again.
    Raises FileNotFoundError, PermissionError (gated) or ConnectionError, each with the cure.
    """
    name, folder = str(name_or_path), Path(name_or_path).expanduser()
    if folder.is_dir():
        steps = sorted(folder.glob("checkpoints/step-*/config.json"), reverse=True)
        inside = [*folder.glob("final/config.json"), *steps]
        if inside and not (folder / "config.json").exists():
            raise FileNotFoundError(f"{folder} is a run folder, no model: did you mean {inside[0].parent}?")
        return folder
    if folder.exists():
        raise FileNotFoundError(f"{folder} is a file: give the folder that holds the model's config.json")
    from nanosafe.tiny import build  # here: it uses this file

    if build.is_tiny(name):
        return build.tiny_checkpoint(name)
    base, _, revision = name.partition("@")
    repo, _, pinned = ALIASES.get(base, base).partition("@")
    revision = revision or pinned or None
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        if "/" in base or base.startswith((".", "~")):
            raise FileNotFoundError(f"folder {folder} does not exist")
        near = ", ".join(get_close_matches(base.lower(), ALIASES, cutoff=0.5) or ALIASES)
        raise FileNotFoundError(f"unknown model {name!r}: no folder, no alias (near: {near}), not like owner/name")
    from huggingface_hub import hf_hub_download, snapshot_download, utils  # half a second that a folder does not need

    if not MAIN_RANK:
        utils.disable_progress_bars()
    with hub_errors_explained(repo, revision, "config and tokenizer"):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=SMALL_FILES + [MODEL_INDEX] * weights))
    files = sorted(set(_read_index(folder / MODEL_INDEX).values())) if (folder / MODEL_INDEX).exists() else [MODEL]
    for file in ["config.json"] + files * weights:
        with hub_errors_explained(repo, revision, file):
            hf_hub_download(repo, file, revision=folder.name)  # the commit: no request for what is in the cache
    return folder


@contextmanager
def hub_errors_explained(repo: str, revision: str | None, file: str) -> Iterator[None]:
    """Turns huggingface_hub's exceptions while it fetches `file` of `repo` into one sentence with the cure."""
    from huggingface_hub import constants, errors

    endpoint, token = constants.ENDPOINT, "run `hf auth login` or set HF_TOKEN"
    try:
        yield
    except errors.GatedRepoError:
        raise PermissionError(f"{repo} is gated: accept its licence at {endpoint}/{repo}, then {token}") from None
    except errors.RepositoryNotFoundError:
        cure = f"check the spelling; if it is private, {token}"
        raise FileNotFoundError(f"{repo} is neither a local folder nor a repository at {endpoint}: {cure}") from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{repo} has no revision {revision!r}: see {endpoint}/{repo}/commits/main") from None
    except errors.LocalEntryNotFoundError:  # a kind of EntryNotFoundError: the hub could not be asked
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{endpoint} cannot be reached"
        raise ConnectionError(
            f"{reason}, and the cache {constants.HF_HUB_CACHE} lacks {file} of {repo}. Download it where there is a "
            "network and point HF_HOME to that cache, or give a local folder"
        ) from None
    except errors.EntryNotFoundError:
        pickles = "; pickle files (.bin, .pt, .pth) are not read, because they can run code" if file == MODEL else ""
        raise FileNotFoundError(f"{repo} holds no {file} at revision {revision or 'main'}{pickles}") from None
    except Exception as error:  # the HTTP client's own classes change with the library's version
        cure = "mend that and start again, finished files are kept"
        raise ConnectionError(f"downloading {file} of {repo} failed ({error}): {cure}") from error


def load_model(
    name_or_path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    ranks: Ranks | None = None,
) -> Decoder:
    """The language model `name_or_path` (see find_checkpoint) on `device` in `dtype`, in eval mode.

    What ends its turn by the folder's tokenizer is among the model's `config.eos_ids`.
    ranks: of several, each keeps its rows of every tensor, in float32, and computes in `dtype` (distributed.shard).
    Raises what find_checkpoint and load_checkpoint raise, and ValueError for a reward model.
    """
    folder = find_checkpoint(name_or_path)
    if ModelConfig.from_folder(folder).num_labels:
        raise ValueError(f"{name_or_path} is a reward model (it has a score head): use load_reward_model")
    model = load_checkpoint(folder, device, dtype, ranks)
    from nanosafe.text.tokenizer import Tokenizer  # here: it uses this file

    with suppress(ValueError, OSError):  # without a tokenizer, or with a broken one, it is a model
        model.config = replace(model.config, eos_ids=Tokenizer(folder).eos_ids)
    return model


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
            weight_map = _read_index(index)
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
            return own_part(file.get_slice(self[name].key).__getitem__, like)
        return file.get_tensor(self[name].key)


def official(name: str) -> str:
    """The name that files on the hub have for a tensor."""
    layer, found, rest = name.partition(".block_sparse_moe.")
    return layer + found + RENAMED.get(rest, rest)


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: field 'weight_map' must be an object that maps tensor names to file names")
    for name, file in weight_map.items():
        # The name becomes a path and is fetched: a slash or ".." would reach beyond the model's own folder.
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise ValueError(f"{path}: {name!r} is in {file!r}, which is not a plain *.safetensors file name")
    return weight_map


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
    atomic step: whoever needs that saves to a new folder and renames it, as checkpoint.py does.
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
            tensor = whole(tensors[name])
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


def write_atomic(path: str | Path, content: bytes | Callable[[Path], object]) -> None:
    """Write `content`, or let it write to the path it is given; `path` is always wholly old or wholly new."""
    path = Path(path)
    with staged(path.parent) as new, naming(path):
        content(new / path.name) if callable(content) else (new / path.name).write_bytes(content)


@contextmanager
def staged(folder: Path, writes: bool = True) -> Iterator[Path | None]:
    """A new folder inside `folder`; its files are synced, then renamed into `folder`, or after an error deleted.

    None for a rank that does not write.
    """
    if not writes:
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    try:
        with naming(folder):
            yield new
        files = sorted(new.iterdir())  # so that shards ("model-") come before their index ("model.")
        for file in files:
            file.chmod(folder.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read
            sync(file)
        for file in files:
            os.replace(file, folder / file.name)
        sync(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    with naming(path):
        os.fsync(descriptor)
    os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error in writing, such as of a full disk, names no file by itself: it is given `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
