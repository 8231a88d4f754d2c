"""Text to token ids and back, from a checkpoint's own files.

tokenizer_files.py reads the files, and template.py renders the chat template in a process of its own. No special token
is ever added to a text, because templates write their own BOS. Left out: tokenizers without a tokenizer.json, and
templates for tools.
"""

import os
from collections.abc import Sequence
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from nanosafe.io.fields import CONFIG, EOS, check
from nanosafe.io.files import read_file, read_optional_json, write_atomic
from nanosafe.io.worker import Worker, WorkerError
from nanosafe.text.thoughts import END_THINK, THINK
from nanosafe.text.tokenizer_files import (
    control_pattern,
    merge_small_files,
    read_tokenizer_json,
    special_ids,
)

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
        date: the day that some templates write (Llama 3.2, Granite 3.3), as 2026-01-31; today first.

    Raises FileNotFoundError without a tokenizer.json, and ValueError if one of the files is broken.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        # Kept in memory: save() must work when a training run has meanwhile removed the checkpoint it resumed from.
        present = [name for name in FILES if os.path.lexists(self.folder / name)]
        self._files = {name: read_file(self.folder / name) for name in present}
        self._tokenizer = read_tokenizer_json(self.folder)
        always_special = special_ids(self._tokenizer)  # whatever the other files say
        self.special_tokens, self.chat_template = merge_small_files(self._tokenizer, self.folder)
        self._skipped_ids = always_special | special_ids(self._tokenizer)
        self._controls = control_pattern(self._tokenizer)
        self.template_vars: dict[str, Any] = {}
        self.date = date.today().isoformat()
        model_fields = {"vocab_size": CONFIG["vocab_size"]._replace(default=None), "eos_token_id": EOS}
        model = self._read_fields("config.json", model_fields)
        generation = self._read_fields("generation_config.json", {"eos_token_id": EOS})
        own = self._tokenizer.token_to_id(self.special_tokens.get("eos_token", ""))
        eos_ids = (model["eos_token_id"] | generation["eos_token_id"] | {own}) - {None}
        self.eos_ids: tuple[int, ...] = tuple(sorted(eos_ids))
        self._embeddings: int | None = model["vocab_size"]

    def _read_fields(self, name: str, fields: dict) -> dict[str, Any]:
        return check(read_optional_json(self.folder / name), fields, self.folder / name)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included; a model's embedding often has more rows."""
        return self._tokenizer.get_vocab_size()

    def vocabulary(self) -> list[str]:
        """The text of every single id; a part of a UTF-8 character becomes U+FFFD."""
        return [self.decode([token]) for token in range(self.vocab_size)]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Adds no special tokens, but those written in the text are read as such.

        Raises ValueError for a lone surrogate, which has no UTF-8 form.
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise ValueError(
                f"cannot encode {text!r:.200}: it must be a str without lone surrogates") from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of `ids`, special tokens included unless skipped. The tags of a thought are never skipped, because
        graders and rewards tell thought from answer by them."""
        if skip_special_tokens:
            ids = [token for token in ids if token not in self._skipped_ids]
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def check_embeddings(self, ids: Sequence[int]) -> None:
        """Raise ValueError for an id without an embedding in the model, of a token that only the tokenizer has."""
        largest = max(ids, default=0)
        if self._embeddings is not None and largest >= self._embeddings:
            raise ValueError(
                f"token {self.decode([largest])!r} has the id {largest}, but {self.folder} has embeddings for "
                f"{self._embeddings} (vocab_size): resize them, or use the model's own tokenizer")

    def neutral_text(self, text: str) -> str:
        """`text` without control tokens: each added token that it spells gets a space behind its first character
        ("< |eot_id|>"), so that a text from outside cannot end a turn or forge one. The tags of a thought stay."""
        while self._controls.search(text):  # again, because taking one apart may uncover another
            text = self._controls.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        return text

    def render(
        self, messages: Sequence[dict], add_generation_prompt: bool = False, **template_vars: Any
    ) -> str:
        """The conversation as the checkpoint's chat template writes it.

        messages: [{"role": ..., "content": ...}, ...], JSON values only.
        add_generation_prompt: end with the header of the assistant's next turn.
        template_vars: variables of the template, such as enable_thinking.

        Raises ValueError: no template, no messages, or the template failed or went over its bounds.
        """
        if self.chat_template is None:
            raise ValueError(
                f"{self.folder} has no chat template (chat_template.jinja, or a default chat_template "
                "in tokenizer_config.json): use an instruction-tuned checkpoint, or add the template "
                "it was trained with")
        if not messages or not all(isinstance(message, dict) for message in messages):
            raise ValueError('a conversation is a list of at least one {"role": ..., "content": ...}')
        variables = {"add_generation_prompt": add_generation_prompt}
        variables |= self.special_tokens | self.template_vars | template_vars
        try:
            return _renderer.call([self.chat_template, messages, variables, self.date])
        except WorkerError as error:
            raise ValueError(f"the chat template of {self.folder} failed: {error}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"messages and template variables must be JSON values: {error}") from None

    def encode_chat(
        self, messages: Sequence[dict], add_generation_prompt: bool = False, **template_vars: Any
    ) -> list[int]:
        """Token ids of the rendered conversation; arguments and errors of render()."""
        return self.encode(self.render(messages, add_generation_prompt, **template_vars))

    def think(self, on: bool) -> None:
        """Have a template that can do both ask for a thought, or not: Qwen3's (enable_thinking, which it does by
        itself) and Granite's (thinking, which it does not). Others know neither variable.

        Raises ValueError if it is not to and does all the same, as R1-Distill's.
        """
        self.template_vars |= {"enable_thinking": on, "thinking": on}
        if not on and self.opens_thought(self.encode_chat([{"role": "user", "content": "Hi"}],
                                                          add_generation_prompt=True)):
            raise ValueError(f"the chat template of {self.folder} always opens a thought: leave out --thinking off")

    def opens_thought(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a generation prompt ends with <think>, so that a response starts inside the thought (R1-Distill)."""
        return self.decode(prompt_ids[-8:]).rstrip().endswith(THINK)

    def closes_thought(self, prompt_ids: Sequence[int]) -> bool:
        """Whether it ends with </think>, so that the response is to be the answer alone (Qwen3 with thinking off)."""
        return self.decode(prompt_ids[-8:]).rstrip().endswith(END_THINK)

    @cached_property
    def turn_end(self) -> int:
        """The EOS id with which the chat template ends an assistant turn: the first one after the turn's text.

        Raises ValueError if there is none.
        """
        probe = "nanosafe-turn"
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": probe}]
        _, found, after = self.render(messages).rpartition(probe)
        for token in self.encode(after) if found else ():
            if token in self.eos_ids:
                return token
        raise ValueError(
            f"the chat template of {self.folder} ends an assistant turn with none of the EOS ids "
            f"{self.eos_ids}: add the id that does to generation_config.json's eos_token_id")

    def save(self, folder: str | Path) -> None:
        """Write the official tokenizer files to `folder`, their bytes unchanged, each one atomically.

        Files that another tokenizer left there are deleted: an older chat_template.jinja would win over this template.
        """
        for name, data in self._files.items():
            write_atomic(Path(folder) / name, data)
        for name in set(FILES) - self._files.keys():
            (Path(folder) / name).unlink(missing_ok=True)
