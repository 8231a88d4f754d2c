"""Spread rollouts (--rollout-shards T): T ranks hold one model together and sample as one, for models whose weights do
not fit on one GPU (tensor parallelism, as in Megatron-LM, arXiv 1909.08053).

Each rank of such a group is a decoder with 1/T of the heads, their part of the KV cache, and 1/T of the MLP's columns.
What `o_proj` and `down_proj` make of these is one part of the result, and is summed over the group. All else is the
code of one process, which sees a config of fewer heads. The vocabulary of embedding and head is cut as well: each rank
draws the best of its own tokens, and the best of these T is drawn, for noise belongs to a token and not to a rank. So
every rank of a group draws the same tokens and runs the same scheduler on the same requests, and none of these needs to
be sent. The groups share the requests as single ranks do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nanosafe.kernels.cpu_matmul import Linear
from nanosafe.kernels.noise import W, gumbel_noise
from nanosafe.kernels.sample import SamplingTensors, draw
from nanosafe.model.config import ModelConfig
from nanosafe.model.decoder import Decoder
from nanosafe.parallel import TIMEOUT, Ranks, full_tensor, unsharded

COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # cut along their outputs
ROW_PARALLEL = ("o_proj", "down_proj")  # cut along their inputs; their results are summed
VOCABULARY = ("embed_tokens", "lm_head")


def check_spread(config: ModelConfig, shards: int, name: str) -> None:
    """Raise ValueError, naming the field, if the model `name` cannot be cut into `shards` equal parts."""
    if config.hybrid and shards > 1:
        raise ValueError(f"--rollout-shards {shards}: {name} is a Granite 4, whose Mamba layers and experts are not "
                         "cut: leave it out")
    for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        size = getattr(config, field)
        if size % shards:
            raise ValueError(f"--rollout-shards {shards} does not divide {field} {size} of {name}: take a number "
                             "that divides heads, key-value heads and the MLP's columns")


def part_config(config: ModelConfig, shards: int) -> ModelConfig:
    """The config of what one rank computes. The vocabulary stays the whole one, by which prompts are checked."""
    return replace(
        config,
        num_attention_heads=config.num_attention_heads // shards,
        num_key_value_heads=config.num_key_value_heads // shards,
        intermediate_size=config.intermediate_size // shards,
    )


def vocabulary_rows(config: ModelConfig, shards: int) -> int:
    """Tokens of each rank. Noise comes in blocks of W tokens, and a block belongs to one rank; the last rank's rows
    beyond the vocabulary are zeros, and are never drawn."""
    return -(-config.vocab_size // (shards * W)) * W


class SamplingGroup(Ranks):
    """The `shards` consecutive ranks that sample together, as one: number `rank` of `world` groups."""

    def __init__(self, ranks: Ranks, shards: int):
        """Every rank must call this: a process group is made of each sampling group."""
        self.ranks, self.shards = ranks, shards
        self.rank, self.index = divmod(ranks.rank, shards)
        self.world, self.device = ranks.world // shards, ranks.device
        members = torch.arange(ranks.world).view(self.world, shards).tolist()
        groups = [dist.new_group(each, timeout=TIMEOUT) for each in members]
        self.process_group = groups[self.rank]

    def __deepcopy__(self, memo: dict) -> "SamplingGroup":
        return self  # in the copy of a model

    def gather(self, items: list) -> list:
        """The lists of all groups, one behind the other; the first rank of each speaks for it."""
        return self.ranks.gather(items if self.index == 0 else [])

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """Add `tensor` over the group, in place."""
        dist.all_reduce(tensor, group=self.process_group)
        return tensor

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The `tensor` of each rank of the group, in order."""
        tensors = [torch.empty_like(tensor) for _ in range(self.shards)]
        dist.all_gather(tensors, tensor.contiguous(), group=self.process_group)
        return tensors

    def least(self, value: int) -> int:
        """The smallest `value` of the group."""
        return min(map(int, self.all_gather(torch.tensor(value, device=self.device))))


# A process group is made once, for it is never given back.
sampling_group = cache(SamplingGroup)


class RowParallelLinear(nn.Module):
    """A linear layer of which each rank has some of the inputs."""

    def __init__(self, part: nn.Module, group: SamplingGroup):
        super().__init__()
        self.part, self.group = part, group

    def forward(self, x: Tensor) -> Tensor:
        return self.group.all_reduce_(self.part(x))


class VocabParallelEmbedding(nn.Module):
    """An embedding of which each rank has the rows of its own tokens, those from `first` on."""

    def __init__(self, rows: int, size: int, group: SamplingGroup):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size))
        self.first, self.group = group.index * rows, group

    def forward(self, tokens: Tensor) -> Tensor:
        rows = tokens - self.first
        elsewhere = (rows < 0) | (rows >= len(self.weight))
        x = F.embedding(rows.masked_fill(elsewhere, 0), self.weight)
        return self.group.all_reduce_(x.masked_fill(elsewhere[:, None], 0.0))  # all but one rank add zeros


