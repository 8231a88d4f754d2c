"""The bytes of each part of a training run on one GPU, as formulas of the model's config and the flags.

Nothing is measured here; tests compare the formulas with bytes counted on small models. `s` is the size in bytes of a
number of the compute type (--dtype): 2 or 4. What is "per token" is per token of a micro-batch.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from nanosafe.kernels.logprob import tile_columns
from nanosafe.kernels.split_adam import CHUNK, new_state
from nanosafe.model.activations import mlp_size
from nanosafe.model.attention import KVCache
from nanosafe.model.config import ModelConfig
from nanosafe.model.granite import Experts, make_decoder
from nanosafe.sampler.capacity import CacheSize, EngineOptions, cache_size, working_bytes
from nanosafe.sampler.graphs import GraphRunner
from nanosafe.sampler.runner import PagedRunner, SlotRunner
from nanosafe.sampler.spread import part_config, vocabulary_rows


class Sizes(NamedTuple):
    """Numbers of parameters."""

    total: int
    block: int  # of one layer, the largest
    head: int  # V * D; 0 for a reward model, whose head is one row
    root: int  # all but the layers: embedding, last norm, head
    active: int  # without the experts that a token does not pass
    # Of LoRA (lora.py) the adapters, else as above
    trained: int
    trained_block: int
    trained_root: int
    trained_head: int
    scales: int  # of --low-memory's moments


@lru_cache
def sizes(config: ModelConfig) -> Sizes:
    """Counted on the decoder itself, built on the meta device, which holds no data."""
    with torch.device("meta"):
        model = make_decoder(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    layers, trained = [], []
    for layer in model.model.layers:
        layers.append(sum(parameter.numel() for parameter in layer.parameters()))
        trained.append(sum(parameter.numel() for parameter in layer.parameters() if parameter.requires_grad))
    head = 0 if config.num_labels else config.vocab_size * config.hidden_size
    idle = 0
    for module in model.modules():
        if isinstance(module, Experts):
            used = config.hybrid.experts_per_token * module.weight.numel() // config.hybrid.experts
            idle += module.weight.numel() - used
    scales = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            scales += new_state(parameter)["scale"].numel()
    root = total - sum(layers)
    trained_root, trained_head = (0, 0) if config.lora else (root, head)
    return Sizes(total, max(layers), head, root, total - idle,
                 sum(trained) + trained_root, max(trained), trained_root, trained_head, scales)


def training_state(size: Sizes, s: int, world: int, low_memory: bool) -> dict[str, float]:
    """What is resident from start to end: weights, float32 masters and AdamW's two moments.

    One process: the masters are the weights themselves where --dtype is float32. --low-memory: a 16-bit remainder for
    the masters, moments of 8 bits with a float32 scale a block. Several processes share all of it; without --low-memory
    their parameters are float32 and the masters. LoRA: frozen weights are in --dtype and have neither masters nor
    moments.
    """
    P, frozen = size.trained, s * (size.total - size.trained)
    if low_memory:
        state = {"weights": frozen + s * P, "masters": 2 * P, "moments": 2 * P + 4 * size.scales}
    elif world > 1:
        state = {"weights": frozen, "masters": 4 * P, "moments": 8 * P}
    else:
        state = {"weights": frozen + s * P, "masters": 0 if s == 4 else 4 * P, "moments": 8 * P}
    return {part: nbytes / world for part, nbytes in state.items()}


def checkpoint_bytes(size: Sizes, s: int, low_memory: bool) -> float:
    """Bytes of a checkpoint on disk: what trains in --dtype, masters where they are finer, and moments."""
    return sum(training_state(size._replace(total=size.trained), s, 1, low_memory).values())


def gradients(size: Sizes, world: int) -> float:
    """Gradients add up in float32, sharded like the masters, and are freed after each step."""
    return 4 * size.trained / world


def optimizer_workspace(size: Sizes, low_memory: bool, kind: str) -> float:
    """On CUDA both optimizers update in one pass. On a CPU --low-memory goes by chunks, torch's AdamW by tensors."""
    if kind == "cuda":
        return 0
    return 10 * 4 * CHUNK if low_memory else 4 * min(size.head, size.trained)


def sharding_buffers(size: Sizes, s: int, world: int, training: bool) -> float:
    """What several processes hold gathered: the root's parameters in --dtype, the current and the next layer's; in
    training also a layer's gradient in --dtype and, on its way to the other ranks, in float32."""
    if world == 1:
        return 0
    gradients = (s + 4) * size.trained_block if training else 0
    return s * size.root + 2 * s * size.block + gradients


def rollout_weights(config: ModelConfig, s: int, world: int, shards: int) -> float:
    """What several processes gather to sample: all weights or, with --rollout-shards, a rank's part of them."""
    if world == 1:
        return 0
    if shards == 1:
        return s * sizes(config).total
    others = config.vocab_size - vocabulary_rows(config, shards)  # rows of embedding and head that other ranks have
    matrices = 1 if config.tie_word_embeddings else 2
    return s * (sizes(part_config(config, shards)).total - matrices * others * config.hidden_size)


class Frozen(NamedTuple):
    """Where reference and reward model are: on every GPU, in CPU memory but for their turn, or in parts."""

    s: int
    world: int
    offload: bool
    shard: bool  # --shard-frozen

    def add(self, phases: dict[str, dict[str, float]], name: str, size: Sizes, turn: str) -> None:
        """Count one more model in the phases in which it is there; in `turn` it computes."""
        nbytes = self.s * size.total / (self.world if self.shard else 1)
        for phase, parts in phases.items():
            if phase == turn or not self.offload:
                phases[phase] = parts | {name: parts.get(name, 0) + nbytes}
        if self.shard:
            buffers, parts = sharding_buffers(size, self.s, self.world, training=False), phases[turn]
            phases[turn] = parts | {"frozen buffers": max(buffers, parts.get("frozen buffers", 0))}


