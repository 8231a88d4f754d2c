"""Where models and data sets lie: a local folder or file, or the hub, whose files are fetched once into its cache."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

from nanosafe.io.files import read_json
from nanosafe.io.machine import MAIN_RANK
from nanosafe.recipes import ALIASES

SINGLE, INDEX = "{}.safetensors", "{}.safetensors.index.json"  # of a stem: "model", or what else lies in a folder
MODEL, MODEL_INDEX = SINGLE.format("model"), INDEX.format("model")
SMALL_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
               "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"]  # fmt: skip
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
# Words of a hub file's path: not the train of `constraints` and `untrained`.
TRAIN = re.compile(r"(?<![a-z])train(?![a-z])", re.IGNORECASE)
TEST = re.compile(r"(?<![a-z])(test|valid|validation|val|dev|eval)(?![a-z])", re.IGNORECASE)


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
    files = sorted(set(read_index(folder / MODEL_INDEX).values())) if (folder / MODEL_INDEX).exists() else [MODEL]
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


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: field 'weight_map' must be an object that maps tensor names to file names")
    for name, file in weight_map.items():
        # The name becomes a path and is fetched: a slash or ".." would reach beyond the model's own folder.
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise ValueError(f"{path}: {name!r} is in {file!r}, which is not a plain *.safetensors file name")
    return weight_map


def find_files(name: str) -> list[Path]:
    """The local file `name`, or the files of a data set on the hub (find_dataset)."""
    path = Path(name).expanduser()
    return [path] if path.is_file() else find_dataset(name)


def find_dataset(name: str) -> list[Path]:
    """The data file of a hub data set, downloaded into the hub's cache: the only one with the word
    train in its path, or the only one, unless it is there to measure with.

    name: "owner/name", then perhaps "@revision" and ":file" to choose among several; a file with * stands for all that
    match. Raises FileNotFoundError, PermissionError (gated) or ConnectionError, each with the cure.
    """
    match = re.fullmatch(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^:]+))?(:(?P<file>.+))?", name)
    if Path(name).expanduser().is_dir():
        raise FileNotFoundError(f"{name} is a folder: give a {', '.join(DATA_SUFFIXES)} file")
    if match is None or match["repo"].endswith(DATA_SUFFIXES):
        raise FileNotFoundError(f"there is no file {name}, and it is not a data set on the hub (owner/name) either")
    from huggingface_hub import hf_hub_download  # slow to import, and a local file needs none of it

    repo, revision, file = match["repo"], match["revision"], match["file"]
    with hub_errors_explained(f"datasets/{repo}", revision, file or "its data"):
        found_at, files = _hub_files(repo, revision)
    if file:
        chosen = sorted(f for f in files if fnmatchcase(f, file)) if "*" in file else [file]
    else:
        chosen = [f for f in files if TRAIN.search(f)]
        if not chosen and len(files) == 1 and not TEST.search(files[0]):
            chosen = files
    if not chosen or not file and len(chosen) > 1:
        found = ", ".join(sorted(files)) or "none"
        raise FileNotFoundError(f"data set {repo}: which file? found {found}; choose one with {repo}:FILE")
    paths = []
    for name in chosen:
        with hub_errors_explained(f"datasets/{repo}", revision, name):
            paths.append(Path(hf_hub_download(repo, name, repo_type="dataset", revision=found_at)))
    return paths


def _hub_files(repo: str, revision: str | None) -> tuple[str | None, list[str]]:
    """A data set's data files on the hub at `revision` or, where it cannot be asked, in the cache at a commit."""
    from huggingface_hub import HfApi, errors, snapshot_download

    try:
        names = [file.rfilename for file in HfApi().dataset_info(repo, revision=revision).siblings]
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):  # gated ones too
        raise
    except Exception:  # the HTTP client's own classes change with the library's version
        folder = Path(snapshot_download(repo, repo_type="dataset", revision=revision, local_files_only=True))
        revision, names = folder.name, [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    # dataset_infos.json is about the data, in older data sets.
    return revision, [name for name in names if name.endswith(DATA_SUFFIXES) and name != "dataset_infos.json"]
