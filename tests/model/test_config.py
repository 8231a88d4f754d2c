"""Reading config.json: the official files, the form transformers 5 writes, and a refusal for what is not computed."""

import copy
import json
import math
import re

import pytest
from tiny_models import FAMILIES, LLAMA3_ROPE, tiny_config, tiny_raw

from nanosafe.model.config import ModelConfig, Rope
from nanosafe.recipes import ALIASES

LLAMA3 = Rope("llama3", 500000.0, 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
QWEN3_EOS = (151643, 151645)
OFFICIAL = {  # hidden, intermediate, layers, heads, kv heads, tied, vocabulary, positions, eps, rope, qkv bias, eos
    "Qwen3-0.6B": (1024, 3072, 28, 16, 8, True, 151936, 40960, 1e-6, Rope("default", 1e6), False, QWEN3_EOS),
    "Qwen3-1.7B": (2048, 6144, 28, 16, 8, True, 151936, 40960, 1e-6, Rope("default", 1e6), False, QWEN3_EOS),
    "Qwen3-4B": (2560, 9728, 36, 32, 8, True, 151936, 40960, 1e-6, Rope("default", 1e6), False, QWEN3_EOS),
    "Qwen3-8B": (4096, 12288, 36, 32, 8, False, 151936, 40960, 1e-6, Rope("default", 1e6), False, QWEN3_EOS),
    "Qwen3-14B": (5120, 17408, 40, 40, 8, False, 151936, 40960, 1e-6, Rope("default", 1e6), False, QWEN3_EOS),
    "Qwen3-32B": (5120, 25600, 64, 64, 8, False, 151936, 40960, 1e-6, Rope("default", 1e6), False, QWEN3_EOS),
    "DeepSeek-R1-Distill-Qwen-1.5B":
        (1536, 8960, 28, 12, 2, False, 151936, 131072, 1e-6, Rope("default", 1e4), True, (151643,)),
    "DeepSeek-R1-Distill-Qwen-7B":
        (3584, 18944, 28, 28, 4, False, 152064, 131072, 1e-6, Rope("default", 1e4), True, (151643,)),
    "DeepSeek-R1-Distill-Llama-8B": (4096, 14336, 32, 32, 8, False, 128256, 131072, 1e-5, LLAMA3, False, (128001,)),
    "Llama-3.1-8B-Instruct":
        (4096, 14336, 32, 32, 8, False, 128256, 131072, 1e-5, LLAMA3, False, (128001, 128008, 128009)),
}  # fmt: skip


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_configs_read_as_published(name, assets):
    c = ModelConfig.from_folder(assets / "configs" / name)
    found = (c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads,
             c.tie_word_embeddings, c.vocab_size, c.max_position_embeddings, c.rms_norm_eps, c.rope, c.qkv_bias,
             c.eos_ids)  # fmt: skip
    assert found == OFFICIAL[name]
    assert c.head_dim == 128 and c.attention_multiplier == 128**-0.5 and c.num_labels == 0
    assert c.embedding_multiplier == c.residual_multiplier == c.logits_scaling == 1
    assert not c.o_bias and not c.mlp_bias and c.qk_norm == ("Qwen3" in name)
    assert c.model_type == ("qwen3" if "Qwen3" in name else "qwen2" if "Qwen" in name else "llama")


def test_the_tested_families_read_as_written():
    """What test_official_configs shows, without the official files."""
    assert tiny_config("qwen2") == ModelConfig(
        model_type="qwen2", vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256, rms_norm_eps=1e-5,
        rope=Rope("default", 1e4), qkv_bias=True, o_bias=False, mlp_bias=False, qk_norm=False,
        tie_word_embeddings=False, num_labels=0, attention_multiplier=8**-0.5, embedding_multiplier=1.0,
        residual_multiplier=1.0, logits_scaling=1.0, pad_token_id=None, eos_ids=(2,), raw={},
    )  # fmt: skip
    qwen3, llama, granite = (tiny_config(family) for family in ("qwen3", "llama", "granite"))
    assert qwen3.qk_norm and qwen3.head_dim == 16 and not qwen3.qkv_bias and qwen3.rope == Rope("default", 1e6)
    assert llama.rope == Rope("llama3", 500000.0, 8.0, 64) and not llama.qk_norm
    assert granite.attention_multiplier == 0.2 and granite.logits_scaling == 6 and granite.tie_word_embeddings
    assert granite.embedding_multiplier == 3 and granite.residual_multiplier == 0.4


YARN = dict(type="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=16.0, truncate=False)
FORMS = [*((family, {}) for family in FAMILIES), ("llama", dict(rope_scaling=YARN)), ("qwen3", dict(rope_scaling=YARN)),
         ("qwen2", dict(rope_scaling=dict(type="linear", factor=2.0))), ("qwen3", dict(reward=True)),
         ("llama", dict(attention_bias=True, mlp_bias=True, eos_token_id=[2, 5])), ("granite4", {}),
         ("granite4", dict(position_embedding_type="rope", num_local_experts=0)),
         ("granite4", dict(layer_types=None, output_router_logits=True, router_aux_loss_coef=0.3))]  # fmt: skip


def as_transformers_writes_it(raw, folder):
    """Save `raw` to `folder` through transformers 5 and return the JSON it wrote."""
    import transformers

    name = raw["architectures"][0].split("For")[0] + "Config"
    getattr(transformers, name).from_dict(copy.deepcopy(raw)).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(("family", "changes"), FORMS)
def test_the_form_transformers_5_writes_reads_as_the_official_form(family, changes, tmp_path):
    raw = tiny_raw(family, **changes)
    written = as_transformers_writes_it(raw, tmp_path)
    assert "rope_parameters" in written and "rope_theta" not in written and "torch_dtype" not in written
    assert ModelConfig.from_folder(tmp_path) == ModelConfig.from_dict(raw)


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_configs_survive_transformers_5(name, assets, tmp_path):
    raw = json.loads((assets / "configs" / name / "config.json").read_text())
    as_transformers_writes_it(raw, tmp_path)
    assert ModelConfig.from_folder(tmp_path) == ModelConfig.from_dict(raw)


PER_LAYER = {kind: dict(rope_type="default", rope_theta=1e4) for kind in ("full_attention", "sliding_attention")}
REFUSALS = [  # family, changes (None: absent), what the message names
    ("qwen2", dict(use_sliding_window=True, sliding_window=64, max_window_layers=1), "use_sliding_window"),
    ("qwen3", dict(use_sliding_window=True, max_window_layers=0), "use_sliding_window"),  # 4096 by default
    ("qwen3", dict(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
    ("qwen3", dict(is_causal=False), "is_causal"),
    ("qwen3", dict(per_layer_config={"0": {"head_dim": 8}}), "per_layer_config"),
    ("llama", dict(hidden_act="gelu"), "hidden_act"),
    ("llama", dict(quantization_config={"quant_method": "fp8"}), "quantization_config"),
    ("llama", dict(auto_map={"AutoModel": "modeling_evil.Model"}), "auto_map"),
    ("llama", dict(rope_scaling=dict(rope_type="longrope", factor=2.0)), "rope_scaling.*longrope"),
    ("llama", dict(rope_scaling=dict(type="dynamic", factor=2.0)), "rope_scaling.*dynamic"),
    ("llama", dict(rope_scaling=dict(rope_type="yarn")), "rope_scaling.*factor"),
    ("llama", dict(rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1)), "scaling.*high_freq_factor"),
    ("llama", dict(rope_theta="big"), "rope_theta"),
    ("llama", dict(rope_theta=0), "rope_theta"),
    ("llama", dict(rope_scaling=LLAMA3_ROPE | dict(low_freq_factor=4.0)), "low_freq_factor"),
    ("qwen3", dict(rope_scaling=dict(rope_type="yarn", factor=4.0, extrapolation_factor=2.0)), "extrapolation_factor"),
    ("qwen3", dict(rope_scaling=dict(type="default", mrope_section=[2, 1, 1])), "rope_scaling.*mrope_section"),
    ("qwen3", dict(head_dim=15), "head_dim"),
    ("qwen3", dict(vocab_size=math.inf), "vocab_size"),
    ("qwen3", dict(rms_norm_eps=math.nan), "rms_norm_eps"),
    ("qwen3", dict(intermediate_size=48.5), "intermediate_size"),
    ("qwen3", dict(intermediate_size=0), "intermediate_size"),
    ("qwen3", dict(attention_bias="false"), "attention_bias"),
    ("qwen3", dict(layer_types=5), "layer_types"),
    ("qwen3", dict(layer_types=["full_attention"] * 3), "layer_types"),
    ("qwen3", dict(eos_token_id="2"), "eos_token_id"),
    ("qwen3", dict(eos_token_id=[2, None]), "eos_token_id"),
    ("qwen3", dict(use_sliding_window=True, sliding_window=255, max_window_layers=0), "use_sliding_window"),
    ("llama", dict(rope_scaling=None, rope_parameters=PER_LAYER), "rope_parameters"),
    ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    ("llama", dict(rope_scaling=None, rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5)),
     "partial_rotary_factor"),
    ("qwen3", dict(hidden_size=None), "hidden_size"),
    ("qwen3", dict(vocab_size=None), "vocab_size"),
    ("qwen3", dict(rms_norm_eps=None), "rms_norm_eps"),
    ("qwen3", dict(num_attention_heads="4"), "num_attention_heads"),
    ("qwen3", dict(num_key_value_heads=3), "num_key_value_heads"),
    ("qwen3", dict(head_dim=-16), "head_dim"),
    ("granite", dict(logits_scaling=0), "logits_scaling"),
    ("granite", dict(attention_multiplier="1"), "attention_multiplier"),
    ("granite", dict(architectures=["GraniteMoeForCausalLM"]), "architectures.*GraniteMoeForCausalLM"),
    ("granite", dict(num_local_experts=4), "num_local_experts"),
    ("granite4", dict(num_experts=4), "'num_experts'"),
    ("granite4", dict(num_local_experts=-1), "num_local_experts"),
    ("granite4", dict(num_experts_per_tok=7), "num_experts_per_tok"),
    ("granite4", dict(layer_types=["mamba", "full_attention", "sliding_attention", "mamba"]), "layer_types"),
    ("granite4", dict(layer_types=["mamba"] * 3), "layer_types"),
    ("granite4", dict(position_embedding_type="alibi"), "position_embedding_type"),
    ("granite4", dict(time_step_limit=[0.0, 0.1]), "time_step_limit"),
    ("granite4", dict(time_step_limit=[0.001, math.inf]), "time_step_limit"),
    ("granite4", dict(mamba_d_head=7), "mamba_d_head"),
    ("granite4", dict(mamba_n_heads=7), "mamba_d_head"),
    ("granite4", dict(mamba_n_groups=3), "mamba_n_groups"),
    ("granite4", dict(mamba_d_state=0), "mamba_d_state"),
    ("granite4", dict(hidden_act="gelu"), "hidden_act"),
    ("qwen3", dict(architectures=None), "architectures"),
    ("qwen3", dict(architectures=["Qwen3ForTokenClassification"]), "architectures"),
    ("qwen3", dict(model_type="llama"), "model_type.*llama"),
    ("qwen3", dict(reward=True, id2label={"0": "bad", "1": "good"}), "id2label"),
    ("qwen3", dict(reward=True, id2label=None), "num_labels"),  # two is the default
    ("qwen3", dict(reward=True, num_labels=2), "num_labels"),  # it wins over id2label, as in transformers
    ("qwen3", dict(reward=True, pad_token_id=[3]), "pad_token_id"),
    ("granite4", dict(num_experts_per_tok=0), "num_experts_per_tok"),
    ("granite4", dict(intermediate_size=0), "intermediate_size"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "names"), REFUSALS, ids=lambda x: None if isinstance(x, dict) else x)
def test_what_is_not_computed_is_an_error_that_names_file_and_field(family, changes, names, tmp_path):
    raw = {key: value for key, value in tiny_raw(family, **changes).items() if value is not None}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=f"(?s){re.escape(str(path))}: .*{names}"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        dict(use_sliding_window=False, sliding_window=4096),  # R1-Distill-Qwen
        dict(use_sliding_window=True, sliding_window=64, max_window_layers=2),  # no layer is past max_window_layers
        dict(use_sliding_window=True, sliding_window=None, max_window_layers=0),
        dict(use_sliding_window=True, sliding_window=256, max_window_layers=0),  # as long as the context
        dict(use_sliding_window=True, sliding_window=256, layer_types=["full_attention", "sliding_attention"]),
        dict(layer_types=["full_attention"] * 2),
        dict(hidden_act="swish", max_window_layers=None),
        dict(quantization_config=None, auto_map=None, use_mrope=False, partial_rotary_factor=1.0),
        dict(rope_scaling=dict(rope_type="default")),
    ],
)
def test_fields_that_change_nothing_are_accepted(changes):
    assert tiny_config("qwen2", **changes) == tiny_config("qwen2")


