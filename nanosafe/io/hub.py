"""Where models and data sets lie: a local folder or file, or the hub, whose files are fetched once into its cache.

A broken connection resumes where it stopped, and a killed download keeps finished files; as they come one at a time, at
most one begins again. huggingface_hub, which reads HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE, is imported in
functions, because a folder needs none of it and it takes half a second.
"""

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from nanosafe.io.files import read_json
from nanosafe.io.machine import MAIN_RANK
from nanosafe.recipes import ALIASES, TINY_MODELS

# Names of weight files by their stem: "model", or what else lies in a folder.
SINGLE, INDEX = "{}.safetensors", "{}.safetensors.index.json"
MODEL, MODEL_INDEX = SINGLE.format("model"), INDEX.format("model")
SMALL_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
               "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"]  # fmt: skip
REPOSITORY = r"\w[\w.-]*/\w[\w.-]*"  # owner/name
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
# Words of a file's path in a data set, so not the train of `constraints` and `untrained`.
TRAIN = re.compile(r"(?<![a-z])train(?![a-z])", re.IGNORECASE)
TEST = re.compile(r"(?<![a-z])(test|valid|validation|val|dev|eval)(?![a-z])", re.IGNORECASE)


def find_checkpoint(name_or_path: str | Path, *, weights: bool = True) -> Path:
    """The local folder of a model: a folder is itself; an alias or hub id, either with `@revision`, is downloaded.

    Only the config, the tokenizer and, if `weights`, the safetensors that the index names are fetched. Raises
    FileNotFoundError, PermissionError (gated) or ConnectionError, each with the cure.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        steps = sorted(folder.glob("checkpoints/step-*/config.json"), reverse=True)
        models = [*folder.glob("final/config.json"), *steps]
        if models and not (folder / "config.json").exists():
            raise FileNotFoundError(f"{folder} is a run folder, no model: did you mean {models[0].parent}?")
        return folder
    if folder.exists():
        function = "; a reward of your own is FILE.py:FUNCTION" if folder.suffix == ".py" else ""
        raise FileNotFoundError(f"{folder} is a file: give the folder that holds the model's config.json{function}")
    repo, revision = model_reference(str(name_or_path))
    if not re.fullmatch(REPOSITORY, repo):
        name = str(name_or_path).partition("@")[0]
        if "/" in name or name.startswith((".", "~")):
            raise FileNotFoundError(f"folder {folder} does not exist")
        near = ", ".join(get_close_matches(name.lower(), [*TINY_MODELS, *ALIASES], cutoff=0.5) or ALIASES)
        raise FileNotFoundError(
            f"unknown model {str(name_or_path)!r}: no folder, no alias (near: {near}), not like owner/name")
    return _download_checkpoint(repo, revision, weights)


def model_reference(name: str) -> tuple[str, str | None]:
    """A folder's full path, or the repository that an alias or hub id stands for and its revision, if there is one."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder.resolve()), None
    name, _, revision = name.partition("@")
    repo, _, pinned = ALIASES.get(name, name).partition("@")
    return repo, revision or pinned or None


def _download_checkpoint(repo: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download, utils

    if not MAIN_RANK:
        utils.disable_progress_bars()
    wanted, away = [*SMALL_FILES, MODEL_INDEX] if weights else SMALL_FILES, hub_is_away()
    with hub_errors_explained(repo, revision, "config and tokenizer"):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted,
                                        local_files_only=away))
    files = ["config.json"]
    if weights and (folder / MODEL_INDEX).exists():
        files += sorted(set(read_index(folder / MODEL_INDEX).values()))
    elif weights:
        files.append(MODEL)
    for file in files:
        # The folder's name is the commit, and with it nothing is requested that is in the cache.
        _download(repo, file, revision, folder.name, away=away)
    return folder


def _download(
    repo: str, file: str, revision: str | None, commit: str | None, *, away: bool, kind: str = "model"
) -> Path:
    """One file of a repository at `commit`; `revision` is how the user named it. away: take it from the cache alone."""
    from huggingface_hub import hf_hub_download

    shown = repo if kind == "model" else f"{kind}s/{repo}"
    with hub_errors_explained(shown, revision, file):
        return Path(hf_hub_download(repo, file, repo_type=kind, revision=commit, local_files_only=away))


def hub_is_away() -> bool:
    """Whether the hub's host does not answer at all: its library alone would try again for 23 seconds."""
    from huggingface_hub import constants

    hub = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or (getproxies() and not proxy_bypass(hub.hostname)):
        return False
    for timeout in (2, 5):  # seconds
        try:
            socket.create_connection((hub.hostname, hub.port or 443), timeout).close()
            return False
        except OSError:
            continue
    return True


