"""Rewards of finished conversations: a reward model's score, or a rule's 0 or 1.

A reward model sees text, never the policy's token ids: the conversation is rendered by the reward model's own template
and tokenizer, which differ from the policy's. What it sees is all that was written, and no turn that a text forges.
Conversations are packed, never padded, so a score does not depend on its neighbours.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from tqdm import tqdm

from nanosafe.io.machine import MAIN_RANK
from nanosafe.model.attention import PackedDocuments
from nanosafe.model.config import ModelConfig
from nanosafe.model.decoder import Decoder
from nanosafe.model.weights import load_checkpoint
from nanosafe.parallel import visiting
from nanosafe.text.data import Episode, Row
from nanosafe.text.grading import grade_answers, readable
from nanosafe.text.thoughts import END_THINK, THINK, is_refusal, split_thought
from nanosafe.text.tokenizer import Tokenizer
from nanosafe.train.packing import microbatches

Conversation = list[dict]  # [{"role": ..., "content": ...}, ...]
Reward = Callable[[Sequence[Conversation], Sequence[str | None]], Tensor]  # and reference answers -> float32 [B], CPU
CHECKED_TOGETHER = 64  # reference answers
UNREAD = -math.inf  # the reward of a conversation that is longer than the reward model's context
PROBE = "nanosafe-probe"  # stands for a response where it is asked what a template makes of one


def conversation(
    messages: Conversation, response: str, *, opened_thought: bool, scope: str = "response"
) -> Conversation:
    """`messages` with the policy's response as the assistant's turn, in the form that is scored.

    opened_thought: the policy's generation prompt ends with <think> (R1-Distill), so that the response starts inside
    the thought; the tag is put back in front. scope: "response" scores thought and answer, "answer" only what
    `split_thought` calls the answer, which is "" if the thought was never closed. Raises ValueError for another scope.
    """
    text = f"{THINK}\n{response}" if opened_thought else response
    if scope == "answer":
        text = split_thought(text)[1]
    elif scope != "response":
        raise ValueError(f"--reward-scope is response or answer, not {scope!r}")
    return [*messages, {"role": "assistant", "content": text}]


def refusal_rule(conversations: Sequence[Conversation], references: Sequence[str | None]) -> Tensor:
    return torch.tensor([float(is_refusal(c[-1]["content"])) for c in conversations])


def math_rule(conversations: Sequence[Conversation], references: Sequence[str | None]) -> Tensor:
    """Raises ValueError naming the row that has no reference answer."""
    if None in references:
        row = list(references).index(None)
        raise ValueError(f"row {row} has no reference answer: rule:math needs a data set with a field 'answer'")
    responses = [conversation[-1]["content"] for conversation in conversations]
    return torch.tensor(grade_answers("math", responses, [_in_digits(r) for r in references]))


RULES: dict[str, Reward] = {"rule:math": math_rule, "rule:refusal": refusal_rule}


def _in_digits(reference: str) -> str:
    """A number as JSON and Python write large and small ones, 1e+22, in whose e mathematics reads Euler's number."""
    number = re.fullmatch(r"\s*([+-]?\d+(\.\d+)?[eE][+-]?\d{1,3})\s*", reference)
    return format(Decimal(number[1]), "f") if number else reference


def check_rows(rows: Sequence[Row], reward: Reward, name: str) -> None:
    """Raise ValueError naming file and line of a row whose responses the reward `name` could never score."""
    if name == "rule:math":
        _check_references(rows)
    if isinstance(reward, RewardModel):
        for row in _bar(rows, "prompts as the reward model reads them"):
            try:
                reward.encode(conversation(row.prompt, PROBE, opened_thought=False))
            except ValueError as error:
                raise ValueError(f"{row.source}: the reward model {name} cannot read it: {error}") from None


