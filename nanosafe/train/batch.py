"""A rollout as tensors, and the trainer's own log-probs of its tokens."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanosafe.io.progress import progress
from nanosafe.model.decoder import Decoder
from nanosafe.parallel import Ranks
from nanosafe.text.data import Episode
from nanosafe.train.offload import on_device
from nanosafe.train.packing import (
    head_logprobs,
    local_microbatches,
    pack,
    response_hidden,
    response_logprobs,
)
from nanosafe.train.rewards import UNREAD


@dataclass
class Batch:
    """A whole rollout, the same on every rank; tensors are [B, T], right-padded."""

    episodes: list[Episode]
    token_ids: Tensor  # of the responses
    response_mask: Tensor  # which of them are no padding
    loss_mask: Tensor  # which of them count in the loss
    sampler_logprobs: Tensor
    logprobs: Tensor  # the policy's before the update, at the sampling temperature
    entropies: Tensor  # the policy's, at the sampling temperature
    entropies_at_1: Tensor  # the policy's, at temperature 1
    ref_logprobs: Tensor | None  # the reference model's, at the sampling temperature
    advantages: Tensor | None = None


@torch.no_grad()
def score_tokens(policy: Decoder, reference: Decoder | None, episodes: list[Episode],
                 args: Namespace, ranks: Ranks) -> Batch:
    """The policy's and the reference's log-probs of all response tokens; each rank runs its own micro-batches."""
    batches = local_microbatches(episodes, args.tokens_per_microbatch, ranks)
    packs = [(rows, pack([episodes[row] for row in rows], ranks.device)) for rows in batches]
    # Of this rank's rows: [3, length], or [4, length] with a reference.
    scores: dict[int, Tensor] = {}
    for rows, packed in progress(packs, "log-probs"):
        hidden = response_hidden(policy, packed)
        logprobs, entropies = head_logprobs(policy, hidden, packed, args.temperature)
        at_1 = entropies
        if args.temperature != 1:  # a second pass of the head; the layers' passes are the dear ones
            at_1 = head_logprobs(policy, hidden, packed, 1.0)[1]
        values = torch.stack([logprobs, entropies, at_1]).cpu()
        for row, score in zip(rows, values.split(packed.lengths, dim=1), strict=True):
            # A view would take the whole micro-batch along to another rank.
            scores[row] = score.clone()
    if reference is not None:
        with on_device(reference, ranks.device):
            for rows, packed in progress(packs, "reference"):
                logprobs = response_logprobs(reference, packed, args.temperature)[0].cpu()
                for row, score in zip(rows, logprobs.split(packed.lengths), strict=True):
                    scores[row] = torch.cat([scores[row], score[None]])
    by_row = dict(ranks.gather(list(scores.items())))
    padded = _pad([by_row[row].T for row in range(len(episodes))])  # [B, T, 3 or 4]
    logprobs, entropies, at_1, *ref_logprobs = padded.permute(2, 0, 1).contiguous().to(ranks.device)
    token_ids, sampler_logprobs, response_mask, loss_mask = [], [], [], []
    for episode in episodes:
        masked = episode.truncated and args.truncated == "mask"
        counts = episode.reward != UNREAD and not masked
        length = len(episode.response_ids)
        token_ids.append(torch.tensor(episode.response_ids))
        sampler_logprobs.append(torch.tensor(episode.sampler_logprobs))
        response_mask.append(torch.ones(length, dtype=torch.bool))
        loss_mask.append(torch.full((length,), counts))
    return Batch(
        episodes,
        token_ids=_pad(token_ids).to(ranks.device),
        response_mask=_pad(response_mask).to(ranks.device),
        loss_mask=_pad(loss_mask).to(ranks.device),
        sampler_logprobs=_pad(sampler_logprobs).to(ranks.device),
        logprobs=logprobs,
        entropies=entropies,
        entropies_at_1=at_1,
        ref_logprobs=ref_logprobs[0] if ref_logprobs else None,
    )


def _pad(rows: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