class TensorParallelDecoder(Decoder):
    """One rank's part of a model, for inference. Its hidden states and logits are those of the whole model; its
    `head_weight` is the rank's own."""

    def __init__(self, config: ModelConfig, group: SamplingGroup):
        super().__init__(part_config(config, group.shards))
        self.group = group
        rows = vocabulary_rows(config, group.shards)
        self.first = group.index * rows  # token id of the first row
        self.known = min(max(config.vocab_size - self.first, 0), rows)  # rows that are tokens
        self.model.embed_tokens = VocabParallelEmbedding(rows, config.hidden_size, group)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, rows, bias=False)

    def sum_parts(self) -> None:
        """Sum the results of attention and MLP over the group: once, after names and weights have been filled in."""
        for layer in self.model.layers:
            layer.self_attn.o_proj = RowParallelLinear(layer.self_attn.o_proj, self.group)
            layer.mlp.down_proj = RowParallelLinear(layer.mlp.down_proj, self.group)

    def own_logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> float32 logits [..., rows] of this rank's tokens."""
        logits = super().logits(hidden)
        logits[..., self.known :] = -torch.inf
        return logits

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> float32 logits [..., V], gathered from the group: for filters, which need all of them."""
        return torch.cat(self.group.all_gather(self.own_logits(hidden)), dim=-1)[..., : self.config.vocab_size]

    def draw(self, hidden: Tensor, params: SamplingTensors) -> tuple[Tensor, Tensor]:
        """`kernels.sample.draw` without filters, at hidden states [B, D]: every rank draws from its own tokens, and the
        best of these candidates is what one process would have drawn."""
        logits = self.own_logits(hidden)  # [B, rows]
        tokens, logprobs = draw(logits, params, self.first)
        sampled = params.temperature > 0
        scores = logits.gather(1, (tokens - self.first)[:, None])[:, 0] / torch.where(sampled, params.temperature, 1.0)
        noise = gumbel_noise(params.seeds, params.steps, tokens)
        perturbed = torch.where(sampled, scores + noise, scores)
        # The log-sum-exp of the rank's scores; a rank without a token has none.
        masses = torch.where(scores == -torch.inf, scores, scores - logprobs)
        # Ids are exact in float32 up to 2^24.
        candidates = self.group.all_gather(torch.stack((perturbed, scores, masses, tokens.float())))
        perturbed, scores, masses, tokens = torch.stack(candidates, dim=1)  # [T, B] each
        winner = perturbed.argmax(dim=0, keepdim=True)  # Of equals the first, which has the lower id.
        logprobs = scores.gather(0, winner)[0] - masses.logsumexp(dim=0)
        return tokens.gather(0, winner)[0].long(), logprobs


def part(name: str, tensor: Tensor, group: SamplingGroup, rows: int) -> Tensor:
    """What a rank of the group keeps of the whole tensor `name`; a copy, so that the whole can go."""
    module, kind = name.split(".")[-2:]
    # An adapter of a layer that is cut (lora.py) is cut along with it: B by rows, A by columns.
    if module in COLUMN_PARALLEL and kind != "lora_A":
        return tensor.chunk(group.shards)[group.index].clone()
    if module in ROW_PARALLEL and kind in ("weight", "lora_A"):
        return tensor.chunk(group.shards, dim=1)[group.index].clone(memory_format=torch.contiguous_format)
    if module in ROW_PARALLEL and kind == "bias" and group.index > 0:
        return torch.zeros_like(tensor)  # A bias is added once.
    if module in VOCABULARY:
        own = tensor[group.index * rows : (group.index + 1) * rows]
        return F.pad(own, (0, 0, 0, rows - len(own)))
    return tensor


def spread(policy: Decoder, group: SamplingGroup, dtype: torch.dtype) -> TensorParallelDecoder:
    """This rank's part of a sharded policy, in `dtype`; every rank must call this.

    Parameters are gathered one by one, and of each the rank's part is kept: it never holds more than its part and one
    whole parameter.
    """
    with torch.device("meta"):
        model = TensorParallelDecoder(policy.config, group)
    rows, parts = vocabulary_rows(policy.config, group.shards), {}
    for name, tensor in policy.state_dict().items():
        parts[name] = part(name, full_tensor(tensor.to(dtype)), group, rows)
    model.load_state_dict(parts, assign=True)
    model.sum_parts()
    return model.requires_grad_(False)


@contextmanager
@torch.no_grad()
def sampling_model(policy: Decoder, dtype: torch.dtype, ranks: Ranks, shards: int = 1) -> Iterator[Decoder]:
    """The model to sample with: `unsharded` or, in groups of `shards` ranks, this rank's part of one. It is gone after
    the block."""
    if shards == 1:
        with unsharded(policy, dtype) as model:
            yield model
        return
    policy.reshard()
    model = spread(policy, sampling_group(ranks, shards), dtype)
    yield model
    model.to("meta")  # whoever still holds it holds no weights


def sharing(model: Decoder, ranks: Ranks) -> Ranks:
    """Those among whom requests to `model` are shared: the ranks or, of a spread one, their groups."""
    return model.group if isinstance(model, TensorParallelDecoder) else ranks