def _check_references(rows: Sequence[Row]) -> None:
    """The part of check_rows for rule:math: every row has a reference answer, and math-verify can read it."""
    for row in rows:
        if not (row.answer or "").strip():
            raise ValueError(f"{row.source}: rule:math compares with field 'answer', which is missing or empty")
    for start in _bar(range(0, len(rows), CHECKED_TOGETHER), "reference answers"):
        part = rows[start : start + CHECKED_TOGETHER]
        can_read = readable([_in_digits(row.answer) for row in part])
        for row, good in zip(part, can_read, strict=True):
            if not good:
                raise ValueError(f"{row.source}: math-verify cannot read field 'answer', {row.answer!r:.80}")


def _bar(items: Sequence, what: str) -> Iterable:
    """`items` with a progress bar once they have taken two seconds."""
    return tqdm(items, what, delay=2, leave=False, disable=not MAIN_RANK)


def known_rewards(reward: Reward, name: str, conversations: Sequence[Conversation]) -> list[float | None]:
    """Rewards for an eval, None for UNREAD. Raises ValueError naming reward and response where one is NaN."""
    scores = reward(conversations, [None] * len(conversations)).tolist()
    for score, messages in zip(scores, conversations, strict=True):
        if math.isnan(score):
            raise ValueError(f"{name} gives a reward that is not a number to {messages[-1]['content']!r:.200}: its "
                             "weights are damaged, or overflow in this --dtype")
    return [None if score == UNREAD else score for score in scores]


def fill_unread(episodes: Sequence[Episode]) -> list[float]:
    """The episodes' rewards; UNREAD becomes the mean of its group's others, which then stays the mean of the group."""
    read = defaultdict(list)  # group -> rewards
    for episode in episodes:
        if episode.reward != UNREAD:
            read[episode.group].append(episode.reward)
    return [fmean(read[e.group] or [0.0]) if e.reward == UNREAD else e.reward for e in episodes]


def check_scope(model: "RewardModel", scope: str, name: str) -> None:
    """Raise ValueError if the reward model `name` cannot score that scope (see `conversation`), or does not belong to
    its tokenizer."""
    probe = conversation([{"role": "user", "content": "?"}], f"{PROBE}{END_THINK}!", opened_thought=True)
    if scope == "response" and PROBE not in model.tokenizer.render(probe):
        raise ValueError(f"the chat template of {name} deletes thoughts, so they have no reward: "
                         "use --reward-scope answer")  # fmt: skip
    model.encode(probe)


