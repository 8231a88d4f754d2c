"""Small models for tests: config.json in the official form, and transformers models in which every tensor is random.

A fresh transformers model has zero biases and all-one norms, so a decoder that drops them would still agree with it.
"""

import copy
from pathlib import Path

import torch

from nanosafe.model.config import ModelConfig
from nanosafe.model.decoder import Decoder
from nanosafe.model.granite import make_decoder, official

LLAMA3_ROPE = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
SHARED = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, hidden_act="silu", max_position_embeddings=256, rms_norm_eps=1e-5,
    tie_word_embeddings=False, torch_dtype="float32", bos_token_id=1, eos_token_id=2,
)  # fmt: skip
FAMILIES = {
    "qwen2": dict(model_type="qwen2", rope_theta=10000.0, use_sliding_window=False, sliding_window=4096),
    # heads * head_dim = 64 differs from the hidden size, as in Qwen3-0.6B, 4B and 32B
    "qwen3": dict(model_type="qwen3", rope_theta=1e6, head_dim=16, attention_bias=False),
    "llama": dict(
        # the pairs of a head of 16 fall on both sides of llama3's two wavelengths and between them
        model_type="llama", rope_theta=500000.0, rope_scaling=LLAMA3_ROPE, head_dim=16, attention_bias=False,
        mlp_bias=False,
    ),
    "granite": dict(
        model_type="granite", rope_theta=10000.0, attention_bias=False, mlp_bias=False, tie_word_embeddings=True,
        embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.4, logits_scaling=6.0,
    ),
}  # fmt: skip
# Not among the FAMILIES: its tests are in test_granite.py. Nine tokens to a chunk, so that every text has several.
GRANITE4 = dict(
    architectures=["GraniteMoeHybridForCausalLM"], model_type="granitemoehybrid", num_hidden_layers=4,
    layer_types=["mamba", "attention", "mamba", "mamba"], intermediate_size=24, shared_intermediate_size=40,
    position_embedding_type="nope", rope_theta=10000.0, attention_bias=False, tie_word_embeddings=True,
    embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.4, logits_scaling=6.0,
    num_local_experts=6, num_experts_per_tok=2, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=16, mamba_n_groups=1,
    mamba_d_conv=4, mamba_expand=2, mamba_chunk_size=9, mamba_conv_bias=True, mamba_proj_bias=False,
)


def tiny_raw(family: str, reward: bool = False, **changes) -> dict:
    """A config.json of `family` (of FAMILIES, or granite4) as a dict, in the official form; `reward`: with a head."""
    raw = copy.deepcopy(SHARED | (FAMILIES | {"granite4": GRANITE4})[family])
    head = "SequenceClassification" if reward else "CausalLM"
    raw.setdefault("architectures", [raw["model_type"].capitalize() + "For" + head])
    return raw | ({"id2label": {"0": "LABEL_0"}, "pad_token_id": 0} if reward else {}) | changes


def tiny_config(family: str, **changes) -> ModelConfig:
    return ModelConfig.from_dict(tiny_raw(family, **changes))


def random_reference(raw: dict, seed: int = 0, attention: str = "eager"):
    """The float32 transformers model of `raw`, in eval mode, every weight, norm and bias random.

    Its own default attention is "sdpa", the fused kernel that our decoder calls too; "eager" shares nothing with us.
    """
    import transformers

    name = raw["architectures"][0]
    config = getattr(transformers, name.split("For")[0] + "Config").from_dict(copy.deepcopy(raw))  # it edits its input
    model = getattr(transformers, name)._from_config(config, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            tensor.normal_(generator=generator)
            if "norm" in key:
                tensor.mul_(0.3).add_(1)
            elif tensor.ndim >= 2 and "embed" not in key:
                tensor.mul_(1.5 * tensor.shape[-1] ** -0.5)  # keeps activations near 1
    return model


def random_checkpoint(folder: str | Path, family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """Write the model of `tiny_raw(family, **changes)` to `folder` as transformers does, and return it."""
    model = random_reference(tiny_raw(family, **changes), seed).to(dtype)
    model.save_pretrained(folder)
    return model


def decoder_like(reference, raw: dict) -> Decoder:
    """Our decoder with a copy of the reference's tensors, independent of the code that reads files."""
    model = make_decoder(ModelConfig.from_dict(raw)).to(reference.dtype).eval()
    tensors = {official(name): tensor for name, tensor in reference.state_dict().items()}
    if not hasattr(model, "lm_head"):
        tensors.pop("lm_head.weight", None)  # transformers lists a tied head under both names
    model.load_state_dict(tensors)
    return model
