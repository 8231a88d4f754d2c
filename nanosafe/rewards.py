"""Rewards of finished conversations: a reward model's score, or a rule's 0 or 1.

A reward model sees text, never the policy's token ids: the conversation is rendered by the reward model's own template
and tokenizer, which differ from the policy's. Conversations are packed, never padded, so a score does not depend on its
neighbours.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from nanosafe.batches import microbatches
from nanosafe.config import ModelConfig
from nanosafe.data import END_THINK, THINK
from nanosafe.distributed import visiting
from nanosafe.evals.graders import grade_answers, is_refusal, split_thought
from nanosafe.memory import PackedDocuments
from nanosafe.model import Decoder
from nanosafe.tokenizer import Tokenizer, load_tokenizer
from nanosafe.weights import MAIN_RANK, find_checkpoint, load_checkpoint

Conversation = list[dict]  # [{"role": ..., "content": ...}, ...]
Reward = Callable[[Sequence[Conversation], Sequence[str | None]], Tensor]  # and reference answers -> float32 [B], CPU


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


def load_reward(
    spec: str,
    *,
    scope: str = "response",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    offload: bool = False,
) -> Reward:
    """The reward `spec`: rule:math, rule:refusal, rule:tiny-judge, or a reward model (alias, hub id or folder).

    offload: the reward model stays in CPU memory and is on `device` only while it scores.

    The callable takes conversations that end with the assistant's turn, and for each the reference answer of its row,
    which only rule:math reads: it raises ValueError naming the row that has none. scope: as in `conversation`; a reward
    model whose template deletes thoughts cannot score "response" and is refused with a ValueError.
    """
    if not spec.startswith("rule:"):
        model = load_reward_model(spec, device="cpu" if offload else device, dtype=dtype)
        model.device = torch.device(device)
        probe = conversation([{"role": "user", "content": "?"}], f"probe{END_THINK}!", opened_thought=True)
        if scope == "response" and "probe" not in model.tokenizer.render(probe):
            raise ValueError(f"the chat template of {spec} deletes thoughts, so they have no reward: "
                             "use --reward-scope answer")  # fmt: skip
        return lambda conversations, references: model.score(conversations)
    rules = {"rule:math": _math_rule, "rule:refusal": _refusal_rule, "rule:tiny-judge": _tiny_judge_rule}
    if spec not in rules:
        raise ValueError(f"unknown rule {spec!r}; known: {', '.join(rules)}, or give a reward model")
    return rules[spec]()


def _refusal_rule() -> Reward:
    return lambda conversations, references: torch.tensor([float(is_refusal(c[-1]["content"])) for c in conversations])


def _tiny_judge_rule() -> Reward:
    from nanosafe.tiny.world import judge_reward  # here: the world uses the graders and so, in the end, this file

    return lambda conversations, references: torch.tensor(
        [judge_reward(c[-2]["content"], c[-1]["content"]) for c in conversations])


def _math_rule() -> Reward:
    def reward(conversations: Sequence[Conversation], references: Sequence[str | None]) -> Tensor:
        if None in references:
            row = list(references).index(None)
            raise ValueError(f"row {row} has no reference answer: rule:math needs a data set with a field 'answer'")
        responses = [conversation[-1]["content"] for conversation in conversations]
        return torch.tensor(grade_answers("math", responses, references))

    return reward


def load_reward_model(
    name_or_path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16
) -> "RewardModel":
    """The *ForSequenceClassification model with one label in `name_or_path` (alias, hub id or folder), in eval mode.

    Raises what `find_checkpoint`, `load_checkpoint` and `load_tokenizer` raise, and ValueError for a language model.
    """
    folder = find_checkpoint(name_or_path)
    if not ModelConfig.from_folder(folder).num_labels:
        raise ValueError(f"{name_or_path} is a language model: a reward model has a score head, and its config.json "
                         "names a ...ForSequenceClassification architecture (such as skywork-v2-llama-8b)")  # fmt: skip
    tokenizer = load_tokenizer(folder)
    return RewardModel(load_checkpoint(folder, device, dtype), tokenizer)


class RewardModel:
    """A decoder with a score head, and the tokenizer whose template it was trained with."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.device = model.score.weight.device  # where it scores

    @torch.no_grad()
    def score(self, conversations: Sequence[Conversation], *, tokens_per_microbatch: int = 16384) -> Tensor:
        """Rewards of finished conversations, float32 [B] on the CPU, equal to transformers' score of each one unpadded.

        Runs micro-batches of at most `tokens_per_microbatch` tokens; a longer conversation goes alone. Raises
        ValueError for a conversation beyond the model's context or its vocabulary.
        """
        documents = [self.encode(messages, index) for index, messages in enumerate(conversations)]
        order = sorted(range(len(documents)), key=lambda i: len(documents[i]))  # equal lengths attend as one batch
        scores = torch.empty(len(documents))
        batches = microbatches([documents[i] for i in order], tokens_per_microbatch)
        with visiting(self.model, self.device):
            for batch in tqdm(batches, "rewards", delay=2, leave=False, disable=not MAIN_RANK):
                rows = [order[i] for i in batch]
                scores[rows] = self.forward([documents[i] for i in rows]).cpu()
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
        """Token ids of a finished conversation: what the template writes, its BOS included, and nothing besides."""
        ids, config = self.tokenizer.encode_chat(messages), self.model.config
        if not 0 < len(ids) <= config.max_position_embeddings:
            raise ValueError(f"conversation {index} has {len(ids)} tokens; the reward model reads 1 to "
                             f"{config.max_position_embeddings} (max_position_embeddings)")  # fmt: skip
        if max(ids) >= config.vocab_size:
            raise ValueError(f"conversation {index} holds token {max(ids)}, but the reward model's vocabulary has "
                             f"{config.vocab_size}: its tokenizer belongs to another model")  # fmt: skip
        return ids

    def scored_position(self, ids: list[int]) -> int:
        """Where transformers reads the score: the right-most id that is not the config's pad token, 0 if all are."""
        return next((i for i in reversed(range(len(ids))) if ids[i] != self.model.config.pad_token_id), 0)
