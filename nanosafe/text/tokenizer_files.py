"""A tokenizer from a checkpoint's files: tokenizer.json, and the small files beside it by the rules of transformers.

tokenizer_config.json holds special tokens and chat template; in the older layout special_tokens_map.json and
added_tokens.json lie beside it, and chat_template.jinja wins over its template. A conversation becomes the ids that the
model was trained on only if all their tokens are combined exactly as transformers does it.
"""

import os
import re
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from nanosafe.io.fields import OBJECT, REQUIRED, Field, check, fields_by_name, flag, whole
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
    path = folder / "tokenizer_config.json"
    config, ids = read_optional_json(path), {}
    if "added_tokens_decoder" not in config:  # the older layout
        config |= read_optional_json(folder / "special_tokens_map.json")
        ids = read_optional_json(folder / "added_tokens.json")
        id_fields = dict.fromkeys(ids, whole(0, 1 << 31, REQUIRED))
        ids = check(ids, id_fields, folder / "added_tokens.json")
    names = []
    for name in dict.fromkeys([*STANDARD_TOKENS, *config]):  # the standard ones first
        if name.endswith("_token") and isinstance(config.get(name), str | dict):
            names.append(name)
    values = check(config, FIELDS | dict.fromkeys(names, TOKEN), path)
    named = {name: _special_token(values[name]) for name in names}
    extra = values["extra_special_tokens"] or values["additional_special_tokens"]
    extra = [_special_token(token) for token in _entries(extra)]

    # Tokens that tokenizer.json does not have get the next ids in the order of this dict.
    tokens = {}
    for token in tokenizer.get_added_tokens_decoder().values():
        tokens[token.content] = token
    tokens |= _declared_tokens(values["added_tokens_decoder"], path)
    special = {token.content for token in [*named.values(), *extra]}
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
    return special_tokens, values["chat_template"] if template is None else template


def _special_token(token: str | dict) -> AddedToken:
    """A special token, which the files write as a string or as an object with flags."""
    if isinstance(token, str):
        return AddedToken(token, special=True)
    flags = {name: token[name] for name in TOKEN_FLAGS if name in token}
    return AddedToken(token["content"], **flags | {"special": True})


def _declared_tokens(decoder: dict, path: Path) -> dict[str, AddedToken]:
    """Text -> token of the field added_tokens_decoder, by id; its flags win over those of tokenizer.json."""
    tokens = {}
    try:
        for key in sorted(decoder, key=int):
            flags = dict(decoder[key])
            text = flags.pop("content")
            tokens[text] = AddedToken(text, **flags)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: field 'added_tokens_decoder' must map ids to objects with 'content' and flags "
            f"({type(error).__name__}: {error}): download it again") from None
    return tokens


def _read_template(path: Path) -> str | None:
    if not os.path.lexists(path):
        return None
    try:
        return read_file(path).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): download it again") from None


def special_ids(tokenizer: tokenizers.Tokenizer) -> set[int]:
    """The ids of special tokens, without the tags of a thought: graders tell thought from answer by them."""
    ids = set()
    for token_id, token in tokenizer.get_added_tokens_decoder().items():
        if token.special and token.content not in (THINK, END_THINK):
            ids.add(token_id)
    return ids


def control_pattern(tokenizer: tokenizers.Tokenizer) -> re.Pattern:
    """What finds the added tokens in a text, but for the tags of a thought and single characters."""
    texts = set()
    for token in tokenizer.get_added_tokens_decoder().values():
        text = token.content.strip()
        if len(text) > 1 and text not in (THINK, END_THINK):
            texts.add(re.escape(text))
    return re.compile("|".join(sorted(texts)) or "(?!)")  # (?!) is found nowhere


# The fields of tokenizer_config.json and special_tokens_map.json


def _is_token(value: Any) -> bool:
    if not isinstance(value, dict):
        return isinstance(value, str)
    flags = [value[name] for name in TOKEN_FLAGS if name in value]
    return isinstance(value.get("content"), str) and all(isinstance(flag, bool) for flag in flags)


def _entries(tokens: list | dict) -> list:
    return list(tokens.values()) if isinstance(tokens, dict) else tokens


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list | dict) and all(map(_is_token, _entries(value)))


def _named_templates(value: Any) -> list[tuple]:
    """(name, template) of each in the three forms that the files have."""
    if isinstance(value, dict):
        return list(value.items())
    if not isinstance(value, list):
        return [("default", value)]
    pairs = []
    for entry in value:
        named = isinstance(entry, dict)
        pairs.append((entry.get("name"), entry.get("template")) if named else (None, None))
    return pairs


def _are_templates(value: Any) -> bool:
    for name, template in _named_templates(value):
        if not isinstance(name, str) or not isinstance(template, str):
            return False
    return True


def _default_template(value: Any) -> str | None:
    return dict(_named_templates(value)).get("default")


TOKEN = Field("a text, or an object with 'content' and flags that are true or false", _is_token)
FIELDS = fields_by_name({
    " ".join(STANDARD_TOKENS): TOKEN,
    "extra_special_tokens additional_special_tokens":
        Field("a list or an object of tokens", _are_tokens, ()),
    "added_tokens_decoder": OBJECT,
    "chat_template":
        Field("a template, or templates by name", _are_templates, None, _default_template),
    "split_special_tokens": flag(False),
})  # fmt: skip
