"""Text to token ids and back, from a checkpoint's own files.

tokenizer.json is read by the `tokenizers` library, and template.py renders the chat template in a process of its own;
this file adds the rules by which transformers combines a checkpoint's small JSON files, because a conversation must
become exactly the ids that the model was trained on. No special token is ever added to a text: templates write their
own BOS.
Left out: tokenizers without a tokenizer.json, and templates for tools.
"""

import os
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from nanosafe.io import fields
from nanosafe.io.fields import CONFIG, EOS, STANDARD_TOKENS, TOKEN, check
from nanosafe.io.files import read_file, read_json, write_atomic
from nanosafe.io.worker import Worker, WorkerError
from nanosafe.text.thoughts import END_THINK, THINK

# A tokenizer in the official layout; the vocabulary files beside tokenizer.json are for other libraries.
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
         "chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model")

# One for all tokenizers. A render takes well under a millisecond; the bounds are for templates that mean harm.
_renderer = Worker(Path(__file__).with_name("template.py"), seconds=5.0, memory_bytes=1 << 30)


class Tokenizer:
    """The tokenizer in a folder.

    Attributes:
        eos_ids: the ids that end a response, by config.json, generation_config.json and the tokenizer itself; sorted.
        special_tokens: {"bos_token": text, ...}; the chat template sees them as variables.
        chat_template: Jinja2 source; None if the checkpoint has no template.
        template_vars: variables of the template that every render has, unless it is given others; see think().
        embeddings: how many the model in the folder has, by config.json; None if there is none.
        date: the day that some templates write (Llama 3.2, Granite 3.3), as 2026-01-31; today first.

    Raises:
        FileNotFoundError: there is no tokenizer.json.
        ValueError: one of the files is broken.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        # Kept in memory: save() must work when a training run has meanwhile removed the checkpoint it resumed from.
        present = [name for name in FILES if os.path.lexists(self.folder / name)]
        self._files = {name: read_file(self.folder / name) for name in present}
        if "tokenizer.json" not in self._files:
            raise FileNotFoundError(
                f"{self.folder} has no tokenizer.json: download the complete checkpoint, or write the file once with "
                "transformers (AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER))")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(self._files["tokenizer.json"])
        except ValueError as error:
            raise ValueError(f"{self.folder / 'tokenizer.json'} is broken ({error}): download it again") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

        config, added = self._read_json("tokenizer_config.json"), {}
        if "added_tokens_decoder" not in config:  # the older layout
            config |= self._read_json("special_tokens_map.json")
            added = self._read_json("added_tokens.json")
            ids = dict.fromkeys(added, fields.whole(0, 1 << 31, fields.REQUIRED))
            added = check(added, ids, self.folder / "added_tokens.json")
        tokens = {name: token for name, token in config.items()
                  if name.endswith("_token") and isinstance(token, (str, dict))}
        table = fields.TOKENIZER | dict.fromkeys(tokens, TOKEN)
        values = check(config, table, self.folder / "tokenizer_config.json")
        in_order = sorted(tokens.items(), key=_standard_first)
        named = {name: _added_token(token) for name, token in in_order}
        self.special_tokens = {name: token.content for name, token in named.items()}
        self._skipped = self._special_ids()
        self._merge_added_tokens(values, list(named.values()), added)
        self._skipped |= self._special_ids()  # what tokenizer.json calls special stays so
        self._tokenizer.encode_special_tokens = values["split_special_tokens"]
        contents = {token.content.strip() for token in self._tokenizer.get_added_tokens_decoder().values()}
        controls = sorted(text for text in contents - {THINK, END_THINK} if len(text) > 1)
        self._controls = re.compile("|".join(map(re.escape, controls)) or "(?!)")  # (?!) is found nowhere
        self.chat_template = self._find_template(values)
        self.template_vars: dict[str, Any] = {}
        self.date = date.today().isoformat()

        sizes = check(self._read_json("config.json"), {"vocab_size": CONFIG["vocab_size"]._replace(default=None)},
                      self.folder / "config.json")
        self.embeddings: int | None = sizes["vocab_size"]
        found = {self._tokenizer.token_to_id(self.special_tokens.get("eos_token", ""))} - {None}
        for name in ("config.json", "generation_config.json"):
            file = check(self._read_json(name), {"eos_token_id": EOS}, self.folder / name)
            found |= file["eos_token_id"]
        self.eos_ids: tuple[int, ...] = tuple(sorted(found))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included; a model's embedding often has more rows."""
        return self._tokenizer.get_vocab_size()

    def vocabulary(self) -> list[str]:
        """The text of every single id; a part of a UTF-8 character becomes U+FFFD."""
        return [self.decode([i]) for i in range(self.vocab_size)]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Adds no special tokens, but those written in the text are read as such.

        Raises:
            ValueError: the text holds a lone surrogate, which has no UTF-8 form.
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise ValueError(f"cannot encode {text!r:.200}: it must be a str without lone surrogates") from None

    def neutral_text(self, text: str) -> str:
        """`text` without control tokens: each added token that it spells gets a space behind its first character
        ("< |eot_id|>"), so that a text from outside cannot end a turn or forge one. The tags of a thought stay."""
        while self._controls.search(text):  # again where one that is taken apart uncovers another
            text = self._controls.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        return text

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`, special tokens included unless skipped; the tags of a thought are never skipped, for graders
        and rewards tell thought from answer by them."""
        if skip_special_tokens:
            ids = [token for token in ids if token not in self._skipped]
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def render(self, messages: Sequence[dict], add_generation_prompt: bool = False, **template_vars: Any) -> str:
        """The conversation as the checkpoint's chat template writes it.

        Args:
            messages: [{"role": ..., "content": ...}, ...], JSON values only.
            add_generation_prompt: end with the header of the assistant's next turn.
            template_vars: variables of the template, such as enable_thinking.

        Raises:
            ValueError: no template, no messages, or the template failed or went over its bounds.
        """
        if self.chat_template is None:
            raise ValueError(
                f"{self.folder} has no chat template (chat_template.jinja, or a default chat_template in "
                "tokenizer_config.json): use an instruction-tuned checkpoint, or add the template it was trained with")
        if not messages or not all(isinstance(message, dict) for message in messages):
            raise ValueError('a conversation is a list of at least one {"role": ..., "content": ...}')
        variables = {"messages": [_as_template_sees(message) for message in messages], "tools": None, "documents": None,
                     "add_generation_prompt": add_generation_prompt, **self.special_tokens,
                     **self.template_vars, **template_vars}
        try:
            return _renderer.call([self.chat_template, variables, self.date])
        except WorkerError as error:
            raise ValueError(f"the chat template of {self.folder} failed: {error}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"messages and template variables must be JSON values: {error}") from None

    def think(self, on: bool) -> None:
        """Have a template that can do both ask for a thought, or not: Qwen3's (enable_thinking, which it does by
        itself) and Granite's (thinking, which it does not). Others know neither variable."""
        self.template_vars |= {"enable_thinking": on, "thinking": on}

    def encode_chat(self, messages: Sequence[dict], add_generation_prompt: bool = False, **template_vars) -> list[int]:
        """Token ids of the rendered conversation; arguments and errors of render()."""
        return self.encode(self.render(messages, add_generation_prompt, **template_vars))

    def opens_thought(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a generation prompt ends with <think>, so that a response starts inside the thought (R1-Distill)."""
        return self.decode(prompt_ids[-8:]).rstrip().endswith(THINK)

    def save(self, folder: str | Path) -> None:
        """Write the official tokenizer files to `folder`, their bytes unchanged, each one atomically.

        Files that another tokenizer left there are deleted: an older chat_template.jinja would win over this template.
        """
        for name, data in self._files.items():
            write_atomic(Path(folder) / name, data)
        for name in set(FILES) - self._files.keys():
            (Path(folder) / name).unlink(missing_ok=True)

    def _read_json(self, name: str) -> dict:
        path = self.folder / name
        return read_json(path) if os.path.lexists(path) else {}

    def _find_template(self, values: dict) -> str | None:
        if "chat_template.jinja" not in self._files:
            return values["chat_template"]
        try:
            return self._files["chat_template.jinja"].decode()
        except UnicodeDecodeError as error:
            path, cure = self.folder / "chat_template.jinja", "download it again"
            raise ValueError(f"{path} is not UTF-8 ({error}): {cure}") from None

    def _special_ids(self) -> set[int]:
        return {i for i, token in self._tokenizer.get_added_tokens_decoder().items()
                if token.special and token.content not in (THINK, END_THINK)}  # fmt: skip

    def _merge_added_tokens(self, values: dict, named: list[AddedToken], added: dict) -> None:
        """Merge the small files' tokens into tokenizer.json's: new ones get the next ids in order.

        The flags of tokenizer_config.json win; `added`, of added_tokens.json, has none.
        """
        tokens = {token.content: token for token in self._tokenizer.get_added_tokens_decoder().values()}
        try:
            decoder = values["added_tokens_decoder"]
            for entry in [decoder[key] for key in sorted(decoder, key=int)]:
                tokens[entry["content"]] = AddedToken(**entry)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.folder / 'tokenizer_config.json'}: field 'added_tokens_decoder' must map ids to objects with "
                f"'content' and flags ({type(error).__name__}: {error}): download it again") from None
        extra = values["extra_special_tokens"] or values["additional_special_tokens"]
        extra = extra.values() if isinstance(extra, dict) else extra
        extra = [_added_token(token) for token in extra]
        special = {token.content for token in (*named, *extra)}
        for text in sorted(added, key=added.get):
            known = text in special
            tokens.setdefault(text, AddedToken(text, normalized=not known, special=known))
        for token in named:
            tokens.setdefault(token.content, token).special = True
        for token in extra:
            tokens.setdefault(token.content, token)
        self._tokenizer.add_tokens(list(tokens.values()))


def _added_token(token: str | dict) -> AddedToken:
    """A special token, which the files write as a string or as an object with flags."""
    flags = {"content": token} if isinstance(token, str) else token
    known = {name: flags[name] for name in ("content", *fields.TOKEN_FLAGS) if name in flags}
    return AddedToken(**known | {"special": True})


def _standard_first(item: tuple[str, Any]) -> int:
    return STANDARD_TOKENS.index(item[0]) if item[0] in STANDARD_TOKENS else len(STANDARD_TOKENS)


def _as_template_sees(message: dict) -> dict:
    """A message as transformers passes it on: without None values, its reasoning under every name in use."""
    message = {key: value for key, value in message.items() if value is not None}
    for name in ("reasoning_content", "thinking", "reasoning"):
        if name in message:
            return {"thinking": message[name], **message, "reasoning_content": message[name]}
    return message
