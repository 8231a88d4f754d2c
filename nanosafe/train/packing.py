"""Token ids to packed micro-batches, and from them to log-probs: what both training loops and scoring run on.

A micro-batch is one run of tokens: documents one behind the other, up to a budget of tokens, each seeing itself alone.
The micro-batches of a step are spread over the ranks so that all have about the same work.
"""

from collections.abc import Sequence, Sized
from dataclasses import dataclass

import torch
from torch import Tensor

from nanosafe.kernels.logprob import token_logprob_entropy
from nanosafe.model.attention import PackedDocuments
from nanosafe.model.config import ModelConfig
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
    predicts, start = [], 0
    for d in documents:
        first = start + len(d.prompt_ids) - 1  # the prompt's last token predicts the response's first
        predicts += range(first, first + len(d.response_ids))
        start += len(d)
    return Packed(
        tokens=torch.tensor(
            [t for d in documents for t in d.prompt_ids + d.response_ids], dtype=torch.long, device=device
        ),
        memory=PackedDocuments([len(d) for d in documents], device),
        predicts=torch.tensor(predicts, dtype=torch.long, device=device),
        targets=torch.tensor([t for d in documents for t in d.response_ids], dtype=torch.long, device=device),
        lengths=[len(d.response_ids) for d in documents],
    )


def microbatches(documents: Sequence[Sized], max_tokens: int) -> list[list[int]]:
    """Indices of documents, in order, in runs of at most `max_tokens` tokens; a longer document goes alone."""
    batches: list[list[int]] = []
    filled = 0
    for i, document in enumerate(documents):
        if not batches or filled + len(document) > max_tokens:
            batches.append([])
            filled = 0
        batches[-1].append(i)
        filled += len(document)
    return batches


def own_microbatches(documents: Sequence[Sized], max_tokens: int, config: ModelConfig, ranks: Ranks) -> list[list[int]]:
    """This rank's micro-batches of `documents`, which every rank knows. All ranks get equally many, because under
    sharding each is an exchange: where a rank has fewer, its last ones are empty."""
    parts = ranks.balance([work(config, len(document)) for document in documents])
    batches = [[[part[i] for i in batch] for batch in microbatches([documents[i] for i in part], max_tokens)]
               for part in parts]  # fmt: skip
    return batches[ranks.rank] + [[]] * (max(map(len, batches)) - len(batches[ranks.rank]))


def work(config: ModelConfig, tokens: int) -> int:
    """Multiply-adds of the layers' forward pass over one document: its predicted cost."""
    D, h = config.hidden_size, config.hybrid
    heads = config.num_attention_heads * config.head_dim
    kv_heads = config.num_key_value_heads * config.head_dim
    # A token sees half of them on average, once for its scores, once for its values.
    attention = D * (2 * heads + 2 * kv_heads) + tokens * heads
    if not h:
        return config.num_hidden_layers * tokens * (attention + 3 * D * config.intermediate_size)
    inner, chunk = h.mamba_heads * h.mamba_head_dim, min(h.chunk_size, tokens)
    mamba = D * (2 * inner + h.channels + h.mamba_heads) + h.channels * h.conv_size  # projections, convolution
    # Scan: of the tokens of its chunk the products with a token's C, and what they add to it; the state, in and out.
    mamba += chunk * (h.groups * h.state_size + inner) + 2 * inner * h.state_size
    mlp = D * (h.experts + 3 * h.experts_per_token * config.intermediate_size + 3 * h.shared_intermediate_size)
    layers = (config.num_hidden_layers - config.attention_layers) * mamba + config.attention_layers * attention
    return tokens * (layers + config.num_hidden_layers * mlp)


def response_logprobs(model: Decoder, packed: Packed, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs [R] and entropies [R] (nats, float32) of a pack's response tokens at `temperature`."""
    return head_logprobs(model, response_hidden(model, packed), packed, temperature)


def response_hidden(model: Decoder, packed: Packed) -> Tensor:
    """The hidden states [R, D] that predict response tokens, selected before the head: prompts never reach it."""
    return model.hidden(packed.tokens, packed.memory.positions, packed.memory)[packed.predicts]


def head_logprobs(model: Decoder, hidden: Tensor, packed: Packed, temperature: float) -> tuple[Tensor, Tensor]:
    """`response_logprobs` from hidden states that are there already, for a second temperature."""
    return token_logprob_entropy(hidden, model.head_weight, packed.targets, temperature * model.config.logits_scaling)
