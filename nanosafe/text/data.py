"""From the rows of a data set to the token ids that training works on.

A `Row` is one conversation of a file (readers.py, forms.py). RL encodes its prompt (`encode_prompts`), and what the
policy answers becomes an `Episode`. SFT makes a `Document` of each assistant turn (`sft_documents`). Prompt and
response are always tokenised apart, the response as the model would have generated it, so that SFT targets and
rollouts have the same form.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from nanosafe.io.files import digest
from nanosafe.text.thoughts import REASONING_FIELDS, THINK, continue_thought
from nanosafe.text.tokenizer import Tokenizer


@dataclass
class Row:
    """One conversation of a data set, with where it came from."""

    messages: list[dict]  # may end with an assistant turn, the SFT target
    source: str  # "FILE, line 3", for messages to the user
    answer: str | None = None  # reference answer, for rule rewards
    columns: dict = field(default_factory=dict)  # the whole record, for a reward of the user's own

    @property
    def prompt(self) -> list[dict]:
        """The messages without assistant turns at the end: what the policy is asked."""
        end = len(self.messages)
        while end and self.messages[end - 1]["role"] == "assistant":
            end -= 1
        return self.messages[:end]


class Prompt(NamedTuple):
    """A row with the token ids of its prompt, which end with the generation prompt."""

    row: Row
    ids: list[int]


@dataclass
class Document:
    """Token ids of a prompt and a response: what packing works on."""

    prompt_ids: list[int]  # at least one, for the last predicts the first of the response
    response_ids: list[int]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass
class Episode(Document):
    """One rollout: a document whose response the policy wrote."""

    row: int  # number in the step's rollout, over all ranks
    group: int  # its prompt's number in the step
    source: Row  # the prompt as a conversation, and its reference answer
    sampler_logprobs: list[float]
    truncated: bool  # ended by the token limit, not by the policy
    text: str  # the response without the token that ended it
    reward: float = float("nan")
    reward_parts: dict[str, float] = field(default_factory=dict)  # of several that are summed, by name


class Pair(NamedTuple):
    """Two responses to a prompt, labelled: `chosen` is the safe or better one."""

    prompt: list[dict]  # messages
    chosen: str
    rejected: str
    category: str | None


def digest_rows(rows: Sequence[Row]) -> str:
    """A hash of what rows say, in their order, so that a run goes on only with the data it began with."""
    return digest([[row.messages, row.answer] for row in rows])


@contextmanager
def _errors_name(row: Row) -> Iterator[None]:
    """Errors of templates and tokenizers say what is wrong; this adds where."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{row.source}: {error}") from None


def encode_prompts(rows: Sequence[Row], tokenizer: Tokenizer, max_tokens: int) -> tuple[list[Prompt], str]:
    """The usable rows with the ids of their prompts, and in words what was dropped ("" if nothing was).

    Raises ValueError if no row is left, or naming the row with a token that has no embedding.
    """
    kept, empty, long = [], 0, 0
    for row in rows:
        if not row.prompt or not row.prompt[-1]["content"].strip():
            empty += 1
            continue
        with _errors_name(row):
            ids = tokenizer.encode_chat(row.prompt, add_generation_prompt=True)
            tokenizer.check_embeddings(ids)
        # A prompt that is cut would be another question, so it is left out.
        if len(ids) > max_tokens:
            long += 1
        else:
            kept.append(Prompt(row, ids))
    report = (f"dropped {empty} empty prompts and {long} longer than {max_tokens} tokens, "
              f"{len(kept)} of {len(rows)} left")
    if not kept:
        raise ValueError(f"no usable prompt: {report}")
    return kept, report if empty or long else ""


def sft_documents(row: Row, tokenizer: Tokenizer, max_tokens: int) -> tuple[list[Document], int]:
    """A document for each assistant turn of a row: the conversation before it as prompt, the turn as response.

    A document over `max_tokens` loses its end, and one whose prompt leaves no room is left out. Returns the documents,
    and how many turns lost tokens or were left out. Raises ValueError naming a row without an assistant turn, with an
    empty one, or with a token that has no embedding.
    """
    turns = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
    if not turns:
        raise ValueError(f"{row.source}: no assistant turn to train on "
                         "(field 'response', or 'messages' with one)")
    documents, shortened = [], 0
    for turn in turns:
        document = _sft_document(row, turn, tokenizer)
        room = max_tokens - len(document.prompt_ids)
        if room < len(document.response_ids):
            shortened += 1
        if room > 0:
            documents.append(Document(document.prompt_ids, document.response_ids[:room]))
    return documents, shortened


def _sft_document(row: Row, turn: int, tokenizer: Tokenizer) -> Document:
    """The assistant turn at `turn`, whole. It is not rendered, for templates strip the thoughts of assistant turns
    (R1-Distill's from all, Qwen3's from earlier ones): its text follows the generation prompt as it stands."""
    message = row.messages[turn]
    text = message["content"]
    if not text.strip():
        raise ValueError(f"{row.source}: the response is empty")
    if any(message.get(name) for name in REASONING_FIELDS):
        raise ValueError(f"{row.source}: a thought must be part of 'content', as <think>...</think>")
    with _errors_name(row):
        prompt_ids = tokenizer.encode_chat(row.messages[:turn], add_generation_prompt=True)
        if tokenizer.opens_thought(prompt_ids):
            text = continue_thought(text)
        elif text.lstrip().startswith(THINK) and tokenizer.closes_thought(prompt_ids):
            raise ValueError("the response has a thought, but the prompt ends with an empty one: leave out "
                             "--thinking off, or train on responses without thoughts")
        # A rollout ends with the same token, so the model learns to end its turn.
        response_ids = tokenizer.encode(text) + [tokenizer.turn_end]
        tokenizer.check_embeddings(prompt_ids + response_ids)
    return Document(prompt_ids, response_ids)


def sft_steps(epochs: int, documents: int, batch_size: int) -> int:
    """Steps of about `epochs` passes: STAR-1's 5 over 1,000 rows in batches of 128 are 39. A single
    pass is not rounded down, so that every document is seen."""
    return max(round(epochs * documents / batch_size), math.ceil(documents / batch_size))
