"""What may stand in a model folder: a table of fields for each JSON file.

A folder may come from anyone. A field that cannot be computed as it stands is an error that names
file and field. Null is as good as absent, and what is in no table changes nothing that is computed.
"""

import math
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

REQUIRED = object()


class Field(NamedTuple):
    meaning: str  # what the value must be
    good: Callable[[Any], bool]
    default: Any = None
    convert: Callable[[Any], Any] = lambda value: value


def number(low: float, high: float, default: Any = None) -> Field:
    meaning = f"a number from {low:g} to {high:g}"
    return Field(meaning, lambda v: type(v) in (int, float) and low <= v <= high, default)


def whole(low: int, high: int, default: Any = None) -> Field:
    within, meaning = number(low, high).good, f"a whole number from {low} to {high}"
    return Field(meaning, lambda value: within(value) and value == int(value), default, int)


def flag(default: bool) -> Field:
    return Field("true or false", lambda value: isinstance(value, bool), default)


def one_of(*names: str, default: str | None = None) -> Field:
    meaning = " or ".join(names)
    return Field(meaning, lambda value: isinstance(value, str) and value in names, default)


def absent(why: str) -> Field:
    return Field(f"absent: {why}", lambda value: not value)


def _is_token(value: Any) -> bool:
    if not isinstance(value, dict):
        return isinstance(value, str)
    flags = [value[name] for name in TOKEN_FLAGS if name in value]
    return isinstance(value.get("content"), str) and all(isinstance(flag, bool) for flag in flags)


def _is_tokens(value: Any) -> bool:
    entries = value.values() if isinstance(value, dict) else value
    return isinstance(value, list | dict) and all(map(_is_token, entries))


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _templates(value: Any) -> list[tuple]:
    """(name, template) of each in the three forms that the files have; other forms yield None."""
    if isinstance(value, list):
        return [(entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None,)
                for entry in value]
    return list(value.items()) if isinstance(value, dict) else [("default", value)]


def _table(*rows: tuple[Field, str]) -> dict[str, Field]:
    """{name: field} of rows that name several fields of a kind."""
    return {name: field for field, names in rows for name in names.split()}


TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
TOKEN = Field("a text, or an object with 'content' and flags that are true or false", _is_token)
TOKENS = Field("a list or an object of tokens", _is_tokens, ())
TEMPLATE = Field("a template, or templates by name",
                 lambda value: all(isinstance(one, str) for one in chain(*_templates(value))),
                 None, lambda value: dict(_templates(value)).get("default"))  # fmt: skip
OBJECT = Field("an object", lambda value: isinstance(value, dict), {})
EOS = Field("a token id or a list of token ids",
            lambda value: all(type(i) is int and 0 <= i < 2**31 for i in _listed(value)),
            frozenset(), lambda value: frozenset(_listed(value)))  # fmt: skip
LAYER_TYPES = Field("a list with the kind of each layer", lambda value: isinstance(value, list)
                    and all(isinstance(kind, str) for kind in value))  # fmt: skip
# Beyond these bounds no model is, and every product of theirs is a size that torch can count.
WIDTH, COUNT, POSITIONS = 1 << 22, 1 << 12, 1 << 31
SCALE = (1e-6, 1e6)
FOREIGN = absent("it is not part of this family")

