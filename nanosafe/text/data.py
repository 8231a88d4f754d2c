"""Datasets to conversations, conversations to token ids.

A row becomes a prompt (what the policy is asked) and, for SFT, a response. Both are tokenised once, apart: the prompt
as the chat template renders it with its generation prompt, the response as the model would have generated it, so that
training targets and rollouts have the same form whatever a template does to finished assistant turns.
"""

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from nanosafe.io.fields import digest
from nanosafe.model.config import ModelConfig
from nanosafe.model.weights import hub_errors_explained
from nanosafe.text.tokenizer import END_THINK, THINK, Tokenizer

DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
# Words of a hub file's path: not the train of `constraints` and `untrained`.
TRAIN = re.compile(r"(?<![a-z])train(?![a-z])", re.IGNORECASE)
TEST = re.compile(r"(?<![a-z])(test|valid|validation|val|dev|eval)(?![a-z])", re.IGNORECASE)
ROLES = ("system", "user", "assistant")  # templates skip a turn of a role they do not know without a word


@dataclass
class Row:
    """One conversation of a data set, with where it came from."""

    messages: list[dict]  # may end with an assistant turn, the SFT target
    source: str  # "FILE, line 3", for messages to the user
    answer: str | None = None  # reference answer, for rule rewards

    @property
    def prompt(self) -> list[dict]:
        """The messages without assistant turns at the end: what the policy is asked."""
        end = len(self.messages)
        while end and self.messages[end - 1]["role"] == "assistant":
            end -= 1
        return self.messages[:end]


@dataclass
class Document:
    """Token ids of a prompt and a response: what packing works on."""

    prompt_ids: list[int]  # at least one, for the last predicts the first of the response
    response_ids: list[int]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass
class Episode(Document):
    """One rollout: a document that the policy wrote the response of."""

    row: int  # number in the step's rollout, over all ranks
    group: int  # its prompt's number in the step
    source: Row  # the prompt as a conversation, and its reference answer
    sampler_logprobs: list[float]
    truncated: bool  # ended by the token limit, not by the policy
    text: str  # the response without the token that ended it
    reward: float = float("nan")


class Pair(NamedTuple):
    """Two responses to a prompt, labelled: `chosen` is the safe or better one."""

    prompt: list[dict]  # messages
    chosen: str
    rejected: str
    category: str | None


def load_rows(name: str) -> list[Row]:
    """Rows of a local .json, .jsonl, .csv or .parquet file, of a data set on the hub (see find_dataset), or of the tiny
    world's SFT set (tiny-star, tiny-star@SEED; see tiny/world.py).

    A row has `messages`, or `prompt` (a text, or messages) or STAR-1's `question`, and perhaps `response` and `answer`.
    A .json file is a list of rows, or has one row per line like .jsonl. Raises what find_dataset raises, or ValueError
    naming the file, the row and the field.
    """
    return [as_row(record, source) for record, source in find_records(name)]


def load_pairs(name: str) -> list[Pair]:
    """Labelled pairs, found like rows: `prompt` (or `question`), the texts `chosen` and `rejected`, perhaps `category`.

    Raises what load_rows raises.
    """
    pairs = []
    for record, source in find_records(name):
        row = as_row(record, source)
        for field, kind in (("chosen", str), ("rejected", str), ("category", str | None)):
            if not isinstance(record.get(field), kind):
                raise ValueError(f"{source}: a labelled pair needs a text in field {field!r}; it has {list(record)}")
        pairs.append(Pair(row.prompt, record["chosen"], record["rejected"], record.get("category")))
    return pairs


def digest_rows(rows: Sequence[Row]) -> str:
    """A hash of what rows say, in their order, so that a run goes on only with the data it began with."""
    return digest([[row.messages, row.answer] for row in rows])


def find_records(name: str) -> list[tuple[dict, str]]:
    """The records of a data set of the tiny world, a local file or the hub, each with its place; at least one."""
    from nanosafe.tiny import world  # here: it uses this file

    if (records := world.dataset(name)) is not None:
        return [(record, f"{name}, row {i}") for i, record in enumerate(records, 1)]
    return [record for path in find_files(name) for record in read_records(path)]


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


def read_records(path: Path) -> list[tuple[dict, str]]:
    """The rows of a file, at least one, each with its place. Raises ValueError naming the place."""
    records = _parse(path)
    if not records:
        raise ValueError(f"{path} holds no rows")
    for record, source in records:
        if not isinstance(record, dict):
            raise ValueError(f"{source}: a row must be a JSON object, found {type(record).__name__}")
    return records


