"""The shapes of official models, so that --plan and --random-weights need no download."""

# What each alias's config.json says of its shape: enough for --plan and --random-weights to build the model without a
# download. Values of the official files or, for want of those, of model cards and memory: Skywork's (the shape of what
# each was trained from), Llama-Guard's, Llama 3.2's, the Granites', and 70B's; llama-3.3-70b is no alias.
_LLAMA31 = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=4096,
    intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=500000.0,
    tie_word_embeddings=False,
    rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                      original_max_position_embeddings=8192),
    bos_token_id=128000, eos_token_id=[128001, 128008, 128009],
)  # fmt: skip
_LLAMA32 = _LLAMA31 | dict(intermediate_size=8192, tie_word_embeddings=True,
                           rope_scaling=_LLAMA31["rope_scaling"] | dict(factor=32.0))
_LLAMA_70B = _LLAMA31 | dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                             num_attention_heads=64)
_2507 = dict(max_position_embeddings=262144, rope_theta=5000000)  # Qwen3 models of July 2025
_SCORE = dict(id2label={"0": "LABEL_0"})


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, tied: bool) -> dict:
    return dict(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_size=hidden,
        intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=40960,
        rms_norm_eps=1e-6, rope_theta=1000000, tie_word_embeddings=tied, bos_token_id=151643,
        eos_token_id=151645,
    )  # fmt: skip


def _r1_qwen(hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int) -> dict:
    return dict(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_size=hidden,
        intermediate_size=intermediate, num_hidden_layers=28, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, max_position_embeddings=131072,
        rms_norm_eps=1e-6, rope_theta=10000, tie_word_embeddings=False, bos_token_id=151643,
        eos_token_id=151643,
    )  # fmt: skip


def _granite4(experts: int, vocabulary: int, special: dict) -> dict:
    return dict(
        architectures=["GraniteMoeHybridForCausalLM"], model_type="granitemoehybrid",
        hidden_size=1536, intermediate_size=512, shared_intermediate_size=1024,
        num_hidden_layers=40, num_attention_heads=12, num_key_value_heads=4, vocab_size=vocabulary,
        max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=10000,
        position_embedding_type="nope", tie_word_embeddings=True, embedding_multiplier=12,
        attention_multiplier=0.0078125, residual_multiplier=0.22, logits_scaling=6,
        num_local_experts=experts, num_experts_per_tok=6,
        layer_types=["attention" if i % 10 == 5 else "mamba" for i in range(40)], mamba_n_heads=48,
        mamba_d_head=64, mamba_d_state=128, mamba_n_groups=1, mamba_d_conv=4, mamba_expand=2,
        mamba_chunk_size=256, mamba_conv_bias=True, mamba_proj_bias=False, **special,
    )  # fmt: skip


SHAPES = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, True),
    "qwen3-4b-2507": _qwen3(2560, 9728, 36, 32, True) | _2507,
    "qwen3-4b-thinking-2507": _qwen3(2560, 9728, 36, 32, True) | _2507,
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, False),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, False),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, False),
    "r1-qwen-1.5b": _r1_qwen(1536, 8960, 12, 2, 151936),
    "r1-qwen-7b": _r1_qwen(3584, 18944, 28, 4, 152064),
    "r1-0528-qwen3-8b": _qwen3(4096, 12288, 36, 32, False) | dict(
        max_position_embeddings=131072,
        rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768,
                          attn_factor=0.8782488562869419),
    ),
    "r1-llama-8b": _LLAMA31 | dict(eos_token_id=128001),
    "llama-3.1-8b": _LLAMA31,
    "llama-guard-3": _LLAMA31,
    "llama-3.2-1b": _LLAMA32 | dict(hidden_size=2048, num_hidden_layers=16, head_dim=64),
    "llama-3.2-3b": _LLAMA32 | dict(hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, head_dim=128),
    "llama-3.3-70b": _LLAMA_70B,
    "r1-llama-70b": _LLAMA_70B | dict(eos_token_id=128001),
    "smollm2-135m": dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=576,
        intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=100000,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    ),
    "granite-4.0-350m": dict(
        architectures=["GraniteMoeHybridForCausalLM"], model_type="granitemoehybrid",
        hidden_size=1024, intermediate_size=2048, shared_intermediate_size=2048,
        num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=4, vocab_size=100352,
        max_position_embeddings=32768, rms_norm_eps=1e-5, rope_theta=10000000,
        position_embedding_type="rope", tie_word_embeddings=True, embedding_multiplier=12,
        attention_multiplier=0.015625, residual_multiplier=0.263, logits_scaling=4,
        num_local_experts=0, num_experts_per_tok=0, layer_types=["attention"] * 28, mamba_n_heads=128,
        mamba_d_head=16, mamba_d_state=256, mamba_n_groups=1, mamba_d_conv=4, mamba_expand=2,
        mamba_chunk_size=256, mamba_conv_bias=True, mamba_proj_bias=False, bos_token_id=100257,
        eos_token_id=100257, pad_token_id=100256,
    ),
    "granite-guardian": dict(
        architectures=["GraniteForCausalLM"], model_type="granite", hidden_size=4096,
        intermediate_size=12800, num_hidden_layers=40, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=49155, max_position_embeddings=131072, rms_norm_eps=1e-5,
        rope_theta=10000000.0, tie_word_embeddings=True, embedding_multiplier=12.0,
        attention_multiplier=0.0078125, residual_multiplier=0.22, logits_scaling=16.0,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    ),
    "granite-4.0-tiny": _granite4(62, 49160, dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)),
    "granite-4.0-h-tiny": _granite4(64, 100352, dict(bos_token_id=100257, eos_token_id=100257,
                                                     pad_token_id=100256)),
}  # fmt: skip
SHAPES |= {f"skywork-v2-llama-{size}": SHAPES[name] | _SCORE | dict(architectures=["LlamaForSequenceClassification"])
           for size, name in (("1b", "llama-3.2-1b"), ("3b", "llama-3.2-3b"), ("8b", "llama-3.1-8b"))}  # fmt: skip
SHAPES |= {f"skywork-v2-{name}": SHAPES[name] | _SCORE | dict(architectures=["Qwen3ForSequenceClassification"])
           for name in ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b")}  # fmt: skip
