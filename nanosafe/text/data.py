"""Datasets to conversations, conversations to token ids.

A row becomes a prompt (what the policy is asked) and, for SFT, a response. Both are tokenised once, apart: the prompt
as the chat template renders it with its generation prompt, the response as the model would have generated it, so that
training targets and rollouts have the same form whatever a template does to finished assistant turns.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from nanosafe.io.files import digest
from nanosafe.text.thoughts import END_THINK, THINK
from nanosafe.text.tokenizer import Tokenizer

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


def digest_rows(rows: Sequence[Row]) -> str:
    """A hash of what rows say, in their order, so that a run goes on only with the data it began with."""
    return digest([[row.messages, row.answer] for row in rows])


def as_row(record: dict, source: str) -> Row:
    """A record as a row: `messages`, or `prompt` (a text, or messages) or STAR-1's `question`, and perhaps `response`
    and `answer`. Raises ValueError naming `source`, where the record stands, and the field."""
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


def as_pair(record: dict, source: str) -> Pair:
    """A record as a labelled pair: `prompt` (or `question`), the texts `chosen` and `rejected`, perhaps `category`."""
    row = as_row(record, source)
    for field, kind in (("chosen", str), ("rejected", str), ("category", str | None)):
        if not isinstance(record.get(field), kind):
            raise ValueError(f"{source}: a labelled pair needs a text in field {field!r}; it has {list(record)}")
    return Pair(row.prompt, record["chosen"], record["rejected"], record.get("category"))


@contextmanager
def _naming(row: Row) -> Iterator[None]:
    """Errors of templates and tokenizers say what is wrong; this adds where."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{row.source}: {error}") from None


def _check_ids(ids: Sequence[int], tokenizer: Tokenizer) -> None:
    """Raise ValueError for an id without an embedding: of a token that only the tokenizer was given."""
    size, largest = tokenizer.embeddings, max(ids, default=0)
    if size is not None and largest >= size:
        raise ValueError(
            f"token {tokenizer.decode([largest])!r} has the id {largest}, but {tokenizer.folder} has "
            f"embeddings for {size} (vocab_size): resize them, or use the model's own tokenizer")


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
            if tokenizer.opens_thought(prompt_ids):
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
