"""Text to token ids and back, from a checkpoint's own files.

tokenizer.json is read by the `tokenizers` library, and template.py renders the chat template in a process of its own;
this file adds the rules by which transformers combines a checkpoint's small JSON files, because a conversation must
become exactly the ids that the model was trained on. No special token is ever added to a text: templates write their
own BOS.
Left out: tokenizers without a tokenizer.json, and templates for tools.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from nanosafe.config import eos_ids, read_json
from nanosafe.weights import find_checkpoint, write_atomic
from nanosafe.worker import Worker, WorkerError

# A tokenizer in the official layout; the vocabulary files beside tokenizer.json are for other libraries.
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
         "chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model")
THINK, END_THINK = "<think>", "</think>"  # some tokenizers have them as special tokens, others not as tokens at all
STANDARD_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_NEUTRAL_PASSES = 10  # one pass can uncover tokens that overlapped with those it took apart

# One for all tokenizers. A render takes well under a millisecond; the bounds are for templates that mean harm.
_renderer = Worker(Path(__file__).with_name("template.py"), seconds=5.0, memory_bytes=1 << 30)


def load_tokenizer(name_or_path: str | Path) -> "Tokenizer":
    """The tokenizer of an alias, hub repository or folder; of a repository only the small files are fetched."""
    return Tokenizer(find_checkpoint(name_or_path, weights=False))


class Tokenizer:
    """The tokenizer in a folder.

    Attributes:
        eos_ids: the ids that end a response, by config.json, generation_config.json and the tokenizer itself; sorted.
        special_tokens: {"bos_token": text, ...}; the chat template sees them as variables.
        chat_template: Jinja2 source; None if the checkpoint has no template.
        template_vars: variables of the template that every render has, unless it is given others; see think().

    Raises:
        FileNotFoundError: there is no tokenizer.json.
        ValueError: one of the files is broken.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        # Kept in memory: save() must work when a training run has meanwhile removed the checkpoint it resumed from.
        self._files = {name: (self.folder / name).read_bytes() for name in FILES if (self.folder / name).is_file()}
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

        config = self._read_json("tokenizer_config.json")
        if "added_tokens_decoder" not in config:  # the older layout
            config |= self._read_json("special_tokens_map.json")
        named = {name: _added_token(token) for name, token in sorted(config.items(), key=_standard_first)
                 if name.endswith("_token") and isinstance(token, (str, dict))}
        self.special_tokens = {name: token.content for name, token in named.items()}
        self._merge_added_tokens(config, list(named.values()))
        self._controls = {i: self._normal(token.content)
                          for i, token in self._tokenizer.get_added_tokens_decoder().items()
                          if token.content not in (THINK, END_THINK)}  # fmt: skip
        self.chat_template = self._find_template(config)
        self.template_vars: dict[str, Any] = {}

        found = {self._tokenizer.token_to_id(self.special_tokens.get("eos_token", ""))} - {None}
        for name in ("config.json", "generation_config.json"):
            found |= eos_ids(self._read_json(name))
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
        return self._encoding(text).ids

    def _encoding(self, text: str) -> tokenizers.Encoding:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except TypeError:
            raise ValueError(f"cannot encode {text!r:.200}: it must be a str without lone surrogates") from None

    def neutral_text(self, text: str) -> str:
        """`text` in which nothing is read as a control token: each added token that it spells gets a space behind its
        first character ("< |eot_id|>"), so that a text from outside cannot end a turn or forge one. The tags of a
        thought stay, and so does white space. Errors of encode()."""
        for _ in range(MAX_NEUTRAL_PASSES):
            cuts = self._inside_control_tokens(text)
            if not cuts:
                return text
            text = " ".join(text[start:end] for start, end in pairwise([0, *cuts, len(text)]))
        raise ValueError(f"{self.folder}: its tokenizer reads control tokens in any spelling, so a response could forge "
                         "turns: use another model to score or judge")

    def _inside_control_tokens(self, text: str) -> list[int]:
        """The place behind the first character of every control token that `text` spells."""
        encoding, cuts = self._encoding(text), []
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            spelled = text[start:end].lstrip()  # some tokens take in the white space before them
            # A token of one character cannot be taken apart, and the unknown token stands for what
            # does not spell it.
            if len(spelled) > 1 and self._controls.get(token) == self._normal(spelled):
                cuts.append(end - len(spelled) + 1)
        return cuts

    def _normal(self, text: str) -> str:
        normalizer = self._tokenizer.normalizer
        return text.strip() if normalizer is None else normalizer.normalize_str(text.strip())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`, special tokens included unless skipped."""
        return self._tokenizer.decode(ids, skip_special_tokens)

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
            return _renderer.call([self.chat_template, variables])
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

    def save(self, folder: str | Path) -> None:
        """Write the official tokenizer files to `folder`, their bytes unchanged, each one atomically.

        Files that another tokenizer left there are deleted: an older chat_template.jinja would win over this template.
        """
        for name, data in self._files.items():
            write_atomic(Path(folder) / name, data)
        for name in set(FILES) - self._files.keys():
            (Path(folder) / name).unlink(missing_ok=True)

    def _read_json(self, name: str) -> dict:
        return read_json(self.folder / name) if (self.folder / name).is_file() else {}

    def _find_template(self, config: dict) -> str | None:
        if "chat_template.jinja" in self._files:
            return self._files["chat_template.jinja"].decode()
        found = config.get("chat_template")
        if isinstance(found, list):
            found = {entry["name"]: entry["template"] for entry in found}.get("default")
        return found

    def _merge_added_tokens(self, config: dict, named: list[AddedToken]) -> None:
        """Merge tokenizer_config.json's tokens into tokenizer.json's: its flags win, new ones get the next ids."""
        tokens = {token.content: token for token in self._tokenizer.get_added_tokens_decoder().values()}
        try:
            for _, entry in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
                tokens[entry["content"]] = AddedToken(**entry)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.folder / 'tokenizer_config.json'}: field 'added_tokens_decoder' must map ids to objects with "
                f"'content' and flags ({type(error).__name__}: {error}): download it again") from None
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        for token in named:
            tokens.setdefault(token.content, token).special = True
        for token in map(_added_token, extra.values() if isinstance(extra, dict) else extra):
            tokens.setdefault(token.content, token)
        self._tokenizer.add_tokens(list(tokens.values()))


def _added_token(token: str | dict) -> AddedToken:
    """A special token, which the files write as a string or as an object with flags."""
    flags = {"content": token} if isinstance(token, str) else token
    return AddedToken(**{key: value for key, value in flags.items() if key != "__type"} | {"special": True})


def _standard_first(item: tuple[str, Any]) -> int:
    return STANDARD_TOKENS.index(item[0]) if item[0] in STANDARD_TOKENS else len(STANDARD_TOKENS)


def _as_template_sees(message: dict) -> dict:
    """A message as transformers passes it on: without None values, its reasoning under every name in use."""
    message = {key: value for key, value in message.items() if value is not None}
    for name in ("reasoning_content", "thinking", "reasoning"):
        if name in message:
            return {"thinking": message[name], **message, "reasoning_content": message[name]}
    return message
