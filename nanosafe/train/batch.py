"""A rollout as tensors, and what the trainer itself says of its tokens.

PPO's ratio needs the policy's log-probs before the update. With --old-logprobs trainer a forward pass over the whole
rollout gives them. With sampler they are those that the sampler drew with, and that pass is saved. The trainer then
scores only the first mini-batch, in its update's own forward pass, where the policy is still the one that sampled:
enough to see how far sampler and trainer are apart, and how large the entropies are.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanosafe.io.progress import progress
from nanosafe.model.decoder import Decoder
from nanosafe.model.lora import adapters_off
from nanosafe.parallel import Ranks
from nanosafe.text.data import Episode
from nanosafe.train.offload import on_device
from nanosafe.train.packing import (
    Packed,
    head_logprobs,
    local_microbatches,
    pack,
    response_hidden,
    response_logprobs,
)
from nanosafe.train.rewards import UNREAD

# Of this rank's episodes, by row: [k, response tokens].
RowScores = dict[int, Tensor]


@dataclass
class PolicyScores:
    """What the trainer's forward pass says of response tokens before any update; [B, T] each."""

    logprobs: Tensor  # at the sampling temperature
    entropies: Tensor  # at the sampling temperature
    entropies_at_1: Tensor  # at temperature 1
    mask: Tensor  # which tokens were scored


@dataclass
class Batch:
    """A whole rollout, the same on every rank; tensors are [B, T], right-padded."""

    episodes: list[Episode]
    token_ids: Tensor  # of the responses
    response_mask: Tensor  # which of them are no padding
    loss_mask: Tensor  # which of them count in the loss
    sampler_logprobs: Tensor
    old_logprobs: Tensor  # the policy's before the update, at the sampling temperature: --old-logprobs says whose
    ref_logprobs: Tensor | None  # the reference model's, at the sampling temperature
    scores: PolicyScores | None = None  # of the policy; --old-logprobs sampler: after the first mini-batch
    advantages: Tensor | None = None

    def set_policy_scores(self, scores: RowScores, ranks: Ranks) -> None:
        """Take `score_policy`'s results of some rows; every rank must call this, with its own rows."""
        all_scores = dict(ranks.gather(list(scores.items())))
        columns, masks = [], []
        for row, episode in enumerate(self.episodes):
            length = len(episode.response_ids)
            columns.append(all_scores.get(row, torch.zeros(3, length)).T)
            masks.append(torch.full((length,), row in all_scores))
        logprobs, entropies, at_1 = _pad(columns).permute(2, 0, 1).contiguous().to(ranks.device)
        self.scores = PolicyScores(logprobs, entropies, at_1, _pad(masks).to(ranks.device))


@torch.no_grad()
def score_tokens(policy: Decoder, reference: Decoder | None, episodes: list[Episode],
                 args: Namespace, ranks: Ranks) -> Batch:
    """The rollout as tensors, with the reference's log-probs and, if asked of the trainer, the policy's.

    Each rank runs its own micro-batches.
    """
    token_ids, sampler_logprobs, response_mask, loss_mask = [], [], [], []
    for episode in episodes:
        masked = episode.truncated and args.truncated == "mask"
        counts = episode.reward != UNREAD and not masked
        length = len(episode.response_ids)
        token_ids.append(torch.tensor(episode.response_ids))
        sampler_logprobs.append(torch.tensor(episode.sampler_logprobs))
        response_mask.append(torch.ones(length, dtype=torch.bool))
        loss_mask.append(torch.full((length,), counts))
    sampler_logprobs = _pad(sampler_logprobs).to(ranks.device)
    batch = Batch(
        episodes,
        token_ids=_pad(token_ids).to(ranks.device),
        response_mask=_pad(response_mask).to(ranks.device),
        loss_mask=_pad(loss_mask).to(ranks.device),
        sampler_logprobs=sampler_logprobs,
        old_logprobs=sampler_logprobs,
        ref_logprobs=None,
    )
    batches = local_microbatches(episodes, args.tokens_per_microbatch, ranks)
    packs = [(rows, pack([episodes[row] for row in rows], ranks.device)) for rows in batches]
    if args.old_logprobs == "trainer":
        scores: RowScores = {}
        for rows, packed in progress(packs, "log-probs"):
            hidden = response_hidden(policy, packed)
            logprobs, entropies = head_logprobs(policy, hidden, packed, args.temperature)
            at_1 = entropies_at_1(policy, hidden, packed, entropies, args.temperature)
            scores |= by_row(torch.stack([logprobs, entropies, at_1]), packed, rows)
        batch.set_policy_scores(scores, ranks)
        batch.old_logprobs = batch.scores.logprobs
    if reference is not None:
        scores = {}
        is_policy = reference is policy  # LoRA's, which is the reference without its adapters
        with adapters_off(policy) if is_policy else on_device(reference, ranks.device):
            for rows, packed in progress(packs, "reference"):
                logprobs = response_logprobs(reference, packed, args.temperature)[0]
                scores |= by_row(logprobs[None], packed, rows)
        all_scores = dict(ranks.gather(list(scores.items())))
        ref_logprobs = [all_scores[row][0] for row in range(len(episodes))]
        batch.ref_logprobs = _pad(ref_logprobs).to(ranks.device)
    return batch


@torch.no_grad()
def entropies_at_1(policy: Decoder, hidden: Tensor, packed: Packed, entropies: Tensor,
                   temperature: float) -> Tensor:
    """Entropies [R] at temperature 1 of the tokens whose entropies at `temperature` are known."""
    if temperature == 1:
        return entropies
    # A second pass of the head; the layers' passes are the dear ones.
    return head_logprobs(policy, hidden, packed, 1.0)[1]


def by_row(values: Tensor, packed: Packed, rows: list[int]) -> RowScores:
    """Values [k, R] of the response tokens of a pack of `rows` -> those of each row, on the CPU."""
    scores = {}
    for row, score in zip(rows, values.detach().cpu().split(packed.lengths, dim=1), strict=True):
        # A view would take the whole micro-batch along to another rank.
        scores[row] = score.clone()
    return scores


def _pad(rows: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