class RewardModel:
    """A decoder with a score head, and the tokenizer whose template it was trained with."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.device = model.score.weight.device  # where it scores
        self.context = model.config.max_position_embeddings

    @classmethod
    def load(cls, folder: Path, device: str | torch.device, dtype: torch.dtype) -> "RewardModel":
        """The *ForSequenceClassification model with one label in `folder`, in eval mode."""
        if not ModelConfig.from_folder(folder).num_labels:
            raise ValueError(f"{folder} is a language model: a reward model has a score head, and its config.json "
                             "names a ...ForSequenceClassification architecture (such as skywork-v2-llama-8b)")
        tokenizer = Tokenizer(folder)
        return cls(load_checkpoint(folder, device, dtype), tokenizer)

    def __call__(self, conversations: Sequence[Conversation], references: Sequence[str | None]) -> Tensor:
        """As a Reward: see load_reward."""
        return self.score(conversations, skip_long=True)

    @torch.no_grad()
    def score(self, conversations: Sequence[Conversation], *, tokens_per_microbatch: int = 16384,
              skip_long: bool = False) -> Tensor:
        """Rewards of finished conversations, float32 [B] on the CPU, equal to transformers' score of each one unpadded.

        Runs micro-batches of at most `tokens_per_microbatch` tokens; a longer conversation goes alone. Raises
        ValueError for a conversation beyond the model's vocabulary, and for one beyond its context, unless skip_long
        gives it UNREAD. A score that is not finite is NaN.
        """
        documents = [self.encode(messages, index) for index, messages in enumerate(conversations)]
        fitting = [i for i, ids in enumerate(documents) if len(ids) <= self.context]
        if len(fitting) < len(documents) and not skip_long:
            first = next(i for i, ids in enumerate(documents) if len(ids) > self.context)
            raise ValueError(f"conversation {first} has {len(documents[first])} tokens; the reward model reads 1 to "
                             f"{self.context} (max_position_embeddings)")  # fmt: skip
        order = sorted(fitting, key=lambda i: len(documents[i]))  # equal lengths attend as one batch
        scores = torch.full((len(documents),), UNREAD)
        batches = microbatches([documents[i] for i in order], tokens_per_microbatch)
        with visiting(self.model, self.device):
            for batch in _bar(batches, "rewards"):
                rows = [order[i] for i in batch]
                found = self.forward([documents[i] for i in rows]).cpu()
                scores[rows] = found.where(found.isfinite(), math.nan)
        return scores

    def forward(self, documents: Sequence[list[int]]) -> Tensor:
        """float32 scores [B] of encoded conversations as one micro-batch; differentiable."""
        lengths, weight = [len(ids) for ids in documents], self.model.score.weight.float()  # [1, D]
        memory = PackedDocuments(lengths, device=weight.device)
        tokens = torch.tensor([token for ids in documents for token in ids], device=weight.device)
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        last = starts + torch.tensor([self.scored_position(ids) for ids in documents])
        hidden = self.model.hidden(tokens, memory.positions, memory)[last.to(weight.device)]  # [B, D]
        # In float32: bfloat16 would round a score near 20 to steps of 1/8.
        return (hidden.float() @ weight.T)[:, 0]

    def encode(self, messages: Conversation, index: int = 0) -> list[int]:
        """Token ids of a finished conversation: what the template writes, its BOS included, and nothing besides.

        Control tokens that a message spells are taken apart (Tokenizer.neutral_text). A template may drop part of a
        response: Qwen3's drops what stands before <think> or between two </think>. Such a response is scored too, as
        it was written, in the place that the template gives to any other.
        """
        neutral = self.tokenizer.neutral_text
        messages = [message | {"content": neutral(message["content"])} for message in messages]
        text, config = self.tokenizer.render(messages), self.model.config
        ids = self.tokenizer.encode(text if _holds_response(text, messages) else self._verbatim(messages))
        if not ids:
            raise ValueError(f"conversation {index} has 0 tokens: the chat template writes nothing")
        if max(ids) >= config.vocab_size:
            raise ValueError(f"conversation {index} holds token {max(ids)}, but the reward model's vocabulary has "
                             f"{config.vocab_size}: its tokenizer belongs to another model")  # fmt: skip
        return ids

    def _verbatim(self, messages: Conversation) -> str:
        """The rendered conversation with the response put in as it is."""
        for probe in (f"{THINK}\n{PROBE}\n{END_THINK}\n\n{PROBE}", PROBE):  # a template may delete thoughts
            probed = self.tokenizer.render([*messages[:-1], messages[-1] | {"content": probe}])
            before, found, after = probed.rpartition(probe)
            if found:
                return before + messages[-1]["content"] + after
        raise ValueError(f"the chat template of {self.tokenizer.folder} does not write the response")

    def scored_position(self, ids: list[int]) -> int:
        """Where transformers reads the score: the right-most id that is not the config's pad token, 0 if all are."""
        return next((i for i in reversed(range(len(ids))) if ids[i] != self.model.config.pad_token_id), 0)


def _holds_response(text: str, messages: Conversation) -> bool:
    """Whether `text`, the rendered messages, has all of the last one behind the others; white space is not compared,
    for templates trim it."""
    said = ["".join(message["content"].split()) for message in messages]
    text, asked = "".join(text.split()), "".join(said[-2:-1])
    behind = text.find(asked) + len(asked) if asked in text else 0
    return said[-1] in text[behind:]
