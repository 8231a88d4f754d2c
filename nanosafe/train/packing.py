"""Token ids to packed micro-batches, and from them to log-probs: what both training loops and scoring run on.

A micro-batch is one run of tokens: documents one behind the other, up to a budget of tokens, each seeing itself alone.
The documents of a step go to the ranks so that all have about as many tokens.
"""

from collections.abc import Sequence, Sized
from dataclasses import dataclass

import torch
from torch import Tensor

from nanosafe.kernels.logprob import token_logprob_entropy
from nanosafe.model.attention import PackedDocuments
from nanosafe.model.decoder import Decoder
from nanosafe.parallel import Ranks
from nanosafe.text.data import Document


@dataclass
class Packed:
    """Documents one behind the other, N tokens; R of them are response tokens."""

    tokens: Tensor  # [N]
    memory: PackedDocuments
    predicts: Tensor  # [R] positions in the pack whose hidden state predicts a response token
    targets: Tensor  # [R] those tokens
    lengths: list[int]  # response tokens of each document

    def pad(self, values: Tensor) -> Tensor:
        """[R] -> [documents, longest response], right-padded with 0."""
        if not self.lengths:
            return values.reshape(0, 0)
        return torch.nn.utils.rnn.pad_sequence(values.split(self.lengths), batch_first=True)


def pack(documents: Sequence[Document], device: torch.device) -> Packed:
    tokens, predicts, targets = [], [], []
    for document in documents:
        # The prompt's last token predicts the first of the response.
        first = len(tokens) + len(document.prompt_ids) - 1
        predicts += range(first, first + len(document.response_ids))
        targets += document.response_ids
        tokens += document.prompt_ids + document.response_ids
    return Packed(
        tokens=torch.tensor(tokens, dtype=torch.long, device=device),
        memory=PackedDocuments([len(document) for document in documents], device),
        predicts=torch.tensor(predicts, dtype=torch.long, device=device),
        targets=torch.tensor(targets, dtype=torch.long, device=device),
        lengths=[len(document.response_ids) for document in documents],
    )


def microbatches(
    documents: Sequence[Sized], max_tokens: int, order: Sequence[int] | None = None
) -> list[list[int]]:
    """Indices of documents, in `order`, in runs of at most `max_tokens` tokens; a longer document goes alone."""
    batches: list[list[int]] = []
    filled = 0
    for i in range(len(documents)) if order is None else order:
        if not batches or filled + len(documents[i]) > max_tokens:
            batches.append([])
            filled = 0
        batches[-1].append(i)
        filled += len(documents[i])
    return batches


def local_microbatches(documents: Sequence[Sized], max_tokens: int, ranks: Ranks) -> list[list[int]]:
    """This rank's micro-batches, as indices of `documents`, which every rank knows.

    All ranks get equally many, because under sharding each is an exchange: the last ones of a rank may be empty.
    """
    parts = partition([len(document) for document in documents], ranks.world)
    batches = [microbatches(documents, max_tokens, order=part) for part in parts]
    local = batches[ranks.rank]
    while len(local) < max(map(len, batches)):
        local.append([])
    return local


def partition(costs: Sequence[float], parts: int) -> list[list[int]]:
    """The items, numbered as in `costs`, in `parts` lists of about equal cost, each in ascending order."""
    lists: list[list[int]] = [[] for _ in range(parts)]
    totals = [0.0] * parts
    # The dearest are dealt first, each to the list that has least.
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = totals.index(min(totals))
        lists[least].append(item)
        totals[least] += costs[item]
    return [sorted(items) for items in lists]


def response_logprobs(model: Decoder, packed: Packed, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs [R] and entropies [R] (nats, float32) of a pack's response tokens at `temperature`."""
    return head_logprobs(model, response_hidden(model, packed), packed, temperature)


def response_hidden(model: Decoder, packed: Packed) -> Tensor:
    """The hidden states [R, D] that predict response tokens, selected before the head: prompts never reach it."""
    return model.hidden(packed.tokens, packed.memory.positions, packed.memory)[packed.predicts]


def head_logprobs(model: Decoder, hidden: Tensor, packed: Packed, temperature: float) -> tuple[Tensor, Tensor]:
    """`response_logprobs` from hidden states that are there already, for a second temperature."""
    divisor = temperature * model.config.logits_scaling
    return token_logprob_entropy(hidden, model.head_weight, packed.targets, divisor)
