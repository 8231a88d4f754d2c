"""What may stand in the JSON files of a model folder: a table of fields for each file.

A folder may come from anyone. A field that cannot be computed as it stands is an error that names file and field.
Null is as good as absent, and what is in no table changes nothing that is computed.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

REQUIRED = object()  # the default of a field that must be there


class Field(NamedTuple):
    meaning: str  # what the value must be, for the error
    read: Callable[[Any], Any]  # the value as it is used, None if it is not what it must be
    default: Any = None  # what stands for an absent value


def check(raw: dict, table: dict[str, Field], where: str | Path) -> dict[str, Any]:
    """The fields of `table` as `raw` has them, or else their defaults.

    Raises ValueError with `where`, the file, and the first field that is wrong.
    """
    values = {}
    for name, field in table.items():
        given = raw.get(name)
        if given is None and field.default is REQUIRED:
            raise ValueError(f"{where}: field {name!r} is missing, it must be {field.meaning}")
        values[name] = field.default if given is None else field.read(given)
        if given is not None and values[name] is None:
            raise wrong(where, name, given, field.meaning)
    return values


def wrong(where: str | Path, name: str, value: Any, meaning: str) -> ValueError:
    """The error for a field `name` whose `value` is not what it must be by its `meaning`."""
    found = f"field {name!r} = {value!r:.200} is not supported"
    return ValueError(f"{where}: {found}, it must be {meaning}")


# Kinds of fields


def only_if(meaning: str, is_valid: Callable[[Any], bool], default: Any = None) -> Field:
    """A field whose valid values are used as they stand."""
    return Field(meaning, lambda value: value if is_valid(value) else None, default)


def number(low: float, high: float, default: Any = None) -> Field:
    meaning = f"a number from {low:g} to {high:g}"
    return only_if(meaning, lambda value: _is_number(value) and low <= value <= high, default)


def whole(low: int, high: int, default: Any = None) -> Field:
    def read(value: Any) -> int | None:
        within = _is_number(value) and low <= value <= high
        return int(value) if within and value == int(value) else None

    return Field(f"a whole number from {low} to {high}", read, default)


def flag(default: bool) -> Field:
    return only_if("true or false", lambda value: isinstance(value, bool), default)


def one_of(*names: str, default: str | None = None) -> Field:
    return only_if(" or ".join(names), lambda value: isinstance(value, str) and value in names, default)


def absent(why: str) -> Field:
    return only_if(f"absent: {why}", lambda value: not value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)  # a bool is an int to isinstance


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _read_ids(value: Any) -> frozenset[int] | None:
    ids = value if isinstance(value, list) else [value]
    valid = all(type(token) is int and 0 <= token < 2**31 for token in ids)
    return frozenset(ids) if valid else None


TEXT = only_if("a text", lambda value: isinstance(value, str))
OBJECT = only_if("an object", lambda value: isinstance(value, dict), {})
EOS = Field("a token id or a list of token ids", _read_ids, frozenset())
LAYER_TYPES = only_if("a list with the kind of each layer", _are_texts)
FOREIGN = absent("it is not part of this family")
# Beyond these bounds no model is, and every product of theirs is a size that torch can count.
WIDTH, COUNT, POSITIONS = 1 << 22, 1 << 12, 1 << 31
SCALE = (1e-6, 1e6)
# Infinity as Python's JSON spells it, and as transformers 5 does.
UNLIMITED = ([0, math.inf], [0, {"__float__": "Infinity"}])


def fields_by_name(rows: dict[str, Field]) -> dict[str, Field]:
    """A table of rows that may name several fields of a kind, between spaces."""
    return {name: field for names, field in rows.items() for name in names.split()}


CONFIG = fields_by_name({  # config.json of every family
    "vocab_size": whole(1, 1 << 24, REQUIRED),
    "hidden_size": whole(1, WIDTH, REQUIRED),
    "intermediate_size": whole(0, WIDTH, 0),
    "num_hidden_layers num_attention_heads": whole(1, COUNT, REQUIRED),
    "num_key_value_heads head_dim num_labels": whole(1, COUNT),
    "max_position_embeddings": whole(1, POSITIONS, REQUIRED),
    "original_max_position_embeddings": whole(1, POSITIONS),
    "sliding_window": whole(0, POSITIONS),
    "max_window_layers": whole(0, COUNT, 28),
    "pad_token_id": whole(-1, POSITIONS),
    "nanosafe_seed": whole(0, 1 << 63),
    "rms_norm_eps": number(1e-15, 1, REQUIRED),
    "embedding_multiplier attention_multiplier residual_multiplier logits_scaling":
        number(*SCALE, 1.0),
    "partial_rotary_factor": number(1, 1),
    "attention_bias mlp_bias tie_word_embeddings use_sliding_window": flag(False),
    "is_causal": only_if("true: attention is causal", lambda value: value is True),
    "hidden_act": one_of("silu", "swish", default="silu"),
    "nanosafe_world": TEXT,
    "eos_token_id": EOS,
    "layer_types": LAYER_TYPES,
    "rope_scaling rope_parameters id2label": OBJECT,
    "auto_map": absent("it names code of the checkpoint, and remote code is never run"),
    "quantization_config compression_config":
        absent("quantised weights are not read, so use the original bf16 checkpoint"),
    "num_experts use_mrope per_layer_config attn_logit_softcapping final_logit_softcapping":
        FOREIGN,
})  # fmt: skip
DENSE = fields_by_name({"num_local_experts": FOREIGN})
HYBRID = fields_by_name({  # GraniteMoeHybrid's own, with transformers' defaults
    "layers_block_type": LAYER_TYPES,
    "position_embedding_type": one_of("nope", "rope", default="nope"),
    "num_local_experts": whole(0, COUNT, 8),
    "num_experts_per_tok": whole(0, COUNT, 2),
    "shared_intermediate_size": whole(1, WIDTH, 1024),
    "router_aux_loss_coef": number(0, 1e6, 0.001),
    "mamba_n_heads": whole(1, COUNT, 128),
    "mamba_n_groups": whole(1, COUNT, 1),
    "mamba_d_state mamba_chunk_size": whole(1, COUNT, 256),
    "mamba_d_conv": whole(1, COUNT, 4),
    "mamba_expand": whole(1, COUNT, 2),
    "mamba_d_head": only_if("auto or a whole number", lambda d: type(d) is int or d == "auto"),
    "mamba_conv_bias": flag(True),
    "mamba_proj_bias output_router_logits": flag(False),
    "time_step_limit": only_if("[0, Infinity]: time steps are not clamped",
                               lambda limits: limits in UNLIMITED),
})  # fmt: skip
ROPE = fields_by_name({  # rope_scaling and rope_parameters, where another key is an error
    "rope_type type": one_of("default", "linear", "llama3", "yarn"),
    "rope_theta": number(2, 1e15, REQUIRED),
    "original_max_position_embeddings": whole(1, POSITIONS),
    "factor low_freq_factor high_freq_factor attention_factor": number(*SCALE),
    "attn_factor beta_slow": number(*SCALE, 1.0),
    "beta_fast": number(*SCALE, 32.0),
    "mscale mscale_all_dim": number(0, 1e6),
    "partial_rotary_factor": number(1, 1),
    "truncate": flag(True),
})  # fmt: skip
ADAPTER = fields_by_name({  # adapter_config.json, as PEFT writes it
    "peft_type": one_of("LORA", default="LORA"),
    "base_model_name_or_path": TEXT._replace(default=REQUIRED),
    "revision": TEXT,
    "r": whole(1, WIDTH, REQUIRED),
    "lora_alpha": number(*SCALE, REQUIRED),
    "use_rslora use_dora rank_pattern alpha_pattern modules_to_save":
        absent("only LoRA with one rank and one alpha is read"),
})  # fmt: skip
GENERATION = fields_by_name({  # generation_config.json
    "eos_token_id": EOS,
    "do_sample": flag(True),
    "temperature": only_if("0 or a number from 1e-6 to 1e6",
                           lambda t: _is_number(t) and (t == 0 or SCALE[0] <= t <= SCALE[1])),
    "top_p": number(1e-6, 1),
    "top_k": whole(0, POSITIONS),
    "min_p": number(0, 1),
    "repetition_penalty": number(*SCALE, 1.0),
})  # fmt: skip
