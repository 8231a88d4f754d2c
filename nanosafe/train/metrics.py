"""What is written of a step of train_rl.py: metrics of its rollout, rows of samples.jsonl, the line on the console.

docs/metrics.md explains each metric.
"""

import math

import torch
from torch import Tensor

from nanosafe.text.data import Episode
from nanosafe.train.batch import Batch
from nanosafe.train.reinforce import token_kl
from nanosafe.train.rewards import UNREAD

SAMPLES_PER_STEP = 8  # episodes written to samples.jsonl


def rollout_metrics(batch: Batch, reflection: Tensor) -> dict[str, float]:
    """What the rollout looks like. reflection: the ids of reflection tokens."""
    scored = [e.reward for e in batch.episodes if e.reward != UNREAD]
    rewards = torch.tensor(scored or [math.nan], dtype=torch.float64)
    lengths = [len(e.response_ids) for e in batch.episodes]
    tokens = sum(lengths)
    truncated = sum(e.truncated for e in batch.episodes) / len(lengths)
    reflecting = torch.isin(batch.token_ids.cpu(), reflection).to(batch.response_mask.device)
    reflecting &= batch.response_mask
    metrics = {
        "reward/mean": rewards.mean(),
        "reward/std": rewards.std(correction=0),
        "reward/min": rewards.min(),
        "reward/max": rewards.max(),
        "reward/unread": torch.tensor(len(batch.episodes) - len(scored)),
        "reflection/per_1000": 1000 * reflecting.double().sum() / tokens,
    }
    for name in batch.episodes[0].reward_parts:
        values = [e.reward_parts[name] for e in batch.episodes if e.reward != UNREAD]
        metrics[f"reward/{name}"] = torch.tensor(values or [math.nan], dtype=torch.float64).mean()
    if batch.ref_logprobs is not None:
        kl = gap_stats(batch.old_logprobs, batch.ref_logprobs, batch.response_mask)
        metrics |= {"kl/k1": kl["k1_sum"] / tokens, "kl/k3": kl["k3_sum"] / tokens}
    metrics = {name: value.item() for name, value in metrics.items()}
    return metrics | {
        "response/tokens": tokens,
        "response/length_mean": tokens / len(lengths),
        "response/length_max": max(lengths),
        "response/truncated": truncated,
        "response/eos": 1 - truncated,
    }


def policy_metrics(batch: Batch, reflection: Tensor) -> dict[str, float]:
    """What the trainer's scores of the rollout say; NaN where it has scored no such tokens."""
    if batch.scores is None:  # no update ran that would have made them
        return {}
    scored = batch.scores.mask
    reflecting = torch.isin(batch.token_ids.cpu(), reflection).to(scored.device) & scored
    mismatch = gap_stats(batch.sampler_logprobs, batch.scores.logprobs, scored)
    metrics = {
        "policy/entropy": batch.scores.entropies[scored].double().mean(),
        "reflection/entropy": batch.scores.entropies_at_1[reflecting].double().mean(),
        "mismatch/mean": mismatch["abs_sum"] / mismatch["tokens"],
        "mismatch/k3": mismatch["k3_sum"] / mismatch["tokens"],
        "mismatch/max": mismatch["abs_max"],
    }
    return {name: value.item() for name, value in metrics.items()}


@torch.no_grad()
def gap_stats(logprobs: Tensor, other_logprobs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """How far log-probs [B, T] of two models are apart on tokens the first drew: policy, reference; sampler, trainer.

    Float64 scalars: `k1_sum` and `k3_sum` of KL(first || second), `abs_sum` of |difference|, `tokens`; ranks can add
    them, but of `abs_max` (0 for an empty batch) they take the maximum.
    """
    # Zeros off the mask by `where`, not by a product: 0 * NaN is NaN.
    mask = mask.bool()
    first = torch.where(mask, logprobs, 0.0).double()
    second = torch.where(mask, other_logprobs, 0.0).double()
    difference = first - second
    gap = difference.abs()
    return {
        "k1_sum": difference.sum(),
        "k3_sum": token_kl(first, second, "k3").sum(),
        "abs_sum": gap.sum(),
        "abs_max": gap.max() if gap.numel() else gap.sum(),
        "tokens": mask.sum().double(),
    }


def sample_rows(episodes: list[Episode], step: int) -> list[dict]:
    """The first episodes of step `step` (from 0) as rows of samples.jsonl."""
    def number(score: float) -> float | None:
        return score if math.isfinite(score) else None  # JSON has no infinity

    rows = []
    for episode in episodes[:SAMPLES_PER_STEP]:
        rows.append({
            "step": step + 1,
            "row": episode.row,
            "prompt": episode.source.prompt,
            "response": episode.text,
            "reward": number(episode.reward),
            **{f"reward/{name}": number(score) for name, score in episode.reward_parts.items()},
            "tokens": len(episode.response_ids),
            "truncated": episode.truncated,
        })
    return rows


def console_line(row: dict, steps: int) -> str:
    """A row of metrics.jsonl in one line, with the signs of a run that learns nothing at its end."""

    def show(name: str, form: str) -> str:
        return "-" if row.get(name) is None else format(row[name], form)

    cut = show("response/truncated", ".0%")
    parts = [
        f"step {row['step']}/{steps}",
        f"reward {show('reward/mean', '.3f')} ± {show('reward/std', '.3f')}",
        f"kl {show('kl/k1', '.4f')}",
        f"entropy {show('policy/entropy', '.3f')}",
        f"clip {show('policy/clip_fraction', '.3f')}",
        f"grad {show('policy/grad_norm', '.3f')}",
        f"length {show('response/length_mean', '.0f')} ({cut} cut)",
        f"lr {show('policy/lr', '.1e')}",
        f"{row['time/step']:.1f} s, {row['time/rollout_per_s']:.0f} tok/s",
    ]
    if row["policy/skipped"]:
        parts.append(f"{row['policy/skipped']} updates skipped")
    if row["reward/unread"]:
        parts.append(f"{row['reward/unread']} too long for the reward model")
    if row["reward/min"] is not None and row["reward/min"] == row["reward/max"]:
        parts.append("all rewards equal")
    if row["response/truncated"] == 1:
        parts.append("all responses cut: raise --max-response-tokens")
    if row.get("policy/grad_norm") == 0 and not row["policy/skipped"]:
        parts.append("gradient exactly 0")
    return " | ".join(parts)