@contextmanager
def hub_errors_explained(repo: str, revision: str | None, file: str) -> Iterator[None]:
    """Turn huggingface_hub's exceptions while it fetches `file` of `repo` into one sentence with the cure."""
    from huggingface_hub import constants, errors

    endpoint, token = constants.ENDPOINT, "run `hf auth login` or set HF_TOKEN"
    offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{endpoint} cannot be reached"
    no_pickle = "; pickle files (.bin, .pt, .pth) are not read, because they can run code"
    explanations = {
        errors.GatedRepoError: PermissionError(
            f"{repo} is gated: accept its licence at {endpoint}/{repo}, then {token}"),
        errors.RepositoryNotFoundError: FileNotFoundError(
            f"{repo} is neither a local folder nor a repository at {endpoint}: check the spelling; "
            f"if it is private, {token}"),
        errors.RevisionNotFoundError: FileNotFoundError(
            f"{repo} has no revision {revision!r}: see {endpoint}/{repo}/commits/main"),
        errors.LocalEntryNotFoundError: ConnectionError(
            f"{offline}, and the cache {constants.HF_HUB_CACHE} lacks {file} of {repo}. Download it where "
            "there is a network and point HF_HOME to that cache, or give a local folder"),
        errors.EntryNotFoundError: FileNotFoundError(
            f"{repo} holds no {file} at revision {revision or 'main'}{no_pickle if file == MODEL else ''}"),
    }  # fmt: skip
    try:
        yield
    except Exception as error:
        # The first class that fits counts, because some are kinds of later ones.
        for kind, explanation in explanations.items():
            if isinstance(error, kind):
                raise explanation from error
        # The HTTP client's own classes change with its version.
        raise ConnectionError(f"downloading {file} of {repo} failed ({error}): mend that and start "
                              "again, finished files are kept") from error


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{path}: field 'weight_map' must be an object that maps tensor names to file names")
    for name, file in weight_map.items():
        # The name becomes a path and is fetched: a slash or ".." would reach beyond the model's own folder.
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise ValueError(
                f"{path}: {name!r} is in {file!r}, which is not a plain *.safetensors file name")
    return weight_map


def find_files(name: str) -> list[Path]:
    """The local file `name`, or the files of a data set on the hub (find_dataset)."""
    path = Path(name).expanduser()
    return [path] if path.is_file() else find_dataset(name)


def find_dataset(name: str) -> list[Path]:
    """The data files of a hub data set, downloaded into the hub's cache.

    name: "owner/name", then perhaps "@revision" and ":file" to choose among several; a file with * stands for all that
    match. Without ":file" it is the only one with the word train in its path, or the only one, unless that is there to
    measure with. Raises FileNotFoundError, PermissionError (gated) or ConnectionError, each with the cure.
    """
    match = re.fullmatch(rf"({REPOSITORY})(?:@([^:]+))?(?::(.+))?", name)
    if Path(name).expanduser().is_dir():
        raise FileNotFoundError(f"{name} is a folder: give a {', '.join(DATA_SUFFIXES)} file")
    if match is None or match[1].endswith(DATA_SUFFIXES):
        raise FileNotFoundError(
            f"there is no file {name}, and it is not a data set on the hub (owner/name) either")
    repo, revision, pattern = match.groups()
    with hub_errors_explained(f"datasets/{repo}", revision, pattern or "its data"):
        commit, files = _list_data_files(repo, revision)
    if pattern and "*" not in pattern:
        chosen = [pattern]
    elif pattern:
        chosen = sorted(file for file in files if fnmatchcase(file, pattern))
    else:
        chosen = _training_file(files)
    if not chosen:
        found = ", ".join(sorted(files)) or "none"
        raise FileNotFoundError(
            f"data set {repo}: which file? found {found}; choose one with {repo}:FILE")
    away = hub_is_away()
    return [_download(repo, file, revision, commit, away=away, kind="dataset") for file in chosen]


def _training_file(files: list[str]) -> list[str]:
    """The only file with the word train in its path, or the only one that is not there to measure with."""
    named = [file for file in files if TRAIN.search(file)]
    if not named and len(files) == 1 and not TEST.search(files[0]):
        return files
    return named if len(named) == 1 else []


def _list_data_files(repo: str, revision: str | None) -> tuple[str | None, list[str]]:
    """A data set's data files on the hub at `revision` or, where it cannot be asked, in the cache at a commit."""
    from huggingface_hub import HfApi, errors, snapshot_download

    try:
        names = [file.rfilename for file in HfApi().dataset_info(repo, revision=revision).siblings]
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):  # gated ones too
        raise
    except Exception:  # the HTTP client's own classes change with the library's version
        folder = Path(snapshot_download(repo, repo_type="dataset", revision=revision,
                                        local_files_only=True))  # fmt: skip
        revision = folder.name
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    # dataset_infos.json is about the data, in older data sets.
    data = [name for name in names if name.endswith(DATA_SUFFIXES)]
    return revision, [name for name in data if name != "dataset_infos.json"]
