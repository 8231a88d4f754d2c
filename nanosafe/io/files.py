"""Reading files that may come from anyone, and writing files that are always wholly old or wholly new."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

MAX_BYTES = 1 << 28  # of a file that is read whole; the largest tokenizer.json have 1 << 25
MAX_DEPTH = 64  # of objects and lists in one another: beyond a thousand, Python itself gives up


def read_json(path: Path) -> dict:
    """The object in `path`; errors are FileNotFoundError or ValueError that name the file."""
    content = read_file(path)
    try:
        value = json.loads(content.decode())
        json.dumps(value, ensure_ascii=False).encode()  # JSON can spell half a surrogate pair
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch it again or mend it") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(value).__name__}")
    if _is_deeper(value, MAX_DEPTH):
        raise ValueError(f"{path} nests more than {MAX_DEPTH} objects and lists: mend it")
    return value


def _is_deeper(value: object, levels: int) -> bool:
    """Whether more than `levels` objects and lists are nested."""
    if not isinstance(value, dict | list):
        return False
    entries = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(entry, levels - 1) for entry in entries)


def read_optional_json(path: Path) -> dict:
    """The object in `path`, which is empty where there is no such file."""
    return read_json(path) if os.path.lexists(path) else {}


def digest(value: object) -> str:
    """A hash of a JSON value, whatever the order of its keys; what JSON does not have counts as its text."""
    text = json.dumps(value, sort_keys=True, default=str)
    return blake2b(text.encode(), digest_size=8).hexdigest()


def read_file(path: Path) -> bytes:
    """The bytes of a file of its own folder (see own_file), of MAX_BYTES at most."""
    if own_file(path).stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has over {MAX_BYTES >> 20} MiB: it is not what its name says")
    return path.read_bytes()


def own_file(path: Path) -> Path:
    """`path` if it is an ordinary file of its folder; else FileNotFoundError or ValueError.

    What a link leads to would be copied into every checkpoint, so links out of the folder are not
    followed, but for those of huggingface_hub's cache, from snapshots/REVISION/ to its own blobs/.
    """
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{path} is missing: official Hugging Face folders have it")
    folder, target = path.parent.resolve(), path.resolve()
    blobs = (folder.parent.parent / "blobs").resolve()
    cached = folder.parent.name == "snapshots" and target.is_relative_to(blobs)
    if not cached and not target.is_relative_to(folder):
        raise ValueError(f"{path} links to {target}, out of its folder: put the file itself there")
    if not target.exists():
        raise FileNotFoundError(f"{path} links to {target}, which is missing: download it again")
    if not target.is_file():
        raise ValueError(f"{path} is not an ordinary file: download it again")
    return path


def read_own(path: Path, fields: Mapping[str, type], cure: str) -> dict:
    """The object, with `fields`, of a file that an earlier run wrote.

    Raises ValueError naming the file, what is wrong and `cure`.
    """
    try:
        value = json.loads(path.read_bytes())
        problem = misfit(value, fields)
    except FileNotFoundError:
        problem = "it is missing"
    except (ValueError, RecursionError) as error:
        problem = f"not valid JSON: {error}"
    if problem:
        raise ValueError(f"{path} is damaged ({problem}): {cure}")
    return value


def misfit(value: object, fields: Mapping[str, type]) -> str | None:
    """What keeps `value` from being an object with these fields, in words; None where nothing does."""
    if not isinstance(value, dict):
        return f"an object was written, found {type(value).__name__}"
    for name, kind in fields.items():
        if type(value.get(name)) is not kind:
            return f"field {name!r} is missing or no {kind.__name__}"
    return None


def write_atomic(path: str | Path, content: bytes | Callable[[Path], object]) -> None:
    """Write `content`, or let it write to the path it is given; `path` is always wholly old or wholly new."""
    path = Path(path)
    with staged(path.parent) as folder, naming(path):
        if callable(content):
            content(folder / path.name)
        else:
            (folder / path.name).write_bytes(content)


@contextmanager
def staged(folder: Path, writes: bool = True) -> Iterator[Path | None]:
    """A new folder inside `folder`; its files are synced, then renamed into `folder`, or after an error deleted.

    None for a rank that does not write.
    """
    if not writes:
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    try:
        with naming(folder):
            yield partial
        # Sorted, so that shards ("model-") come before their index ("model.").
        files = sorted(partial.iterdir())
        for file in files:
            # safetensors makes files that only their owner can read.
            file.chmod(folder.stat().st_mode & 0o666)
            sync(file)
        for file in files:
            os.replace(file, folder / file.name)
        sync(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    with naming(path):
        os.fsync(descriptor)
    os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give `path` to an error in writing, such as of a full disk, which names no file by itself."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
