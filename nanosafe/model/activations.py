"""How much memory a forward pass takes beside the weights, as a formula of the config; tests compare it with counts."""

from nanosafe.model.config import ModelConfig


def mlp_size(config: ModelConfig) -> int:
    return config.hybrid.shared_intermediate_size if config.hybrid else config.intermediate_size


def forward_bytes(config: ModelConfig, s: int) -> float:
    """Per token, without gradients, in a type of `s` bytes: the worst moment of a layer."""
    D, F, head_dim = config.hidden_size, mlp_size(config), config.head_dim
    Q, K = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    mlp = s * (3 * D + 3 * F)  # x, x after attention, its norm; gate, up, silu(gate)
    if config.lora:  # gate; product, update and sum of up
        mlp += s * F
    # x, its norm; q, k, v; in float32 q, both products and the sum
    rope = s * (2 * D + Q + 2 * K) + 4 * 4 * Q
    worst = max(mlp, rope)
    if h := config.hybrid:
        inner, chunk = h.mamba_heads * h.mamba_head_dim, h.chunk_size
        experts = s * (4 + 3 * h.experts_per_token) * D
        # A close upper bound, in float32 (a tensor in bfloat16 is half of one): 3.5 tensors like the
        # scan's input, three with the decays of all pairs in a chunk, 4.75 with a state for each chunk.
        scan = 4 * (3.5 * inner + 3 * h.mamba_heads * chunk + 4.75 * inner * h.state_size / chunk)
        worst = max(worst, experts, scan)
    return worst + 2 * 4 * head_dim  # cos and sin
