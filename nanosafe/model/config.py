"""ModelConfig: the fields of an official config.json that decide what the decoder computes.

Every family here is the same pre-norm decoder; the differences are a handful of fields (biases, QK norm, RoPE
scaling, Granite's multipliers). A field that would change the result and is not supported is an error that names it:
a config that loads is a config that is computed exactly. Also here: short names for hub repositories, and the default
recipes of the two training scripts.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nanosafe.io.fields import CONFIG, DENSE, GENERATION, HYBRID, ROPE, check, read_json, wrong

# alias -> hub repository, pinned to the commit that was checked where one is known
ALIASES = {
    "qwen3-0.6b": "Qwen/Qwen3-0.6B@c1899de289a04d12100db370d81485cdf75e47ca",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B@70d244cc86ccca08cf5af4e1e306ecf908b1ad5e",
    "qwen3-4b": "Qwen/Qwen3-4B@1cfa9a7208912126459214e8b04321603b3df60c",
    "qwen3-8b": "Qwen/Qwen3-8B@b968826d9c46dd6066d109eabc6255188de91218",
    "qwen3-14b": "Qwen/Qwen3-14B@40c069824f4251a91eefaf281ebe4c544efd3e18",
    "qwen3-32b": "Qwen/Qwen3-32B@9216db5781bf21249d130ec9da846c4624c16137",
    "r1-qwen-1.5b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B@ad9f0ae0864d7fbcd1cd905e3c6c5b069cc8b562",
    "r1-qwen-7b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B@916b56a44061fd5cd7d6a8fb632557ed4f724f60",
    "r1-llama-8b": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B@6a6f4aa4197940add57724a7707d069478df56b1",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct@0e9e39f249a16976918f6564b8830bc894c89659",
    "llama-guard-3": "meta-llama/Llama-Guard-3-8B@7327bd9f6efbbe6101dc6cc4736302b3cbb6e425",
    "skywork-v2-llama-8b": "Skywork/Skywork-Reward-V2-Llama-3.1-8B",
    "skywork-v2-qwen3-0.6b": "Skywork/Skywork-Reward-V2-Qwen3-0.6B",
    "skywork-v2-qwen3-1.7b": "Skywork/Skywork-Reward-V2-Qwen3-1.7B",
    "skywork-v2-qwen3-4b": "Skywork/Skywork-Reward-V2-Qwen3-4B",
    "skywork-v2-qwen3-8b": "Skywork/Skywork-Reward-V2-Qwen3-8B",
    "granite-guardian": "ibm-granite/granite-guardian-3.1-8b",
    "granite-4.0-tiny": "ibm-granite/granite-4.0-tiny-preview@9bbe26b647d49e1cc50612f30e8ab2b0920631f2",
    "granite-4.0-h-tiny": "ibm-granite/granite-4.0-h-tiny",
}

# What each alias's config.json says of its shape: enough for --plan and --random-weights to build the model without a
# download. Values of the official files or, for want of those, of model cards and memory: Skywork's (the shape of what
# each was trained from), Llama-Guard's, the Granites', and Llama-3.3-70B's (no alias: what is too big).
_LLAMA31 = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=4096, intermediate_size=14336,
    num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
    max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=False,
    rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                      original_max_position_embeddings=8192),
    bos_token_id=128000, eos_token_id=[128001, 128008, 128009],
)  # fmt: skip
_SCORE = dict(id2label={"0": "LABEL_0"})


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, tied: bool) -> dict:
    return dict(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=8, head_dim=128, vocab_size=151936,
        max_position_embeddings=40960, rms_norm_eps=1e-6, rope_theta=1000000, tie_word_embeddings=tied,
        bos_token_id=151643, eos_token_id=151645,
    )  # fmt: skip


def _r1_qwen(hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int) -> dict:
    return dict(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=28, num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocabulary,
        max_position_embeddings=131072, rms_norm_eps=1e-6, rope_theta=10000, tie_word_embeddings=False,
        bos_token_id=151643, eos_token_id=151643,
    )  # fmt: skip


def _granite4(experts: int, vocabulary: int, special: dict) -> dict:
    return dict(
        architectures=["GraniteMoeHybridForCausalLM"], model_type="granitemoehybrid", hidden_size=1536,
        intermediate_size=512, shared_intermediate_size=1024, num_hidden_layers=40, num_attention_heads=12,
        num_key_value_heads=4, vocab_size=vocabulary, max_position_embeddings=131072, rms_norm_eps=1e-5,
        rope_theta=10000, position_embedding_type="nope", tie_word_embeddings=True, embedding_multiplier=12,
        attention_multiplier=0.0078125, residual_multiplier=0.22, logits_scaling=6, num_local_experts=experts,
        num_experts_per_tok=6, layer_types=["attention" if i % 10 == 5 else "mamba" for i in range(40)],
        mamba_n_heads=48, mamba_d_head=64, mamba_d_state=128, mamba_n_groups=1, mamba_d_conv=4, mamba_expand=2,
        mamba_chunk_size=256, mamba_conv_bias=True, mamba_proj_bias=False, **special,
    )  # fmt: skip


SHAPES = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, False),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, False),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, False),
    "r1-qwen-1.5b": _r1_qwen(1536, 8960, 12, 2, 151936),
    "r1-qwen-7b": _r1_qwen(3584, 18944, 28, 4, 152064),
    "r1-llama-8b": _LLAMA31 | dict(eos_token_id=128001),
    "llama-3.1-8b": _LLAMA31,
    "llama-guard-3": _LLAMA31,
    "llama-3.3-70b": _LLAMA31 | dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                                     num_attention_heads=64),
    "skywork-v2-llama-8b": _LLAMA31 | _SCORE | dict(architectures=["LlamaForSequenceClassification"]),
    "granite-guardian": dict(
        architectures=["GraniteForCausalLM"], model_type="granite", hidden_size=4096, intermediate_size=12800,
        num_hidden_layers=40, num_attention_heads=32, num_key_value_heads=8, vocab_size=49155,
        max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=10000000.0, tie_word_embeddings=True,
        embedding_multiplier=12.0, attention_multiplier=0.0078125, residual_multiplier=0.22, logits_scaling=16.0,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    ),
    "granite-4.0-tiny": _granite4(62, 49160, dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)),
    "granite-4.0-h-tiny": _granite4(64, 100352, dict(bos_token_id=100257, eos_token_id=100257, pad_token_id=100256)),
}  # fmt: skip
SHAPES |= {f"skywork-v2-{name}": SHAPES[name] | _SCORE | dict(architectures=["Qwen3ForSequenceClassification"])
           for name in ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b")}  # fmt: skip

# Defaults of the training scripts. RL: OpenRLHF's REINFORCE++ script where the paper is silent (its learning rate, KL
# coefficient, batch and lengths could not be recovered); 500 steps are the paper's "500 episodes", read as rollouts
# with their updates. SFT: STAR-1's own recipe, 39 steps on its 1,000 rows.
RECIPES = {
    "rl": dict(
        reward_model="skywork-v2-llama-8b", prompts="UCSC-VLAA/STAR-1", steps=500, prompts_per_step=128,
        samples_per_prompt=1, minibatches=4, epochs=1, lr=5e-7, kl_coef=0.01, kl_kind="k1", max_prompt_tokens=1024,
        max_response_tokens=4096, tokens_per_microbatch=16384,
    ),
    "sft": dict(
        data="UCSC-VLAA/STAR-1", epochs=5, batch_size=128, lr=1e-5, max_tokens=8192, tokens_per_microbatch=16384,
    ),
}  # fmt: skip
# What the tiny world changes in them. Its models are 10,000 times smaller and so take larger steps. Learning rate and
# epochs of SFT, learning rate and KL coefficient of RL were chosen among twenty settings each, tried on the validation
# split (docs/tuning.md).
TINY_RECIPES = {
    "rl": dict(
        reward_model="tiny-reward", prompts="tiny-star", pairs="tiny-pairs", eval_every=10, steps=40,
        prompts_per_step=64, minibatches=2, lr=1e-4, kl_coef=0.3, max_prompt_tokens=128,
        max_response_tokens=128, tokens_per_microbatch=4096, save_every=10, keep=4,
    ),
    "sft": dict(data="tiny-star", epochs=7, batch_size=64, lr=1e-4, max_tokens=256, tokens_per_microbatch=4096),
}  # fmt: skip


def recipe(script: str, model: str) -> dict:
    """The defaults of `script` (rl, sft) for `model`: if it lives in the tiny world, that world's, of its seed."""
    seed = tiny_seed(model)
    if seed is None:
        return RECIPES[script]
    ours = {name: f"{value}@{seed}" if str(value).startswith("tiny-") else value
            for name, value in TINY_RECIPES[script].items()}  # fmt: skip
    return RECIPES[script] | ours


