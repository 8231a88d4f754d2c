"""ModelConfig: the fields of an official config.json that decide what the decoder computes.

Every family here is the same pre-norm decoder; the differences are a handful of fields (biases, QK norm, RoPE
scaling, Granite's multipliers). A field that would change the result and is not supported is an error that names it:
a config that loads is a config that is computed exactly. Also here: short names for hub repositories, and the default
recipes of the two training scripts.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

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
    path = Path(model).expanduser() / "config.json"
    return read_json(path).get("nanosafe_seed") if path.is_file() else None


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
    eos_ids: tuple[int, ...]  # of config.json and generation_config.json together
    raw: dict = field(repr=False, hash=False, compare=False)  # config.json as read, written back by save_model
    generation: dict | None = field(repr=False, hash=False, compare=False, default=None)  # generation_config.json
    hybrid: Hybrid | None = None  # Granite 4

    @property
    def attention_layers(self) -> int:
        return self.hybrid.layer_types.count("attention") if self.hybrid else self.num_hidden_layers

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Read `folder`/config.json and, where there is one, generation_config.json.

        Raises FileNotFoundError, or ValueError naming the file and the field that cannot be computed exactly.
        """
        generation = Path(folder) / "generation_config.json"
        return cls.from_dict(
            read_json(Path(folder) / "config.json"),
            read_json(generation) if generation.exists() else None,
            source=str(Path(folder) / "config.json"),
        )

    @classmethod
    def from_dict(cls, raw: dict, generation: dict | None = None, source: str = "config.json") -> "ModelConfig":
        def need(name, default=None):
            value = default if raw.get(name) is None else raw[name]
            if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
                raise ValueError(f"{source}: field {name!r} must be a positive number, found {value!r}")
            return value

        architecture = (raw.get("architectures") or [None])[0]
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f"{source}: field 'architectures' is {raw.get('architectures')}; supported: {', '.join(ARCHITECTURES)}"
            )
        family, has_score = ARCHITECTURES[architecture]
        if raw.get("model_type", family) != family:
            raise ValueError(
                f"{source}: field 'model_type' is {raw['model_type']!r} but the architecture is {architecture}"
            )
        hybrid = family == "granitemoehybrid"
        _refuse_unsupported(raw, source, hybrid)
        bias, granite = bool(raw.get("attention_bias", False)), family.startswith("granite")
        heads = int(need("num_attention_heads"))
        kv_heads = int(need("num_key_value_heads", heads))
        if heads % kv_heads:
            raise ValueError(f"{source}: field 'num_key_value_heads' = {kv_heads} does not divide the {heads} heads")
        # transformers' own defaults for an absent head_dim: 128 in Qwen3, the quotient in the older families
        head_dim = int(need("head_dim", 128 if family == "qwen3" else need("hidden_size") // heads))
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
        scales = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
        return cls(
            model_type=family,
            **{name: int(need(name)) for name in sizes},
            **{name: need(name, 1.0) if granite else 1.0 for name in scales},
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=need("rms_norm_eps"),
            rope=_read_rope(raw, source) if not hybrid or raw.get("position_embedding_type") == "rope" else None,
            qkv_bias=bias or family == "qwen2",
            o_bias=bias and family != "qwen2",
            mlp_bias=bool(raw.get("mlp_bias", False)) and family in ("llama", "granite"),
            hybrid=_read_hybrid(raw, source, need) if hybrid else None,
            qk_norm=family == "qwen3",
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            num_labels=_count_labels(raw, source) if has_score else 0,
            attention_multiplier=need("attention_multiplier", 1.0) if granite else head_dim**-0.5,
            pad_token_id=raw.get("pad_token_id"),
            eos_ids=tuple(sorted(eos_ids(raw) | eos_ids(generation or {}))),
            raw=raw,
            generation=generation,
        )


def read_json(path: Path) -> dict:
    """The object in `path`; FileNotFoundError or ValueError name the file and, for broken JSON, the line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: a model folder needs it (official Hugging Face layout)") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch it again or mend it") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


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


def eos_ids(raw: dict) -> set[int]:
    """`eos_token_id` of a config.json or generation_config.json: absent, one id or a list."""
    value = raw.get("eos_token_id")
    return set() if value is None else {value} if isinstance(value, int) else set(value)


def _count_labels(raw: dict, source: str) -> int:
    labels = len(raw["id2label"]) if raw.get("id2label") else raw.get("num_labels", 2)  # 2 is transformers' default
    if labels != 1:
        raise ValueError(f"{source}: a reward model has one label, field 'id2label'/'num_labels' gives {labels}")
    return labels


def _read_hybrid(raw: dict, source: str, need: Callable[..., int | float]) -> Hybrid:
    """GraniteMoeHybrid's own fields, with transformers' defaults for absent ones."""

    def refuse(name, why):
        raise ValueError(f"{source}: field {name!r} = {raw.get(name)!r} is not supported ({why})")

    layers, heads, groups = int(need("num_hidden_layers")), int(need("mamba_n_heads", 128)), need("mamba_n_groups", 1)
    inner = int(need("mamba_expand", 2) * need("hidden_size"))
    if raw.get("mamba_d_head") not in (None, "auto", inner // heads) or inner % heads:
        refuse("mamba_d_head", f"{heads} heads must make up mamba_expand * hidden_size = {inner}")
    if heads % groups:
        refuse("mamba_n_groups", f"it must divide the {heads} heads")
    names = {"mamba": "mamba", "linear_attention": "mamba", "attention": "attention", "full_attention": "attention"}
    kinds = raw.get("layer_types") or ["mamba"] * layers
    if len(kinds) != layers or not set(kinds) <= names.keys():
        refuse("layer_types", f"{layers} of {', '.join(names)}")
    if raw.get("position_embedding_type") not in (None, "nope", "rope"):
        refuse("position_embedding_type", "nope or rope")
    limits = raw.get("time_step_limit") or (0.0, math.inf)
    if limits[0] != 0 or limits[1] not in (math.inf, {"__float__": "Infinity"}):  # as transformers writes infinity
        refuse("time_step_limit", "time steps are not clamped")
    experts = raw.get("num_local_experts", 8)
    if not isinstance(experts, int) or experts < 0:
        refuse("num_local_experts", "a number, 0 for none")
    chosen = int(need("num_experts_per_tok", 2))
    if experts and chosen > experts:
        refuse("num_experts_per_tok", f"there are {experts} experts")
    return Hybrid(
        layer_types=tuple(names[kind] for kind in kinds), mamba_heads=heads, mamba_head_dim=inner // heads,
        groups=int(groups), state_size=int(need("mamba_d_state", 256)), conv_size=int(need("mamba_d_conv", 4)),
        chunk_size=int(need("mamba_chunk_size", 256)),
        shared_intermediate_size=int(need("shared_intermediate_size", 1024)),
        conv_bias=bool(raw.get("mamba_conv_bias", True)), proj_bias=bool(raw.get("mamba_proj_bias", False)),
        experts=experts, experts_per_token=chosen if experts else 0,
        balance_coef=raw.get("router_aux_loss_coef", 0.001) if experts and raw.get("output_router_logits") else 0.0,
    )  # fmt: skip


def _refuse_unsupported(raw: dict, source: str, hybrid: bool) -> None:
    """Fields that change the forward pass of these families and that the decoder does not compute."""

    def refuse(name, why):
        raise ValueError(f"{source}: field {name!r} = {raw[name]!r} is not supported ({why})")

    if raw.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", "only silu is")
    for name in ("quantization_config", "compression_config"):
        if raw.get(name):
            refuse(name, "quantised weights; use the original bf16 checkpoint")
    if raw.get("auto_map"):
        refuse("auto_map", "it names code to run from the checkpoint; nanosafe never runs remote code")
    # As Qwen reads these fields: the window is 4096 where the file has none, on the layers from max_window_layers on.
    sliding = raw.get("use_sliding_window") and raw.get("sliding_window", 4096) is not None
    if sliding and raw.get("max_window_layers", 28) < raw.get("num_hidden_layers", 0) and not raw.get("layer_types"):
        refuse("use_sliding_window", "every layer must attend to the whole context")
    if not hybrid and any(kind not in ("full_attention", "attention") for kind in raw.get("layer_types") or ()):
        refuse("layer_types", "every layer must be full_attention")
    if not raw.get("is_causal", True):
        refuse("is_causal", "attention is causal")
    for name in ("per_layer_config", "num_local_experts", "num_experts", "use_mrope", "attn_logit_softcapping",
                 "final_logit_softcapping"):  # fmt: skip
        if raw.get(name) and not (hybrid and name == "num_local_experts"):
            refuse(name, "not part of this family")


def _read_rope(raw: dict, source: str) -> Rope:
    """`rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (the official files)."""
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"  # transformers lets rope_scaling win
    given = {"rope_theta": raw.get("rope_theta", 10000.0)} | (raw.get(name) or {})  # transformers' default_theta
    kind = given.get("rope_type", given.get("type", "default"))
    if any(isinstance(value, dict) for value in given.values()):
        raise ValueError(f"{source}: field {name!r} differs between layers, which is not supported")
    partial = given.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ValueError(
            f"{source}: field 'partial_rotary_factor' = {partial} is not supported (only whole heads rotate)"
        )
    required = {"default": (), "linear": ("factor",), "yarn": ("factor",),
                "llama3": ("factor", "low_freq_factor", "high_freq_factor")}  # fmt: skip
    if kind not in required:
        raise ValueError(f"{source}: {name} type {kind!r} is not supported; known: {', '.join(required)}")
    missing = [key for key in ("rope_theta", *required[kind]) if not isinstance(given.get(key), int | float)]
    if missing:
        raise ValueError(f"{source}: field {name!r} of type {kind!r} needs numbers for {', '.join(missing)}")
    if kind == "default":
        return Rope(kind, given["rope_theta"])
    original = raw.get("original_max_position_embeddings", given.get("original_max_position_embeddings"))
    optional = (
        "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate", "attention_factor",
        "mscale", "mscale_all_dim",
    )  # fmt: skip
    return Rope(
        kind, given["rope_theta"], given["factor"], original or raw.get("max_position_embeddings", 0),
        **{key: given[key] for key in optional if given.get(key) is not None},
    )  # fmt: skip
