"""ModelConfig: the fields of an official config.json that decide what the decoder computes.

Every family here is the same pre-norm decoder; the differences are a handful of fields (biases, QK norm, RoPE
scaling, Granite's multipliers). A field that would change the result and is not supported is an error that names it:
a config that loads is a config that is computed exactly. Also here: short names for hub repositories, and the default
recipes of the two training scripts.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

from nanosafe.io.fields import CONFIG, DENSE, GENERATION, HYBRID, ROPE, check, wrong
from nanosafe.io.files import read_json

ARCHITECTURES = {  # config.json "architectures" -> (model_type, has a score head)
    f"{family}For{head}": (family.lower(), head != "CausalLM")
    for family in ("Qwen2", "Qwen3", "Llama", "Granite")
    for head in ("CausalLM", "SequenceClassification")
}
del ARCHITECTURES["GraniteForSequenceClassification"]  # no such class exists
ARCHITECTURES["GraniteMoeHybridForCausalLM"] = ("granitemoehybrid", False)


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
class Hybrid:
    """What GraniteMoeHybrid has beside the rest: layers of Mamba-2, and a mixture of experts."""

    layer_types: tuple[str, ...]  # "mamba" or "attention"
    mamba_heads: int
    mamba_head_dim: int
    state_size: int
    groups: int  # of heads that share B and C
    conv_size: int
    chunk_size: int  # of the scan: speed and memory, not the result
    conv_bias: bool
    proj_bias: bool
    experts: int  # 0: every layer has the shared MLP alone
    experts_per_token: int
    shared_intermediate_size: int
    balance_coef: float  # of the load-balancing loss; 0 where the config leaves it out of the loss

    @property
    def channels(self) -> int:
        """Of the convolution: x, B and C."""
        return self.mamba_heads * self.mamba_head_dim + 2 * self.groups * self.state_size


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
    hybrid: Hybrid | None = None  # Granite 4
    source: str = field(repr=False, hash=False, compare=False, default="config.json")  # its path

    @property
    def attention_layers(self) -> int:
        return self.hybrid.layer_types.count("attention") if self.hybrid else self.num_hidden_layers

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Read `folder`/config.json and, where there is one, generation_config.json.

        Raises FileNotFoundError, or ValueError naming the file and the field that cannot be computed exactly.
        """
        path, generation = Path(folder) / "config.json", Path(folder) / "generation_config.json"
        raw = read_json(path)
        found = read_json(generation) if os.path.lexists(generation) else None
        return cls.from_dict(raw, found, source=str(path))

    @classmethod
    def from_dict(cls, raw: dict, generation: dict | None = None, source: str = "config.json") -> "ModelConfig":
        """The model that config.json's object describes; `source`, its path, is for errors."""
        names = raw.get("architectures")
        architecture = names[0] if isinstance(names, list) and names else None
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise wrong(source, "architectures", names, f"a list that begins with one of {known}")
        family, has_score = ARCHITECTURES[architecture]
        if raw.get("model_type", family) != family:
            meaning = f"{family}, as the architecture is {architecture}"
            raise wrong(source, "model_type", raw["model_type"], meaning)
        hybrid, granite = family == "granitemoehybrid", family.startswith("granite")
        fields = check(raw, CONFIG | (HYBRID if hybrid else DENSE), source)
        beside = Path(source).with_name("generation_config.json")
        theirs = check(generation or {}, GENERATION, beside)
        more = _read_hybrid(fields, source) if hybrid else None
        if not hybrid:
            _refuse_windows(raw, fields, source)
        intermediate = fields["intermediate_size"]
        if not intermediate and more and not more.experts:  # then the shared MLP is the only one
            intermediate = more.shared_intermediate_size
        if not intermediate:
            raise wrong(source, "intermediate_size", raw.get("intermediate_size"), "at least 1")
        heads, bias = fields["num_attention_heads"], fields["attention_bias"]
        kv_heads = fields["num_key_value_heads"]
        if kv_heads is None:  # as in transformers, where Qwen's default is 32 for an absent field
            absent = "num_key_value_heads" not in raw
            kv_heads = 32 if absent and family.startswith("qwen") else heads
        if heads % kv_heads:
            raise wrong(source, "num_key_value_heads", kv_heads, f"a divisor of the {heads} heads")
        # transformers' own defaults for an absent head_dim: 128 in Qwen3, the quotient in the older families
        quotient = fields["hidden_size"] // heads
        head_dim = fields["head_dim"] or (128 if family == "qwen3" else quotient)
        rotates = not hybrid or fields["position_embedding_type"] == "rope"
        rope = _read_rope(raw, fields, source) if rotates else None
        if not head_dim or rope and head_dim % 2:
            raise wrong(source, "head_dim", head_dim, "an even number of at least 2")
        same = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings",
                "rms_norm_eps", "tie_word_embeddings", "pad_token_id")  # fmt: skip
        scales = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
        return cls(
            model_type=family,
            **{name: fields[name] for name in same},
            **{name: fields[name] if granite else 1.0 for name in scales},
            intermediate_size=intermediate,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rope=rope,
            qkv_bias=bias or family == "qwen2",
            o_bias=bias and family != "qwen2",
            mlp_bias=fields["mlp_bias"] and family in ("llama", "granite"),
            hybrid=more,
            qk_norm=family == "qwen3",
            num_labels=_count_labels(fields, source) if has_score else 0,
            attention_multiplier=fields["attention_multiplier"] if granite else head_dim**-0.5,
            eos_ids=tuple(sorted(fields["eos_token_id"] | theirs["eos_token_id"])),
            raw=raw,
            generation=generation,
            source=source,
        )