def tiny_seed(model: str) -> int | None:
    """The seed that a model of the tiny world grew from, by its name or by the config.json of a folder; else None."""
    if match := re.fullmatch(r"tiny(?:-llama|-granite)?(?:@(\d+))?", model):
        return int(match[1] or 0)
    path, name = Path(model).expanduser() / "config.json", "nanosafe_seed"
    return check(read_json(path), {name: CONFIG[name]}, path)[name] if path.is_file() else None


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


def read_own(path: Path, fields: Mapping[str, type], cure: str) -> dict:
    """The object, with `fields`, of a file that an earlier run wrote.

    Raises ValueError naming the file, what is wrong and `cure`.
    """
    try:
        value = json.loads(path.read_bytes())
        problem = misfit(value, fields)
    except FileNotFoundError:
        problem = "it is missing"
    except (ValueError, RecursionError) as error:
        problem = f"not valid JSON: {error}"
    if problem:
        raise ValueError(f"{path} is damaged ({problem}): {cure}")
    return value


def misfit(value: object, fields: Mapping[str, type]) -> str | None:
    """What keeps `value` from being an object with these fields; None where nothing does."""
    if not isinstance(value, dict):
        return f"an object was written, found {type(value).__name__}"
    wrong = [name for name, kind in fields.items() if type(value.get(name)) is not kind]
    return f"field {wrong[0]!r} is missing or no {fields[wrong[0]].__name__}" if wrong else None


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