# Activations.


def saved_bytes(config: ModelConfig, s: int) -> float:
    """Per token: what autograd keeps of one layer's forward for its backward, the layer's input not counted."""
    D, F, head_dim = config.hidden_size, mlp_size(config), config.head_dim
    Q, K = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    normed = Q + K if config.qk_norm else 0  # q and k before their norms
    # The norm; q, k and v; the attended values, per document and joined.
    attention = D + normed + (Q + 2 * K) + 2 * Q
    mlp = 2 * D + 4 * F  # residual sum, its norm; gate, silu(gate), up, their product
    mixer = s * attention + 4 * config.num_attention_heads  # log-sum-exps
    if h := config.hybrid:
        inner, S, chunk = h.mamba_heads * h.mamba_head_dim, h.state_size, h.chunk_size
        # An upper bound, in float32: fifteen tensors like the scan's input, B and C, two with the
        # decays of all pairs in a chunk, two with a state for each chunk.
        scan = 60 * inner + 32 * h.groups * S + 8 * (h.mamba_heads + 1) * chunk + 8 * inner * S / chunk
        mixer = max(mixer, scan)
        mlp += h.experts_per_token * (2 * D + 4 * config.intermediate_size)
    rank = config.lora[0] if config.lora else 0  # an adapter keeps its narrow result; of a hybrid an upper bound
    return mixer + s * (mlp + 7 * rank)


def kept_bytes(config: ModelConfig, s: int, recompute: str) -> float:
    """Per token: what a layer keeps until its backward pass, its input not counted; see model/recompute.py."""
    if recompute == "layer":
        return 0
    if recompute == "none" or config.hybrid:  # of a hybrid an upper bound
        return saved_bytes(config, s)
    Q, K = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    # q, k and v before norms and rotation; the attended values and their product; gate and up; of LoRA the narrow
    # results but for the last product's.
    products = 2 * Q + 2 * K + config.hidden_size + 2 * config.intermediate_size
    products += 6 * config.lora[0] if config.lora else 0
    return s * products + 4 * config.num_attention_heads  # log-sum-exps


def backward_bytes(config: ModelConfig, s: int) -> float:
    """Per token: a layer in its backward: what is saved, and in the MLP the gradients of gate, up or their product."""
    more = s * (3 * config.hidden_size + 2 * mlp_size(config))
    if config.hybrid:  # the gradient of the decays of all pairs in a chunk, in float32
        more += 4 * config.hybrid.mamba_heads * config.hybrid.chunk_size
    return saved_bytes(config, s) + more


def head_tile(config: ModelConfig, s: int, tokens: int) -> int:
    """Bytes of the logits that exist at a time, in float32, on a GPU; a CPU has smaller tiles."""
    return 4 * tokens * min(config.vocab_size, tile_columns(tokens, compute_type(s), is_cuda=True))


def training_activations(config: ModelConfig, size: Sizes, s: int, tokens: int, recompute: str,
                         world: int) -> float:
    """Bytes of one micro-batch of `tokens`, at the worst of three moments: the head's backward, a layer's, the root's.

    Every layer's input is kept, and of the rest what `recompute` says; all of it is there of one layer at a time.
    Beside the inputs there are the last hidden state, its norm, the selection for the head and the gradient. Several
    processes: at the end the gradient of embedding and head, in --dtype and in float32, is summed over the ranks.
    """
    kept = tokens * s * config.hidden_size * (config.num_hidden_layers + 4)
    kept += tokens * 2 * 4 * config.head_dim  # cos and sin
    kept_of_layer = tokens * kept_bytes(config, s, recompute)
    kept += kept_of_layer * config.num_hidden_layers
    layer = tokens * backward_bytes(config, s) - kept_of_layer + s * size.trained_head
    # Its weight's gradient, and in float32 that of the hidden states, which adds up over tiles.
    head = head_tile(config, s, tokens) + s * size.trained_head + 4 * tokens * config.hidden_size
    root = (s + 4) * size.trained_root if world > 1 else 0
    return max(kept + head, kept + layer, root)


# The sampling engine's cache.


def runner_of(kind: str) -> type[PagedRunner]:
    """What runs a model in the sampling engine."""
    return GraphRunner if kind == "cuda" else SlotRunner


def engine_working(config: ModelConfig, s: int, rows: int, longest: int, kind: str) -> int:
    """What the engine keeps free of `rows` requests for a prefill and a draw."""
    return working_bytes(config, compute_type(s), EngineOptions(longest, requests=rows), runner_of(kind), kind)


def engine_cache(config: ModelConfig, s: int, free: float, rows: int, longest: int, kind: str) -> CacheSize:
    """The engine's cache for `rows` requests when `free` bytes are."""
    runner = runner_of(kind)
    options = EngineOptions(longest, requests=rows, cache_bytes=int(free * runner.memory_share))
    return cache_size(config, compute_type(s), options, runner)


def block_bytes(config: ModelConfig, s: int, size: CacheSize) -> int:
    return KVCache.bytes_per_position(config, compute_type(s)) * size.block_size


def state_bytes(config: ModelConfig, s: int, rows: int) -> int:
    """Of the Mamba layers' states of `rows` sequences that decode together, and a scratch one."""
    return (rows + 1) * KVCache.bytes_per_slot(config, compute_type(s))


def compute_type(s: int) -> torch.dtype:
    return torch.float32 if s == 4 else torch.bfloat16