def _count_labels(fields: dict, source: str) -> int:
    labels = fields["num_labels"] or len(fields["id2label"]) or 2  # 2 is transformers' default
    if labels != 1:
        raise ValueError(f"{source}: a reward model has one label, field 'id2label'/'num_labels' gives {labels}")
    return labels


def _read_hybrid(fields: dict, source: str) -> Hybrid:
    """GraniteMoeHybrid's own; the fields of Mamba must fit together where a layer is Mamba."""
    layers, heads = fields["num_hidden_layers"], fields["mamba_n_heads"]
    groups, inner = fields["mamba_n_groups"], fields["mamba_expand"] * fields["hidden_size"]
    names = {"mamba": "mamba", "linear_attention": "mamba", "attention": "attention",
             "full_attention": "attention"}  # fmt: skip
    kinds = fields["layer_types"] or fields["layers_block_type"] or ["mamba"] * layers
    if len(kinds) != layers or not set(kinds) <= names.keys():
        raise wrong(source, "layer_types", kinds, f"{layers} of {', '.join(names)}")
    layer_types = tuple(names[kind] for kind in kinds)
    if "mamba" in layer_types:
        if fields["mamba_d_head"] not in (None, "auto", inner // heads) or inner % heads:
            meaning = f"mamba_expand * hidden_size = {inner} by mamba_n_heads = {heads}"
            raise wrong(source, "mamba_d_head", fields["mamba_d_head"], meaning)
        if heads % groups:
            raise wrong(source, "mamba_n_groups", groups, f"a divisor of the {heads} heads")
    experts, chosen = fields["num_local_experts"], fields["num_experts_per_tok"]
    if experts and not 1 <= chosen <= experts:
        raise wrong(source, "num_experts_per_tok", chosen, f"from 1 to the {experts} experts")
    balanced = experts and fields["output_router_logits"]
    return Hybrid(
        layer_types=layer_types, mamba_heads=heads, mamba_head_dim=inner // heads, groups=groups,
        state_size=fields["mamba_d_state"], conv_size=fields["mamba_d_conv"],
        chunk_size=fields["mamba_chunk_size"], conv_bias=fields["mamba_conv_bias"],
        proj_bias=fields["mamba_proj_bias"], experts=experts,
        experts_per_token=chosen if experts else 0,
        shared_intermediate_size=fields["shared_intermediate_size"],
        balance_coef=fields["router_aux_loss_coef"] if balanced else 0.0,
    )  # fmt: skip


def _refuse_windows(raw: dict, fields: dict, source: str) -> None:
    """Every layer must attend to the whole context, as one does whose window is as long as that.

    As Qwen reads these fields, there is no window where the file has null for it, but one where it
    has nothing; it is on the layers from max_window_layers on.
    """
    window = fields["sliding_window"]
    slides = fields["use_sliding_window"] and raw.get("sliding_window", "not given") is not None
    whole = slides and window is not None and window >= fields["max_position_embeddings"]
    kinds, layers = fields["layer_types"], fields["num_hidden_layers"]
    if slides and not whole and not kinds and fields["max_window_layers"] < layers:
        meaning = "false: every layer must attend to the whole context"
        raise wrong(source, "use_sliding_window", True, meaning)
    known = {"full_attention", "attention", "sliding_attention" if whole else "full_attention"}
    if kinds and (len(kinds) != layers or not set(kinds) <= known):
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
    needed = {"default": (), "linear": ("factor",), "yarn": ("factor",),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor")}[kind]  # fmt: skip
    for key in needed:
        if values[key] is None:
            raise ValueError(f"{where}: field {key!r} is missing: {kind} needs it")
    if kind == "default":
        return Rope(kind, values["rope_theta"])
    if kind == "llama3" and values["low_freq_factor"] >= values["high_freq_factor"]:
        raise wrong(where, "low_freq_factor", values["low_freq_factor"], "below high_freq_factor")
    name = "original_max_position_embeddings"
    original = fields[name] or values[name] or fields["max_position_embeddings"]
    own = Rope.__annotations__.keys() - {"type"}
    read = {key: value for key, value in values.items() if key in own and value is not None}
    return Rope(kind, values["rope_theta"], original_max_positions=original, **read)