def test_head_dim_is_read_and_absent_fields_default_as_in_transformers():
    assert tiny_config("qwen3", head_dim=24).head_dim == 24
    absent = {key: value for key, value in tiny_raw("qwen3").items() if key not in ("head_dim", "rope_theta")}
    assert ModelConfig.from_dict(absent).head_dim == 128 and ModelConfig.from_dict(absent).rope == Rope("default", 1e4)
    assert tiny_config("llama", head_dim=None).head_dim == 32 // 4
    assert tiny_config("qwen2", num_key_value_heads=None).num_key_value_heads == 4


def test_the_length_of_the_original_context_and_the_heads_are_found_as_in_transformers():
    yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    for above, expected in ((32, 32), (None, 64)):  # the top level wins where it has one
        config = tiny_config("qwen3", original_max_position_embeddings=above, rope_scaling=yarn)
        assert config.rope.original_max_positions == expected
    raw = tiny_raw("qwen3", num_attention_heads=64)
    del raw["num_key_value_heads"]
    assert ModelConfig.from_dict(raw).num_key_value_heads == 32  # Qwen3Config's default, not the number of heads


def test_stop_tokens_come_from_both_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_raw("qwen3", eos_token_id=7)))
    assert ModelConfig.from_folder(tmp_path).eos_ids == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7, 3], "temperature": 0.6}))
    config = ModelConfig.from_folder(tmp_path)
    assert config.eos_ids == (3, 7, 9) and config.generation["temperature"] == 0.6
    assert tiny_config("qwen3", eos_token_id=None).eos_ids == ()


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "config.json"))):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny_raw("qwen3")))
    for name in ("generation_config.json", "config.json"):
        for content in (b'{"eos_token_id": 1,}', b"", b"[]", b"\xff\xfe"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
                ModelConfig.from_folder(tmp_path)


def test_aliases_are_hub_ids_pinned_to_whole_commits():
    assert all(re.fullmatch(r"[\w-]+/[\w.-]+(@[0-9a-f]{40})?", repository) for repository in ALIASES.values())
