"""A reward model: a decoder with a score head, and the tokenizer whose template it was trained with.

It sees text: the conversation is rendered by its own template and tokenizer, which differ from the policy's. What it
sees is all that was written, and no turn that a text forges. Conversations are packed, never padded, so a score does
not depend on its neighbours.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from nanosafe.io.progress import progress
from nanosafe.model.attention import PackedDocuments
from nanosafe.model.config import ModelConfig
from nanosafe.model.decoder import Decoder
from nanosafe.model.weights import load_checkpoint
from nanosafe.parallel import Ranks
from nanosafe.text.data import Row
from nanosafe.text.thoughts import END_THINK, THINK
from nanosafe.text.tokenizer import Tokenizer
from nanosafe.train.offload import on_device
from nanosafe.train.own_reward import OwnReward
from nanosafe.train.packing import microbatches
from nanosafe.train.rewards import UNREAD, Conversation, Reward, check_references, conversation
from nanosafe.train.weighted_reward import WeightedReward

PROBE = "nanosafe-probe"  # stands for a response where it is asked what a template makes of one


class RewardModel:
    def __init__(self, model: Decoder, tokenizer: Tokenizer,
                 device: str | torch.device | None = None, ranks: Ranks | None = None):
        """device: where it scores (default: where its weights are). ranks: those that its weights are sharded over."""
        self.model, self.tokenizer, self.ranks = model, tokenizer, ranks
        self.device = torch.device(device or model.score.weight.device)
        self.context = model.config.max_position_embeddings

    @classmethod
    def load(cls, folder: Path, device: str | torch.device, dtype: torch.dtype, *,
             offload: bool = False, ranks: Ranks | None = None) -> "RewardModel":
        """The *ForSequenceClassification model with one label in `folder`, in eval mode.

        offload: its weights stay in CPU memory and are on `device` only while it scores. ranks: of several, each keeps
        its rows of every tensor, and all score together, each its own conversations.
        """
        if not ModelConfig.from_folder(folder).num_labels:
            raise ValueError(f"{folder} is a language model: a reward model has a score head, and its "
                             "config.json names a ...ForSequenceClassification architecture "
                             "(such as skywork-v2-llama-8b)")
        tokenizer = Tokenizer(folder)
        home = "cpu" if offload else device
        return cls(load_checkpoint(folder, home, dtype, ranks, keep_dtype=True), tokenizer, device, ranks)

    def __call__(self, conversations: Sequence[Conversation], rows: Sequence[Row]) -> Tensor:
        """As a Reward: UNREAD for what is longer than the context, NaN where the score is not finite."""
        return self.score(conversations, skip_long=True)

    @torch.no_grad()
    def score(self, conversations: Sequence[Conversation], *, tokens_per_microbatch: int = 16384,
              skip_long: bool = False) -> Tensor:
        """Rewards of finished conversations, float32 [B] on the CPU, equal to transformers' score of each one unpadded.

        Runs micro-batches of at most `tokens_per_microbatch` tokens; a longer conversation goes alone. Raises
        ValueError for a conversation beyond the model's vocabulary, and for one beyond its context, unless skip_long
        gives it UNREAD. A score that is not finite is NaN.
        """
        documents, fitting = [], []
        for index, messages in enumerate(conversations):
            documents.append(self.encode(messages, index))
            if len(documents[index]) <= self.context:
                fitting.append(index)
        if not skip_long:
            self._check_lengths(documents)
        scores = torch.full((len(documents),), UNREAD)
        # Conversations of equal length attend as one batch, so they stand together.
        order = sorted(fitting, key=lambda i: len(documents[i]))
        batches = microbatches(documents, tokens_per_microbatch, order)
        if self.ranks is not None:
            # Under sharding each forward pass is an exchange: all ranks run equally many, the last ones of some empty.
            most = max(self.ranks.gather([len(batches)]))
            batches += [[]] * (most - len(batches))
        with on_device(self.model, self.device):
            for batch in progress(batches, "rewards"):
                values = self.forward([documents[i] for i in batch]).cpu()
                scores[batch] = values.where(values.isfinite(), math.nan)
        return scores

    def _check_lengths(self, documents: Sequence[list[int]]) -> None:
        for index, ids in enumerate(documents):
            if len(ids) > self.context:
                raise ValueError(f"conversation {index} has {len(ids)} tokens; the reward model reads "
                                 f"1 to {self.context} (max_position_embeddings)")

    def forward(self, documents: Sequence[list[int]]) -> Tensor:
        """float32 scores [B] of encoded conversations as one micro-batch; differentiable."""
        tokens, scored = [], []
        for ids in documents:
            scored.append(len(tokens) + self.scored_position(ids))
            tokens += ids
        device = self.model.score.weight.device
        memory = PackedDocuments([len(ids) for ids in documents], device=device)
        ids, rows = (torch.tensor(values, dtype=torch.long, device=device) for values in (tokens, scored))
        hidden = self.model.hidden(ids, memory.positions, memory)[rows]  # [B, D]
        weight = self.model.score.weight.float()  # [1, D], which is whole only after the layers have run
        # In float32: bfloat16 would round a score near 20 to steps of 1/8.
        return (hidden.float() @ weight.T)[:, 0]

    def scored_position(self, ids: list[int]) -> int:
        """Where transformers reads the score: the right-most id that is not the config's pad token, 0 if all are."""
        for position in reversed(range(len(ids))):
            if ids[position] != self.model.config.pad_token_id:
                return position
        return 0

    def encode(self, messages: Conversation, index: int = 0) -> list[int]:
        """Token ids of a finished conversation: what the template writes, its BOS included, and nothing besides.

        Control tokens that a message spells are taken apart (Tokenizer.neutral_text). A template may drop part of a
        response: Qwen3's drops what stands before <think> or between two </think>. Such a response is scored too, as
        it was written, in the place that the template gives to any other.
        """
        neutral = self.tokenizer.neutral_text
        messages = [message | {"content": neutral(message["content"])} for message in messages]
        text = self.tokenizer.render(messages)
        if not _holds_response(text, messages):
            text = self._with_response(messages)
        ids, size = self.tokenizer.encode(text), self.model.config.vocab_size
        if not ids:
            raise ValueError(f"conversation {index} has 0 tokens: the chat template writes nothing")
        if max(ids) >= size:
            raise ValueError(f"conversation {index} holds token {max(ids)}, but the reward model's "
                             f"vocabulary has {size}: its tokenizer belongs to another model")
        return ids

    def _with_response(self, messages: Conversation) -> str:
        """The rendered conversation with the response put in as it is."""
        # Some templates delete thoughts, and with them all of the first probe.
        for probe in (f"{THINK}\n{PROBE}\n{END_THINK}\n\n{PROBE}", PROBE):
            rendered = self.tokenizer.render([*messages[:-1], messages[-1] | {"content": probe}])
            before, separator, after = rendered.rpartition(probe)
            if separator:
                return before + messages[-1]["content"] + after
        raise ValueError(f"the chat template of {self.tokenizer.folder} does not write the response")

    def check_scope(self, scope: str, name: str) -> None:
        """Raise ValueError if the reward model `name` cannot score that scope (see `conversation`), or does not belong
        to its tokenizer."""
        prompt = [{"role": "user", "content": "?"}]
        probe = conversation(prompt, f"{PROBE}{END_THINK}!", opened_thought=True)
        if scope == "response" and PROBE not in self.tokenizer.render(probe):
            raise ValueError(f"the chat template of {name} deletes thoughts, so they have no reward: "
                             "use --reward-scope answer")
        self.encode(probe)


def check_rows(rows: Sequence[Row], reward: Reward, name: str) -> None:
    """Raise ValueError naming file and line of a row whose responses the reward `name` could never score."""
    if isinstance(reward, WeightedReward):
        for part_name, part in reward.parts.items():
            check_rows(rows, part, part_name)
    if name == "rule:math":
        check_references(rows)
    if isinstance(reward, OwnReward):
        reward.try_on(rows[0])
    if isinstance(reward, RewardModel):
        for row in progress(rows, "prompts as the reward model reads them"):
            try:
                reward.encode(conversation(row.prompt, PROBE, opened_thought=False))
            except ValueError as error:
                reason = f"the reward model {name} cannot read it: {error}"
                raise ValueError(f"{row.source}: {reason}") from None


def _holds_response(text: str, messages: Conversation) -> bool:
    """Whether `text`, the rendered messages, has all of the response, behind the message before it.

    White space is not compared, for templates trim it.
    """
    text = _without_space(text)
    prompt = _without_space(messages[-2]["content"]) if len(messages) > 1 else ""
    start = text.find(prompt)
    end = start + len(prompt) if start >= 0 else 0
    return _without_space(messages[-1]["content"]) in text[end:]


def _without_space(text: str) -> str:
    return "".join(text.split())