CONFIG = _table(
    (whole(1, 1 << 24, REQUIRED), "vocab_size"),
    (whole(1, WIDTH, REQUIRED), "hidden_size"),
    (whole(0, WIDTH, 0), "intermediate_size"),
    (whole(1, COUNT, REQUIRED), "num_hidden_layers num_attention_heads"),
    (whole(1, COUNT), "num_key_value_heads head_dim num_labels"),
    (whole(1, POSITIONS, REQUIRED), "max_position_embeddings"),
    (whole(1, POSITIONS), "original_max_position_embeddings"),
    (whole(0, POSITIONS), "sliding_window"),
    (whole(0, COUNT, 28), "max_window_layers"),
    (whole(-1, POSITIONS), "pad_token_id"),
    (whole(0, 1 << 63), "nanosafe_seed"),
    (number(1e-15, 1, REQUIRED), "rms_norm_eps"),
    (number(*SCALE, 1.0), "embedding_multiplier attention_multiplier residual_multiplier"),
    (number(*SCALE, 1.0), "logits_scaling"),
    (number(1, 1), "partial_rotary_factor"),
    (flag(False), "attention_bias mlp_bias tie_word_embeddings use_sliding_window"),
    (Field("true: attention is causal", lambda value: value is True), "is_causal"),
    (one_of("silu", "swish", default="silu"), "hidden_act"),
    (Field("a text", lambda value: isinstance(value, str)), "nanosafe_world"),
    (EOS, "eos_token_id"),
    (LAYER_TYPES, "layer_types"),
    (OBJECT, "rope_scaling rope_parameters id2label"),
    (absent("it names code of the checkpoint, and remote code is never run"), "auto_map"),
    (absent("quantised weights are not read, so use the original bf16 checkpoint"),
     "quantization_config compression_config"),
    (FOREIGN, "num_experts use_mrope per_layer_config attn_logit_softcapping"),
    (FOREIGN, "final_logit_softcapping"),
)  # fmt: skip
DENSE = _table((FOREIGN, "num_local_experts"))
HYBRID = _table(  # GraniteMoeHybrid's own, with transformers' defaults
    (LAYER_TYPES, "layers_block_type"),
    (one_of("nope", "rope", default="nope"), "position_embedding_type"),
    (whole(0, COUNT, 8), "num_local_experts"),
    (whole(0, COUNT, 2), "num_experts_per_tok"),
    (whole(1, WIDTH, 1024), "shared_intermediate_size"),
    (number(0, 1e6, 0.001), "router_aux_loss_coef"),
    (whole(1, COUNT, 128), "mamba_n_heads"),
    (whole(1, COUNT, 1), "mamba_n_groups"),
    (whole(1, COUNT, 256), "mamba_d_state mamba_chunk_size"),
    (whole(1, COUNT, 4), "mamba_d_conv"),
    (whole(1, COUNT, 2), "mamba_expand"),
    (Field("auto or a whole number", lambda d: type(d) is int or d == "auto"), "mamba_d_head"),
    (flag(True), "mamba_conv_bias"),
    (flag(False), "mamba_proj_bias output_router_logits"),
    # Infinity is Python's spelling; transformers 5 writes the object.
    (Field("[0, Infinity]: time steps are not clamped",
           lambda limits: limits in ([0, math.inf], [0, {"__float__": "Infinity"}])),
     "time_step_limit"),
)  # fmt: skip
ROPE = _table(  # of rope_scaling and rope_parameters; another key is an error
    (one_of("default", "linear", "llama3", "yarn"), "rope_type type"),
    (number(2, 1e15, REQUIRED), "rope_theta"),
    (whole(1, POSITIONS), "original_max_position_embeddings"),
    (number(*SCALE), "factor low_freq_factor high_freq_factor attention_factor"),
    (number(*SCALE, 1.0), "attn_factor beta_slow"),
    (number(*SCALE, 32.0), "beta_fast"),
    (number(0, 1e6), "mscale mscale_all_dim"),
    (number(1, 1), "partial_rotary_factor"),
    (flag(True), "truncate"),
)
GENERATION = _table(
    (EOS, "eos_token_id"),
    (flag(True), "do_sample"),
    (Field("0 or a number from 1e-6 to 1e6",
           lambda value: number(0, 1e6).good(value) and not 0 < value < 1e-6), "temperature"),
    (number(1e-6, 1), "top_p"),
    (whole(0, POSITIONS), "top_k"),
    (number(0, 1), "min_p"),
    (number(*SCALE, 1.0), "repetition_penalty"),
)  # fmt: skip
STANDARD_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
                   "mask_token")  # fmt: skip
TOKENIZER = _table(
    (TOKEN, " ".join(STANDARD_TOKENS)),
    (TOKENS, "extra_special_tokens additional_special_tokens"),
    (OBJECT, "added_tokens_decoder"),
    (TEMPLATE, "chat_template"),
    (flag(False), "split_special_tokens"),
)


def check(raw: dict, table: dict[str, Field], where: str | Path) -> dict[str, Any]:
    """The fields of `table` as `raw` has them, or else their defaults.

    Raises ValueError with `where`, the file, and the first field that is wrong.
    """
    values = {}
    for name, field in table.items():
        value = raw.get(name)
        if value is None and field.default is REQUIRED:
            raise ValueError(f"{where}: field {name!r} is missing, it must be {field.meaning}")
        if value is not None and not field.good(value):
            raise wrong(where, name, value, field.meaning)
        values[name] = field.default if value is None else field.convert(value)
    return values


def wrong(where: str | Path, name: str, value: Any, meaning: str) -> ValueError:
    found = f"field {name!r} = {value!r:.200} is not supported"
    return ValueError(f"{where}: {found}, it must be {meaning}")


