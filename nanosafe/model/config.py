"""ModelConfig: the fields of an official config.json that decide what the decoder computes.

Every family here is the same pre-norm decoder; the differences are a handful of fields (biases, QK norm, RoPE
scaling, Granite's multipliers). A field that would change the result and is not supported is an error that names it:
a config that loads is a config that is computed exactly.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

from nanosafe.io.fields import CONFIG, DENSE, GENERATION, HYBRID, ROPE, check, wrong
from nanosafe.io.files import read_json
from nanosafe.model.hybrid import Hybrid, read_hybrid

ARCHITECTURES = {  # config.json's "architectures" -> (model_type, has a score head)
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen2ForSequenceClassification": ("qwen2", True),
    "Qwen3ForCausalLM": ("qwen3", False),
    "Qwen3ForSequenceClassification": ("qwen3", True),
    "LlamaForCausalLM": ("llama", False),
    "LlamaForSequenceClassification": ("llama", True),
    "GraniteForCausalLM": ("granite", False),
    "GraniteMoeHybridForCausalLM": ("granitemoehybrid", False),
}
ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: `type` is default, linear, llama3 or yarn; the rest is what that type reads."""

    type: str
    theta: float
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None  # None: derived from factor and the two mscales
    attn_factor: float = 1.0  # multiplied in as well: YaRN's own name for a correction
    mscale: float | None = None
    mscale_all_dim: float | None = None


