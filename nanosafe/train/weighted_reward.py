"""Several rewards as one: their weighted sum, with each part logged by its name."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from nanosafe.text.data import Row
from nanosafe.train.rewards import UNREAD, Conversation, Reward

RESERVED = {"mean", "std", "min", "max", "unread"}  # reward/NAME is taken by a statistic


def reward_specs(given: str | Sequence[str]) -> list[str]:
    """--reward-model as a list: one reward, or several."""
    return [given] if isinstance(given, str) else list(given)


def metric_name(spec: str) -> str:
    """What one of several rewards is called in metrics: rule_math, brevity, skywork_v2_llama_8b."""
    last = spec.rstrip("/").split("/")[-1].split(".py:")[-1]
    return re.sub(r"\W+", "_", last)


def check_rewards(given: str | Sequence[str], weights: Sequence[float] | None) -> str | list[str]:
    """--reward-model as it is kept: a single one as its name. Raises ValueError for several that do not go together."""
    specs = reward_specs(given)
    if weights is not None and len(weights) != len(specs):
        raise ValueError(f"--reward-weights: {len(specs)} rewards need as many weights")
    names = [metric_name(spec) for spec in specs]
    if len(specs) > 1 and (len(set(names)) < len(names) or RESERVED.intersection(names)):
        raise ValueError(f"--reward-model {' '.join(specs)}: each needs a name of its own in "
                         f"metrics.jsonl, and none of {', '.join(sorted(RESERVED))}")
    return specs[0] if len(specs) == 1 and weights is None else specs


class WeightedReward:
    """The weighted sum of several rewards."""

    def __init__(self, parts: dict[str, Reward], weights: Sequence[float]):
        """parts: by the names that --reward-model gives them."""
        self.parts, self.weights = parts, torch.tensor(weights)

    def __call__(self, conversations: Sequence[Conversation], rows: Sequence[Row]) -> Tensor:
        return self.total(self.part_scores(conversations, rows))

    def part_scores(self, conversations: Sequence[Conversation], rows: Sequence[Row]) -> Tensor:
        """[B, parts], before the weights."""
        return torch.stack([part(conversations, rows) for part in self.parts.values()], dim=1)

    def total(self, scores: Tensor) -> Tensor:
        """Scores [B, parts] -> [B]. What one part could not read has no reward, whatever its weight."""
        unread = (scores == UNREAD).any(1)
        return torch.where(unread, UNREAD, scores @ self.weights)


def with_parts(reward: Reward, conversations: Sequence[Conversation], rows: Sequence[Row]) -> Tensor:
    """[B, 1 + parts]: the reward, and behind it the parts that a weighted one is the sum of."""
    if not isinstance(reward, WeightedReward):
        return reward(conversations, rows)[:, None]
    scores = reward.part_scores(conversations, rows)
    return torch.cat([reward.total(scores)[:, None], scores], dim=1)