def _parse(path: Path) -> list[tuple[dict, str]]:
    if path.suffix not in DATA_SUFFIXES:
        raise ValueError(f"{path}: data must be a {', '.join(DATA_SUFFIXES)} file")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError(f"{path} is a parquet file: pip install pyarrow") from None
        try:
            records = pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{path} is no parquet file ({error}): download it again") from None
        return [(record, f"{path}, row {i}") for i, record in enumerate(records, 1)]
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets begin their CSV files with a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from None
    if path.suffix == ".csv":
        return _parse_csv(path, text)
    if path.suffix == ".jsonl" or text.lstrip().startswith("{"):
        records = []
        # Not splitlines: U+2028 may stand inside a JSON string.
        for i, line in enumerate(text.split("\n"), 1):
            if line.strip():
                records.append((_parse_json(line, f"{path}, line {i}"), f"{path}, line {i}"))
        return records
    records = _parse_json(text, str(path))
    if not isinstance(records, list):
        raise ValueError(f"{path} must hold a JSON list of rows, or one JSON object per line")
    return [(record, f"{path}, row {i}") for i, record in enumerate(records, 1)]


def _parse_json(text: str, where: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_named_once)
    except (ValueError, RecursionError) as error:  # also a number of over 4,300 digits
        raise ValueError(f"{where}: not valid JSON ({error})") from None


def _named_once(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object's fields. Of a name given twice the json module alone would keep the last."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field {max(names, key=names.count)!r} stands twice in one object")
    return fields


def _parse_csv(path: Path, text: str) -> list[tuple[dict, str]]:
    """Strictly: a quote that is never closed would take row after row into its field."""
    csv.field_size_limit(len(text) + 1)  # a long thought passes the default of 131,072 characters
    reader, records, line = csv.DictReader(io.StringIO(text), strict=True), [], 1
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        names = [name for name in reader.fieldnames if name]
        if len(set(names)) < len(names):
            raise ValueError(f"{path}: the header has a name twice: {', '.join(names)}")
        line = reader.line_num + 1
        for record in reader:
            source = f"{path}, row {len(records) + 1}"
            # The csv module puts None where a field is missing, and over those that are left.
            if None in record or None in record.values():
                more = "more" if None in record else "fewer"
                raise ValueError(f"{source}: {more} fields than the header has (from line {line}); "
                                 "quote fields that hold a comma, and close every quote")
            records.append((record, source))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, row {len(records) + 1} (from line {line}): {error}; a field "
                         'with quotes stands in quotes, and has "" for each') from None
    return records


def as_row(record: dict, source: str) -> Row:
    names = [key for key in ("messages", "prompt", "question") if record.get(key) is not None]
    if not names:
        raise ValueError(f"{source}: needs a field 'messages', 'prompt' or 'question'; it has {list(record)}")
    # The first that says something.
    name = next((key for key in names if record[key] not in ("", [])), names[0])
    value, kinds = record[name], "a list of objects" if name == "messages" else "a text or a list of objects"
    messages = [{"role": "user", "content": value}] if isinstance(value, str) and name != "messages" else value
    well_formed = isinstance(messages, list) and all(
        isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str) for m in messages
    )
    if not well_formed:
        raise ValueError(
            f"{source}: field {name!r} must be {kinds} with a 'role' ({', '.join(ROLES)}) and a 'content' text"
        )
    response, answer = record.get("response"), record.get("answer")
    if response is not None:
        if not isinstance(response, str):
            raise ValueError(f"{source}: field 'response' must be a text")
        messages = [*messages, {"role": "assistant", "content": response}]
    number = type(answer) is int or type(answer) is float and math.isfinite(answer)
    if not (answer is None or isinstance(answer, str) or number):
        raise ValueError(f"{source}: field 'answer' must be a text or a number, not {answer!r:.50}")
    return Row(messages, source, None if answer is None else str(answer))


@contextmanager
def _naming(row: Row) -> Iterator[None]:
    """Errors of templates and tokenizers say what is wrong; this adds where."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{row.source}: {error}") from None


def _check_ids(ids: Sequence[int], tokenizer: Tokenizer) -> None:
    """Raise ValueError for an id without an embedding: of a token that only the tokenizer was given."""
    size, largest = _embeddings(tokenizer), max(ids, default=0)
    if size is not None and largest >= size:
        raise ValueError(
            f"token {tokenizer.decode([largest])!r} has the id {largest}, but {tokenizer.folder} has "
            f"embeddings for {size} (vocab_size): resize them, or use the model's own tokenizer")


@lru_cache(maxsize=4)
def _embeddings(tokenizer: Tokenizer) -> int | None:
    """How many the model in the tokenizer's folder has; None where there is none."""
    is_model = (tokenizer.folder / "config.json").is_file()
    return ModelConfig.from_folder(tokenizer.folder).vocab_size if is_model else None