@dataclass(frozen=True)
class ModelConfig:
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope | None  # None: no positions
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    num_labels: int  # 0: language model; 1: a score head in its place
    attention_multiplier: float  # softmax(q k^T * attention_multiplier); 1/sqrt(head_dim) but for Granite
    embedding_multiplier: float
    residual_multiplier: float
    logits_scaling: float  # logits are divided by it
    pad_token_id: int | None
    eos_ids: tuple[int, ...]  # of config.json, generation_config.json and, by load_model, the tokenizer
    raw: dict = field(repr=False, hash=False, compare=False)  # config.json as read, written back by save_model
    generation: dict | None = field(repr=False, hash=False, compare=False, default=None)  # generation_config.json
    hybrid: Hybrid | None = None  # Granite 4: see hybrid.py
    lora: tuple[int, float] | None = None  # rank and alpha of adapters (lora.py); of no file
    source: str = field(repr=False, hash=False, compare=False, default="config.json")  # its path

    @property
    def attention_layers(self) -> int:
        return self.hybrid.layer_types.count("attention") if self.hybrid else self.num_hidden_layers

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Read `folder`/config.json and, where there is one, generation_config.json.

        Raises FileNotFoundError, or ValueError naming the file and the field that cannot be computed exactly.
        """
        path = Path(folder) / "config.json"
        generation_path = path.with_name("generation_config.json")
        raw = read_json(path)
        generation = read_json(generation_path) if os.path.lexists(generation_path) else None
        return cls.from_dict(raw, generation, source=str(path))

    @classmethod
    def from_dict(cls, raw: dict, generation: dict | None = None, source: str = "config.json") -> "ModelConfig":
        """The model that config.json's object describes; `source`, its path, is for errors.

        Where a field is absent, its default is the one that transformers has for the family.
        """
        names = raw.get("architectures")
        architecture = names[0] if isinstance(names, list) and names else None
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise wrong(source, "architectures", names, f"a list that begins with one of {known}")
        family, has_score = ARCHITECTURES[architecture]
        if raw.get("model_type", family) != family:
            meaning = f"{family}, as the architecture is {architecture}"
            raise wrong(source, "model_type", raw["model_type"], meaning)
        is_hybrid, is_granite = family == "granitemoehybrid", family.startswith("granite")
        fields = check(raw, CONFIG | (HYBRID if is_hybrid else DENSE), source)
        generation_source = Path(source).with_name("generation_config.json")
        sampling = check(generation or {}, GENERATION, generation_source)
        hybrid = None
        if is_hybrid:
            hybrid = read_hybrid(fields, source)
        else:
            _refuse_windows(raw, fields, source)
        intermediate = fields["intermediate_size"]
        if not intermediate and hybrid and not hybrid.experts:  # then the shared MLP is the only one
            intermediate = hybrid.shared_intermediate_size
        if not intermediate:
            raise wrong(source, "intermediate_size", raw.get("intermediate_size"), "at least 1")
        heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
        if kv_heads is None:
            absent = "num_key_value_heads" not in raw
            kv_heads = 32 if absent and family in ("qwen2", "qwen3") else heads
        if heads % kv_heads:
            raise wrong(source, "num_key_value_heads", kv_heads, f"a divisor of the {heads} heads")
        head_dim = fields["head_dim"] or (128 if family == "qwen3" else fields["hidden_size"] // heads)
        rope = None
        if not is_hybrid or fields["position_embedding_type"] == "rope":
            rope = _read_rope(raw, fields, source)
        if not head_dim or rope and head_dim % 2:
            raise wrong(source, "head_dim", head_dim, "an even number of at least 2")
        return cls(
            model_type=family,
            vocab_size=fields["vocab_size"],
            hidden_size=fields["hidden_size"],
            intermediate_size=intermediate,
            num_hidden_layers=fields["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=fields["max_position_embeddings"],
            rms_norm_eps=fields["rms_norm_eps"],
            rope=rope,
            qkv_bias=fields["attention_bias"] or family == "qwen2",
            o_bias=fields["attention_bias"] and family != "qwen2",
            mlp_bias=fields["mlp_bias"] and family in ("llama", "granite"),
            qk_norm=family == "qwen3",
            tie_word_embeddings=fields["tie_word_embeddings"],
            num_labels=_count_labels(fields, source) if has_score else 0,
            attention_multiplier=fields["attention_multiplier"] if is_granite else head_dim**-0.5,
            embedding_multiplier=fields["embedding_multiplier"] if is_granite else 1.0,
            residual_multiplier=fields["residual_multiplier"] if is_granite else 1.0,
            logits_scaling=fields["logits_scaling"] if is_granite else 1.0,
            pad_token_id=fields["pad_token_id"],
            eos_ids=tuple(sorted(fields["eos_token_id"] | sampling["eos_token_id"])),
            raw=raw,
            generation=generation,
            hybrid=hybrid,
            source=source,
        )


def _count_labels(fields: dict, source: str) -> int:
    labels = fields["num_labels"] or len(fields["id2label"]) or 2  # 2 is transformers' default
    if labels != 1:
        raise ValueError(f"{source}: a reward model has one label, field 'id2label'/'num_labels' gives {labels}")
    return labels


def _refuse_windows(raw: dict, fields: dict, source: str) -> None:
    """Raise ValueError unless every layer attends to the whole context. A window as long as the context is none."""
    kinds, layers = fields["layer_types"], fields["num_hidden_layers"]
    window = fields["sliding_window"]
    # In transformers' Qwen classes an absent sliding_window means 4,096 positions, and null means no window.
    is_null = "sliding_window" in raw and window is None
    slides = fields["use_sliding_window"] and not is_null
    is_shorter = window is None or window < fields["max_position_embeddings"]
    # Without layer_types the layers from max_window_layers on have the window.
    if slides and is_shorter and not kinds and fields["max_window_layers"] < layers:
        raise wrong(source, "use_sliding_window", True, "false: every layer must attend to the whole context")
    allowed = {"full_attention", "attention"}
    if slides and not is_shorter:
        allowed.add("sliding_attention")
    if kinds and (len(kinds) != layers or not set(kinds) <= allowed):
        raise wrong(source, "layer_types", kinds, f"full_attention, {layers} times")


def _read_rope(raw: dict, fields: dict, source: str) -> Rope:
    """`rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (the official files)."""
    # transformers lets rope_scaling win, and has the same default_theta.
    name = "rope_scaling" if fields["rope_scaling"] else "rope_parameters"
    where = f"{source}: field {name!r}" if fields[name] else source
    given = {"rope_theta": raw.get("rope_theta", 10000.0)} | fields[name]
    for key, value in given.items():
        if key not in ROPE and value is not None:
            raise wrong(where, key, value, f"absent: known are {', '.join(ROPE)}")
    values = check(given, ROPE, where)
    kind = values["rope_type"] or values["type"] or "default"
    for key in ROPE_NEEDS[kind]:
        if values[key] is None:
            raise ValueError(f"{where}: field {key!r} is missing: {kind} needs it")
    if kind == "default":
        return Rope(kind, values["rope_theta"])
    if kind == "llama3" and values["low_freq_factor"] >= values["high_freq_factor"]:
        raise wrong(where, "low_freq_factor", values["low_freq_factor"], "below high_freq_factor")
    name = "original_max_position_embeddings"
    original = fields[name] or values[name] or fields["max_position_embeddings"]
    options = Rope.__annotations__.keys() - {"type", "theta", "original_max_positions"}
    given = {key: value for key, value in values.items() if key in options and value is not None}
    return Rope(kind, values["rope_theta"], original_max_positions=original, **given)
