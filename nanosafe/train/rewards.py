"""What a reward is, the two rules, and the form of a conversation in which it is scored.

A reward reads text, never the policy's token ids. A rule gives 0 or 1, a reward model (reward_model.py) its score, a
function of the user's own (own_reward.py) what it likes; several are added up (weighted_reward.py).
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from decimal import Decimal
from statistics import fmean

import torch
from torch import Tensor

from nanosafe.io.progress import progress
from nanosafe.text.data import Episode, Row
from nanosafe.text.grading import grade_answers, readable
from nanosafe.text.thoughts import THINK, is_refusal, split_thought

Conversation = list[dict]  # [{"role": ..., "content": ...}, ...]
# Of finished conversations, and the rows that their prompts come from -> float32 [B], on the CPU.
Reward = Callable[[Sequence[Conversation], Sequence[Row]], Tensor]
UNREAD = -math.inf  # the reward of a conversation that is longer than the reward model's context
CHECKED_TOGETHER = 64  # reference answers


def conversation(messages: Conversation, response: str, *, opened_thought: bool,
                 scope: str = "response") -> Conversation:
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


def refusal_rule(conversations: Sequence[Conversation], rows: Sequence[Row]) -> Tensor:
    """1 where the answer opens with a refusal."""
    return torch.tensor([float(is_refusal(messages[-1]["content"])) for messages in conversations])


def math_rule(conversations: Sequence[Conversation], rows: Sequence[Row]) -> Tensor:
    """1 where the answer equals the reference. Raises ValueError naming the row that has no reference answer."""
    references = []
    for row in rows:
        if row.answer is None:
            raise ValueError(f"{row.source} has no reference answer: "
                             "rule:math needs a data set with a field 'answer'")
        references.append(row.answer)
    responses = [messages[-1]["content"] for messages in conversations]
    return torch.tensor(grade_answers("math", responses, list(map(_in_digits, references))))


RULES: dict[str, Reward] = {"rule:math": math_rule, "rule:refusal": refusal_rule}


def check_references(rows: Sequence[Row]) -> None:
    """Raise ValueError, naming file and line, for a row whose reference answer rule:math could not read."""
    for row in rows:
        if not (row.answer or "").strip():
            raise ValueError(f"{row.source}: rule:math compares with field 'answer', "
                             "which is missing or empty")
    for start in progress(range(0, len(rows), CHECKED_TOGETHER), "reference answers"):
        together = rows[start : start + CHECKED_TOGETHER]
        can_read = readable([_in_digits(row.answer) for row in together])
        for row, good in zip(together, can_read, strict=True):
            if not good:
                raise ValueError(f"{row.source}: math-verify cannot read field 'answer', "
                                 f"{row.answer!r:.80}")


def _in_digits(reference: str) -> str:
    """A number as JSON and Python write large and small ones, 1e+22, in whose e mathematics reads Euler's number."""
    number = re.fullmatch(r"\s*([+-]?\d+(\.\d+)?[eE][+-]?\d{1,3})\s*", reference)
    return format(Decimal(number[1]), "f") if number else reference


def known_rewards(reward: Reward, name: str,
                  conversations: Sequence[Conversation]) -> list[float | None]:
    """Rewards for an eval, None for UNREAD. Raises ValueError naming reward and response where one is NaN."""
    known = []
    rows = [Row(messages[:-1], "a question of an eval") for messages in conversations]
    scores = reward(conversations, rows).tolist()
    for score, messages in zip(scores, conversations, strict=True):
        if math.isnan(score):
            response = messages[-1]["content"]
            raise ValueError(f"{name} gives a reward that is not a number to {response!r:.200}: "
                             "its weights are damaged, or overflow in this --dtype")
        known.append(None if score == UNREAD else score)
    return known


def fill_unread(episodes: Sequence[Episode]) -> list[float]:
    """The episodes' rewards; UNREAD becomes the mean of its group's others, which then stays the mean of the group."""
    group_rewards = defaultdict(list)
    for episode in episodes:
        if episode.reward != UNREAD:
            group_rewards[episode.group].append(episode.reward)
    filled = []
    for episode in episodes:
        unread = episode.reward == UNREAD
        filled.append(fmean(group_rewards[episode.group] or [0.0]) if unread else episode.reward)
    return filled