def encode_prompts(
    rows: Sequence[Row], tokenizer: Tokenizer, max_tokens: int
) -> tuple[list[tuple[Row, list[int]]], str]:
    """Each usable row with its prompt's ids, and what was dropped in words ("" if nothing was).

    Raises ValueError if no row is left, or naming the row of a token without an embedding.
    """
    kept, empty, long = [], 0, 0
    for row in rows:
        if not row.prompt or not row.prompt[-1]["content"].strip():
            empty += 1
            continue
        with _naming(row):
            ids = tokenizer.encode_chat(row.prompt, add_generation_prompt=True)
            _check_ids(ids, tokenizer)
        if len(ids) > max_tokens:
            long += 1
        else:
            kept.append((row, ids))
    report = (
        f"dropped {empty} empty prompts and {long} longer than {max_tokens} tokens, {len(kept)} of {len(rows)} left"
    )
    if not kept:
        raise ValueError(f"no usable prompt: {report}")
    return kept, report if empty or long else ""


def opens_thought(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> bool:
    """Whether the generation prompt ends with <think>, so that a response starts inside the thought (R1-Distill)."""
    return tokenizer.decode(prompt_ids[-8:]).rstrip().endswith(THINK)


def sft_documents(row: Row, tokenizer: Tokenizer, max_tokens: int) -> tuple[list[Document], int]:
    """One document for each assistant turn of a row: the conversation before it as prompt, the turn as response.

    Templates strip thoughts from assistant turns (R1-Distill from all, Qwen3 from earlier ones), so the turn is never
    rendered: its text follows the generation prompt as it stands, then the token that ends a turn. Where the prompt
    opens the thought, the text's own <think> is dropped; a text without one gets an empty thought. A document over
    `max_tokens` loses its end; one whose prompt leaves no room is left out. Returns the documents and how many lost
    tokens or were left out. Raises ValueError for a row without an assistant turn, with an empty one,
    or with a token without an embedding.
    """
    documents, cut = [], 0
    for i, message in enumerate(row.messages):
        if message["role"] != "assistant":
            continue
        text = message["content"]
        if not text.strip():
            raise ValueError(f"{row.source}: the response is empty")
        if any(message.get(name) for name in ("reasoning_content", "thinking", "reasoning")):
            raise ValueError(f"{row.source}: a thought must be part of 'content', as <think>...</think>")
        with _naming(row):
            prompt_ids = tokenizer.encode_chat(row.messages[:i], add_generation_prompt=True)
            if opens_thought(tokenizer, prompt_ids):
                text = text.lstrip()
                has_thought = text.startswith(THINK) or END_THINK in text
                text = text.removeprefix(THINK).removeprefix("\n") if has_thought else f"\n{END_THINK}\n\n{text}"
            response_ids = tokenizer.encode(text) + [turn_end(tokenizer)]
            _check_ids(prompt_ids + response_ids, tokenizer)
        room = max(0, max_tokens - len(prompt_ids))
        documents += [Document(prompt_ids, response_ids[:room])] * (room > 0)
        cut += room < len(response_ids)
    if not documents and not cut:
        raise ValueError(f"{row.source}: no assistant turn to train on (field 'response', or 'messages' with one)")
    return documents, cut


def sft_steps(epochs: int, documents: int, batch_size: int) -> int:
    """Steps of about `epochs` passes: STAR-1's 5 over 1,000 rows in batches of 128 are 39. A single
    pass is not rounded down, so that every document is seen."""
    return max(round(epochs * documents / batch_size), math.ceil(documents / batch_size))


@lru_cache(maxsize=4)
def turn_end(tokenizer: Tokenizer) -> int:
    """The EOS id with which the chat template ends an assistant turn: the first one after the turn's text."""
    probe = "nanosafe-turn"
    text = tokenizer.render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": probe}])
    after = tokenizer.encode(text[text.rindex(probe) + len(probe) :]) if probe in text else []
    for token in after:
        if token in tokenizer.eos_ids:
            return token
    raise ValueError(
        f"the chat template of {tokenizer.folder} ends an assistant turn with none of the EOS ids {tokenizer.eos_ids}: "
        "add the id that does to generation_config.json's eos_token_id"
    )
