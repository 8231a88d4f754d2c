"""A tokenizer from a checkpoint's files: tokenizer.json, and the small files beside it by the rules of transformers.

tokenizer_config.json holds special tokens and chat template; in the older layout special_tokens_map.json and
added_tokens.json lie beside it, and chat_template.jinja wins over its template. A conversation becomes the ids that the
model was trained on only if all their tokens are combined exactly as transformers does it.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from nanosafe.io.fields import REQUIRED, Field, check, fields_by_name, flag, whole
from nanosafe.io.files import read_file, read_optional_json
from nanosafe.text.thoughts import END_THINK, THINK

STANDARD_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
                   "mask_token")  # fmt: skip
TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def read_tokenizer_json(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of tokenizer.json alone. Raises FileNotFoundError, or ValueError if it is broken."""
    path = folder / "tokenizer.json"
    if not os.path.lexists(path):
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json: download the complete checkpoint, or write the file once "
            "with transformers (AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER))")
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(read_file(path))
    except ValueError as error:
        raise ValueError(f"{path} is broken ({error}): download it again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def merge_small_files(
    tokenizer: tokenizers.Tokenizer, folder: Path
) -> tuple[dict[str, str], str | None]:
    """Give `tokenizer` the tokens and settings of the small files, any of which may be absent.

    Returns {"bos_token": text, ...} and the chat template. Raises ValueError naming file and field.
    """
    path, older = folder / "tokenizer_config.json", folder / "added_tokens.json"
    config, ids = read_optional_json(path), {}
    if "added_tokens_decoder" not in config:  # the older layout
        config |= read_optional_json(folder / "special_tokens_map.json")
        ids = read_optional_json(older)
        ids = check(ids, dict.fromkeys(ids, whole(0, 1 << 31, REQUIRED)), older)
    names = []
    for name in dict.fromkeys([*STANDARD_TOKENS, *config]):  # the standard ones first
        if name.endswith("_token") and isinstance(config.get(name), str | dict):
            names.append(name)
    values = check(config, FIELDS | dict.fromkeys(names, TOKEN), path)
    named = {name: values[name] for name in names}
    extra = values["extra_special_tokens"] or values["additional_special_tokens"]

    # Tokens that tokenizer.json does not have get the next ids in the order of this dict.
    tokens = _by_text(tokenizer.get_added_tokens_decoder().values())
    tokens |= _by_text(values["added_tokens_decoder"])
    special = _by_text([*named.values(), *extra])
    for text in sorted(ids, key=ids.get):
        # The older file has no flags, so a token is special if another file names it.
        known = text in special
        tokens.setdefault(text, AddedToken(text, normalized=not known, special=known))
    for token in named.values():
        tokens.setdefault(token.content, token).special = True
    for token in extra:
        tokens.setdefault(token.content, token)
    tokenizer.add_tokens(list(tokens.values()))
    tokenizer.encode_special_tokens = values["split_special_tokens"]

    special_tokens = {name: token.content for name, token in named.items()}
    template = _read_template(folder / "chat_template.jinja")
    if template is None:
        template = values["chat_template"].get("default")
    return special_tokens, template


def _by_text(tokens: Iterable[AddedToken]) -> dict[str, AddedToken]:
    return {token.content: token for token in tokens}


def _read_template(path: Path) -> str | None:
    if not os.path.lexists(path):
        return None
    try:
        return read_file(path).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): download it again") from None


def special_ids(tokenizer: tokenizers.Tokenizer) -> set[int]:
    """The ids of special tokens, without the tags of a thought: graders tell thought from answer by them."""
    tokens = tokenizer.get_added_tokens_decoder().items()
    return {i for i, token in tokens if token.special and token.content not in (THINK, END_THINK)}


def control_pattern(tokenizer: tokenizers.Tokenizer) -> re.Pattern:
    """What finds the added tokens in a text, but for the tags of a thought and single characters."""
    tokens = tokenizer.get_added_tokens_decoder().values()
    texts = {token.content.strip() for token in tokens} - {THINK, END_THINK}
    longer = [re.escape(text) for text in sorted(texts) if len(text) > 1]
    return re.compile("|".join(longer) or "(?!)")  # (?!) is found nowhere


# The fields of tokenizer_config.json and special_tokens_map.json. Each function reads one form, and
# gives None for another.


def _read_token(value: Any, **flags: bool) -> AddedToken | None:
    """A token from its text, or from an object with flags; `flags` win."""
    if isinstance(value, str):
        value = {"content": value}
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        return None
    own_flags = {name: value[name] for name in TOKEN_FLAGS if name in value}
    try:
        return AddedToken(value["content"], **own_flags | flags)
    except TypeError:  # a flag that is neither true nor false
        return None


def _read_special_token(value: Any) -> AddedToken | None:
    return _read_token(value, special=True)


def _read_special_tokens(value: Any) -> list[AddedToken] | None:
    if isinstance(value, dict):
        value = list(value.values())
    tokens = list(map(_read_special_token, value)) if isinstance(value, list) else [None]
    return None if None in tokens else tokens


def _read_declared_tokens(value: Any) -> list[AddedToken] | None:
    """The tokens of {id: object with flags}, by id."""
    try:
        entries = [value[key] for key in sorted(value, key=int)]
    except (IndexError, TypeError, ValueError):
        return None
    tokens = [_read_token(entry) if isinstance(entry, dict) else None for entry in entries]
    return None if None in tokens else tokens


def _read_templates(value: Any) -> dict[str, str] | None:
    """Name -> template; some files have a list of objects, and most have one text."""
    if isinstance(value, str):
        return {"default": value}
    try:
        if isinstance(value, list):
            value = {entry["name"]: entry["template"] for entry in value}
        return value if all(isinstance(text, str) for text in value.values()) else None
    except (AttributeError, KeyError, TypeError):
        return None


TOKEN = Field("a text, or an object with 'content' and flags that are true or false",
              _read_special_token)  # fmt: skip
FIELDS = fields_by_name({
    " ".join(STANDARD_TOKENS): TOKEN,
    "extra_special_tokens additional_special_tokens":
        Field("a list or an object of tokens", _read_special_tokens, ()),
    "added_tokens_decoder":
        Field("an object of ids, each with an object with 'content' and flags", _read_declared_tokens, ()),
    "chat_template": Field("a template, or templates by name", _read_templates, {}),
    "split_special_tokens": flag(False),
})  # fmt: skip
