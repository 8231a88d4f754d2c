"""weights.py: finding, downloading, strict streaming loads, saves; the references are transformers and a local hub."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import hub
import pytest
import torch
import world
from safetensors.torch import load_file, save_file
from tiny_models import random_checkpoint

from nanosafe.io.files import write_atomic
from nanosafe.io.hub import find_checkpoint
from nanosafe.model import weights
from nanosafe.model.config import ModelConfig
from nanosafe.model.granite import make_decoder
from nanosafe.model.weights import load_checkpoint, save_model
from nanosafe.names import load_model as load_model_as_scripts_do
from nanosafe.names import load_tokenizer
from nanosafe.recipes import ALIASES
from nanosafe.sampler.generation import generate
from nanosafe.sampler.params import SamplingParams

transformers = pytest.importorskip("transformers")
load_model = partial(load_model_as_scripts_do, dtype=torch.bfloat16)  # the type of the files
ROOT = Path(__file__).parents[2]
SHAPE = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
LLAMA = {**SHAPE, "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-6}
FAMILIES = {
    "qwen3-tied": ("Qwen3ForCausalLM", dict(head_dim=16, tie_word_embeddings=True)),
    "qwen2": ("Qwen2ForCausalLM", dict(tie_word_embeddings=False)),
    "llama": ("LlamaForCausalLM", dict(tie_word_embeddings=False)),
    "reward": ("LlamaForSequenceClassification", dict(num_labels=1, pad_token_id=0)),
}


def build(family: str, dtype=torch.bfloat16):
    """A tiny transformers model with random weights, norms and biases included."""
    name, fields = FAMILIES[family]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**SHAPE, **fields))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).eval()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every safetensors file in `folder`, read without the code under test."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def rewrite(folder: Path, change) -> None:
    """Apply `change` to the dict of tensors of a single-file checkpoint."""
    tensors = stored(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.fixture
def single(tmp_path) -> Path:
    build("llama").save_pretrained(tmp_path / "single")
    return tmp_path / "single"


@pytest.fixture
def sharded(tmp_path) -> Path:
    build("llama").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_every_tensor_loads_bit_equal(family, shard, tmp_path):
    reference = build(family)
    reference.save_pretrained(tmp_path, max_shard_size=shard)
    model = load_checkpoint(tmp_path, "cpu", torch.bfloat16)
    same(model.state_dict(), {n: t for n, t in reference.state_dict().items() if n in stored(tmp_path)})
    assert not model.training and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_transformers_loads_what_we_save(family, max_shard_bytes, tmp_path):
    cls = getattr(transformers, FAMILIES[family][0])
    build(family).save_pretrained(tmp_path / "theirs")
    save_model(
        load_checkpoint(tmp_path / "theirs", "cpu", torch.bfloat16), tmp_path / "ours", max_shard_bytes=max_shard_bytes
    )
    assert (len(list((tmp_path / "ours").glob("*.safetensors"))) > 1) == (max_shard_bytes == 20_000)
    theirs = cls.from_pretrained(tmp_path / "theirs", dtype="auto")
    ours, info = cls.from_pretrained(tmp_path / "ours", dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert ours.dtype == torch.bfloat16
    same(ours.state_dict(), theirs.state_dict())
    tokens = torch.arange(1, 25).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


def test_index_has_the_official_layout(sharded, tmp_path):
    model = load_checkpoint(sharded, "cpu", torch.bfloat16)
    save_model(model, tmp_path / "ours", max_shard_bytes=20_000)
    text = (tmp_path / "ours/model.safetensors.index.json").read_text()
    index = json.loads(text)
    assert text == json.dumps(index, indent=2, sort_keys=True) + "\n"
    assert index["metadata"] == {"total_size": sum(p.nbytes for p in model.parameters())}
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    for file in files:
        names = list(load_file(tmp_path / "ours" / file))
        assert sorted(names) == sorted(name for name, place in index["weight_map"].items() if place == file)
    order = [index["weight_map"][name] for name, _ in model.named_parameters()]
    assert order == sorted(order)  # shards are filled in the order of the parameters


def test_save_keeps_config_and_generation_config(single, tmp_path):
    config = json.loads((single / "config.json").read_text())
    generation = json.loads((single / "generation_config.json").read_text())
    assert config["dtype"] == "bfloat16"
    save_model(load_model(single, dtype=torch.float32), tmp_path / "ours")
    assert json.loads((tmp_path / "ours/config.json").read_text()) == {**config, "dtype": "float32"}
    assert json.loads((tmp_path / "ours/generation_config.json").read_text()) == generation
    del config["dtype"]  # the official files' older key
    (single / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16"}))
    save_model(load_model(single), tmp_path / "ours")
    assert json.loads((tmp_path / "ours/config.json").read_text()) == {**config, "torch_dtype": "bfloat16"}


def test_file_names_come_from_the_index(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    expected = stored(sharded)
    for old in sorted(set(index["weight_map"].values())):  # R1-Distill-Llama-8B has six digits after "of-"
        (sharded / old).rename(sharded / old.replace("-of-0", "-of-00"))
    index["weight_map"] = {name: file.replace("-of-0", "-of-00") for name, file in index["weight_map"].items()}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(
        {"model.norm.weight": torch.zeros(1)}, sharded / "model-00009-of-00009.safetensors"
    )  # not in the index: not read
    same(load_model(sharded).state_dict(), expected)


def test_a_single_file_wins_over_an_index_as_in_transformers(single, sharded):
    expected = {name: tensor * 2 for name, tensor in stored(single).items()}
    save_file(expected, sharded / "model.safetensors", metadata={"format": "pt"})
    same(transformers.LlamaForCausalLM.from_pretrained(sharded, dtype="auto").state_dict(), expected)
    same(load_model(sharded).state_dict(), expected)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mappings")
def test_matching_weights_are_the_mapped_file_and_training_never_changes_it(sharded):
    before = {file: file.read_bytes() for file in sharded.glob("*.safetensors")}
    model = load_model(sharded)
    mappings = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(sharded) in line]
    assert len(mappings) == len(before)
    ranges = [tuple(int(end, 16) for end in mapping[0].split("-")) for mapping in mappings]
    for parameter in model.parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in ranges)
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert not torch.equal(model.model.norm.weight, values["model.norm.weight"])
    assert {file: file.read_bytes() for file in before} == before
    same(load_model(sharded).state_dict(), values)


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_dtype_is_converted(source, target, tmp_path):
    build("qwen2", source).save_pretrained(tmp_path)
    same(load_model(tmp_path, dtype=target).state_dict(), {name: t.to(target) for name, t in stored(tmp_path).items()})


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resets Linux's peak memory counter")
def test_peak_memory_is_the_model_and_its_largest_tensor(tmp_path):
    raw = {**LLAMA, "vocab_size": 16384, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 12}
    with torch.device("meta"):
        model = make_decoder(ModelConfig.from_dict({**raw, "tie_word_embeddings": True}))
    save_model(model.bfloat16().to_empty(device="cpu"), tmp_path)
    script = f"""if True:
        import torch
        from pathlib import Path
        from nanosafe.model.weights import load_checkpoint
        def status(field):
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024
        model = load_checkpoint({str(tmp_path)!r}, "cpu", torch.bfloat16)  # imports all that a load needs
        for dtype in (torch.bfloat16, torch.float32):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again here
            before = status("VmRSS")
            model = load_checkpoint({str(tmp_path)!r}, "cpu", dtype)
            print(status("VmHWM") - before)"""
    mapped, converted = map(int, run(script).split())
    stored_size, largest, slack = (tmp_path / "model.safetensors").stat().st_size, 16384 * 512 * 2, 4 * 2**20
    assert stored_size > 2 * (largest + slack)  # keeping the whole file mapped would show
    assert mapped < stored_size / 4  # nothing is read yet but a page here and there
    assert 2 * stored_size - slack < converted < 2 * stored_size + largest + slack


def run(script: str, **options) -> str:
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE, timeout=120, **options
    ).stdout


def test_one_error_lists_all_that_does_not_fit(single):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3, dtype=torch.bfloat16)
        tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(32, 16, dtype=torch.bfloat16)

    rewrite(single, change)
    with pytest.raises(ValueError) as error:
        load_model(single)
    groups = str(error.value).split("\n  ")
    assert str(single) in groups[0]
    assert str(error.value).split("\n", 1)[1] == "\n".join(
        [
            "  missing:",
            "    model.layers.1.mlp.up_proj.weight [48, 32]",
            "    model.norm.weight [32]",
            "  unexpected:",
            "    model.layers.2.mlp.up_proj.weight [3]",
            "  of another shape:",
            "    model.layers.0.self_attn.q_proj.weight [32, 16], not [32, 32]",
        ]
    )


def test_wrong_vocabulary_is_named(single):
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    with pytest.raises(ValueError, match="vocab_size is 100 in config.json, 96 in the checkpoint") as error:
        load_model(single)
    assert "model.embed_tokens.weight [96, 32], not [100, 32]" in str(error.value)


@pytest.mark.parametrize("dtype, name", [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8"), (torch.float64, "F64")])
def test_quantised_and_odd_dtypes_are_refused(dtype, name, single):
    rewrite(single, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32).to(dtype)}))
    with pytest.raises(ValueError, match=f"model.norm.weight {name}"):
        load_model(single)


def test_tied_checkpoint_may_repeat_the_embedding_as_head(tmp_path):
    build("qwen3-tied").save_pretrained(tmp_path)
    expected = stored(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    same(load_model(tmp_path).state_dict(), expected)
    rewrite(tmp_path, lambda t: t["lm_head.weight"][5, 5].add_(1))
    with pytest.raises(ValueError, match="tie_word_embeddings, but lm_head.weight differs"):
        load_model(tmp_path)


def test_tied_checkpoint_may_hold_the_head_alone(tmp_path):
    """safetensors' own save_model keeps one of two names for a tensor, and may keep this one."""
    build("qwen3-tied").save_pretrained(tmp_path)
    expected = stored(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    same(load_model(tmp_path).state_dict(), expected)


def test_what_ends_a_turn_is_one_answer_that_a_saved_model_names(tmp_path):
    """A fine-tune whose config.json and generation_config.json name the base's end of text, not the end of a turn."""
    folder = world.write_policy(tmp_path / "tuned")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 0}))
    for generation in (None, {"eos_token_id": 0, "temperature": 0.6}):
        (folder / "generation_config.json").unlink(missing_ok=True)
        if generation:
            (folder / "generation_config.json").write_text(json.dumps(generation))
        model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
        assert model.config.eos_ids == tokenizer.eos_ids == (0, 1) == tuple(sorted({0, tokenizer.turn_end}))
        with torch.no_grad():  # it ends its turn at once
            model.lm_head.weight.zero_()[1] = model.model.norm.weight.zero_().add_(1)
            model.model.embed_tokens.weight.fill_(1)
        [[completion]] = generate(model, [[5, 6]], SamplingParams(temperature=0.0, max_new_tokens=4))
        assert completion.token_ids == [1] and completion.finish_reason == "stop"
        save_model(model, tmp_path / "saved", tokenizer)
        written = json.loads((tmp_path / "saved/generation_config.json").read_text())
        assert written == (generation or {}) | {"eos_token_id": [0, 1]}


def test_attn_factor_is_said_once(tmp_path, capsys):
    yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, attn_factor=0.88)
    random_checkpoint(tmp_path, "qwen3", rope_scaling=yarn)
    for _ in range(2):
        load_model(tmp_path)
    assert capsys.readouterr().err.count(f"{tmp_path / 'config.json'}: rope_scaling's attn_factor is") == 1


def test_untied_checkpoint_must_have_a_head(single):
    rewrite(single, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"missing:\n    lm_head.weight \[96, 32\]"):
        load_model(single)


def test_stored_rope_frequencies_of_old_checkpoints_are_passed_over(single):
    expected = stored(single)
    rewrite(single, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    same(load_model(single).state_dict(), expected)


def test_broken_files_are_named(sharded):
    index_path = sharded / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shard = sharded / index["weight_map"]["model.norm.weight"]
    whole = shard.read_bytes()
    for part in (whole[:-1], whole[:50], b""):
        shard.write_bytes(part)
        with pytest.raises(ValueError, match=f"{shard} is not a whole safetensors file(.|\n)*download it again"):
            load_model(sharded)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard} is missing"):
        load_model(sharded)
    shard.write_bytes(whole)

    def broken(text, message):
        index_path.write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            load_model(sharded)
        assert str(index_path) in str(error.value)

    broken(index_path.read_text()[:-20], "not valid JSON")
    broken("{}", "weight_map")
    broken(json.dumps({"weight_map": ["model.safetensors"]}), "weight_map")
    for file in (
        "../outside.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "*.safetensors",
        "pytorch_model.bin",
        "..",
        3,
    ):
        broken(json.dumps({"weight_map": {**index["weight_map"], "model.norm.weight": file}}), "plain .*file name")
    other = next(file for file in index["weight_map"].values() if file != shard.name)
    broken(
        json.dumps({"weight_map": {**index["weight_map"], "model.norm.weight": other}}),
        f"there is no model.norm.weight in {other}",
    )


def test_a_folder_without_weights_says_what_is_missing(single):
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="single/model.safetensors is missing"):
        load_model(single)


def test_reward_model_needs_its_own_loader(tmp_path):
    build("reward").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use load_reward_model"):
        load_model(tmp_path)


def test_model_can_be_saved_over_the_files_it_is_mapped_from(sharded):
    expected = stored(sharded)
    model = load_model(sharded)
    save_model(model, sharded)  # from shards to one file: the stale shards and their index go
    assert sorted(p.name for p in sharded.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    save_model(model, sharded, max_shard_bytes=50_000)
    save_model(model, sharded, max_shard_bytes=20_000)
    assert not (sharded / "model.safetensors").exists()
    same(stored(sharded), expected)
    same(load_model(sharded).state_dict(), expected)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_interrupted_save_leaves_the_earlier_model(error, sharded, monkeypatch):
    before = {path.name: path.read_bytes() for path in sharded.iterdir()}
    model, calls = load_model(sharded, dtype=torch.float32), []

    def fail_at_the_second_shard(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise error
        save_file(*args, **kwargs)

    monkeypatch.setattr(weights, "save_file", fail_at_the_second_shard)
    with pytest.raises(type(error)):
        save_model(model, sharded, max_shard_bytes=20_000)
    assert len(calls) == 2
    assert {path.name: path.read_bytes() for path in sharded.iterdir()} == before


def test_every_file_is_synced_before_the_first_is_renamed(sharded, tmp_path, monkeypatch):
    events = []
    opened = {}
    real_open, real_fsync, real_replace = os.open, os.fsync, os.replace
    monkeypatch.setattr(
        os, "open", lambda path, *a, **k: opened.setdefault(real_open(path, *a, **k), Path(path)) and max(opened)
    )
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(("sync", opened.pop(fd).name)), real_fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("rename", Path(b).name)), real_replace(a, b)))
    out = tmp_path / "run" / "final"
    save_model(load_model(sharded), out, max_shard_bytes=20_000)
    names = sorted(path.name for path in out.iterdir())
    assert names.index("model-00003-of-00003.safetensors") < names.index("model.safetensors.index.json")
    assert events == [("sync", n) for n in names] + [("rename", n) for n in names] + [
        ("sync", "final"),
        ("sync", "run"),
    ]


def test_saved_files_are_as_readable_as_their_folder(single, tmp_path):
    for mode in (0o755, 0o700, 0o2770):
        out = tmp_path / oct(mode)
        out.mkdir()
        out.chmod(mode)
        save_model(load_model(single), out)
        assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {mode & 0o666}


def test_write_atomic_replaces_or_leaves(tmp_path):
    path = tmp_path / "state" / "args.json"
    write_atomic(path, b"old")
    assert path.read_bytes() == b"old"

    def half(temporary: Path):
        temporary.write_bytes(b"ne")
        assert path.read_bytes() == b"old"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, half)
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["args.json"]
    write_atomic(path, lambda temporary: temporary.write_bytes(b"new"))
    assert path.read_bytes() == b"new" and os.listdir(path.parent) == ["args.json"]


DECOYS = ["pytorch_model.bin", "model-00001-of-00002.bin", "original/consolidated.00.pth", "onnx/model.onnx",
          "onnx/config.json", "extra.safetensors", "fp32/model.safetensors", "README.md", "tf_model.h5", "vocab.json",
          "modeling_custom.py"]  # fmt: skip


def add_repository_files(folder: Path) -> Path:
    for name in DECOYS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"decoy")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps(name))
    return folder


def test_only_needed_files_are_downloaded_and_only_once(sharded, tmp_path, monkeypatch):
    needed = sorted(path.name for path in sharded.iterdir()) + ["tokenizer.json", "tokenizer_config.json"]
    with hub.StandInHub({"owner/name": add_repository_files(sharded)}) as server:
        server.patch(monkeypatch, tmp_path)
        small = find_checkpoint("owner/name", weights=False)
        assert server.downloads() == [name for name in sorted(needed) if "model" not in name]
        folder = find_checkpoint("owner/name")
        assert folder == small and server.downloads() == sorted(needed)
        assert sorted(path.name for path in folder.iterdir()) == sorted(needed)
        same(load_model("owner/name").state_dict(), stored(folder))
        assert {name: (sharded / name).stat().st_size for name in needed} == server.sent  # nothing came twice


def test_single_file_repository_is_downloaded(single, tmp_path, monkeypatch):
    with hub.StandInHub({"owner/name": add_repository_files(single)}) as server:
        server.patch(monkeypatch, tmp_path)
        same(load_model("owner/name").state_dict(), load_file(single / "model.safetensors"))
        assert [name for name in server.downloads() if name.endswith(".safetensors")] == ["model.safetensors"]


def test_revisions_are_told_apart(tmp_path, monkeypatch):
    folders = {}
    for seed, revision in enumerate(["main", "step-100"]):
        torch.manual_seed(seed)
        save_model(make_decoder(ModelConfig.from_dict({**LLAMA, "vocab_size": 50 + seed})), tmp_path / revision)
        folders[revision] = tmp_path / revision
    with hub.StandInHub({"owner/name": folders}) as server:
        server.patch(monkeypatch, tmp_path)
        assert load_model("owner/name").config.vocab_size == 50
        assert load_model("owner/name@step-100").config.vocab_size == 51
        with pytest.raises(FileNotFoundError, match="owner/name has no revision 'step-200'"):
            find_checkpoint("owner/name@step-200")


def test_alias_is_its_pinned_revision(single, tmp_path, monkeypatch):
    repo, _, commit = ALIASES["qwen3-0.6b"].partition("@")
    with hub.StandInHub({repo: single}) as server:
        server.patch(monkeypatch, tmp_path)
        assert find_checkpoint("qwen3-0.6b").name == commit
        assert find_checkpoint("qwen3-0.6b@other").name != commit
        assert any(path.endswith("/revision/other") for _, path, _ in server.requests)


def test_broken_connection_resumes_where_it_stopped(single, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # the library writes whole chunks, of 10 MB by default
    size = (single / "model.safetensors").stat().st_size
    with hub.StandInHub({"owner/name": single}, cut={"model.safetensors": 30_000}) as server:
        server.patch(monkeypatch, tmp_path)
        folder = find_checkpoint("owner/name")
        assert (folder / "model.safetensors").read_bytes() == (single / "model.safetensors").read_bytes()
        assert [r for m, p, r in server.requests if m == "GET" and p.endswith("model.safetensors")] == [
            None,
            "bytes=30000-",
        ]
        assert server.sent["model.safetensors"] == size


def test_killed_download_keeps_finished_shards(sharded, tmp_path, monkeypatch):
    from huggingface_hub import constants

    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    with hub.StandInHub({"owner/name": sharded}, hang={shards[1]: 100}) as server:
        command = [sys.executable, "-c", "from nanosafe.io.hub import find_checkpoint; find_checkpoint('owner/name')"]
        process = subprocess.Popen(command, cwd=ROOT, env=server.environment(tmp_path), stderr=subprocess.DEVNULL)
        wait_until(lambda: shards[1] in server.sent)
        process.kill()
        process.wait()
        assert [name for name in server.downloads() if name in shards] == shards[:2]
        server.hang.clear()
        server.sent.clear()
        server.patch(monkeypatch, tmp_path)  # the same cache
        find_checkpoint("owner/name")
        assert server.downloads() == shards[1:]
        requests = len(server.requests)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        same(load_model("owner/name").state_dict(), stored(sharded))
        assert len(server.requests) == requests


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def test_offline_says_what_the_cache_lacks(single, tmp_path, monkeypatch):
    from huggingface_hub import constants

    with hub.StandInHub({"owner/name": single}) as server:
        server.patch(monkeypatch, tmp_path)
        find_checkpoint("owner/name", weights=False)
    lacks = "and the cache .* lacks"

    def never(seconds):
        raise AssertionError("it waits to try again")

    monkeypatch.setattr(time, "sleep", never)
    with pytest.raises(
        ConnectionError, match=f"{server.url} cannot be reached, {lacks} config and tokenizer of owner/other"
    ):
        find_checkpoint("owner/other@" + 40 * "a")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert ModelConfig.from_folder(find_checkpoint("owner/name", weights=False)).vocab_size == 96
    with pytest.raises(
        ConnectionError, match=f"HF_HUB_OFFLINE is set, {lacks} model.safetensors of owner/name.*HF_HOME"
    ):
        find_checkpoint("owner/name")


def test_gated_repository_names_the_licence_page(single, tmp_path, monkeypatch):
    with hub.StandInHub({"owner/name": single}, gated={"owner/name": "hf_secret"}) as server:
        server.patch(monkeypatch, tmp_path)
        with pytest.raises(
            PermissionError, match=f"accept its licence at {server.url}/owner/name, then run `hf auth login` or set"
        ):
            find_checkpoint("owner/name")
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        same(load_model("owner/name").state_dict(), stored(single))


def test_repositories_without_what_we_read(single, tmp_path, monkeypatch):
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    (tmp_path / "empty").mkdir()
    with hub.StandInHub({"owner/name": single, "owner/empty": tmp_path / "empty"}) as server:
        server.patch(monkeypatch, tmp_path)
        with pytest.raises(
            FileNotFoundError, match="owner/name holds no model.safetensors at revision main; pickle files"
        ):
            find_checkpoint("owner/name")
        with pytest.raises(FileNotFoundError, match="owner/empty holds no config.json"):
            find_checkpoint("owner/empty")
        with pytest.raises(
            FileNotFoundError, match=f"owner/nam is neither a local folder nor a repository at {server.url}"
        ):
            find_checkpoint("owner/nam")
        assert "pytorch_model.bin" not in server.sent


def test_a_download_that_keeps_failing_is_explained(single, tmp_path, monkeypatch):
    from huggingface_hub import file_download

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with hub.StandInHub({"owner/name": single}) as server:
        server.patch(monkeypatch, tmp_path)
        find_checkpoint("owner/name", weights=False)
        monkeypatch.setattr(file_download, "http_get", full)
        with pytest.raises(
            ConnectionError, match="downloading model.safetensors of owner/name failed .*No space left.*start again"
        ):
            find_checkpoint("owner/name")


def test_names_that_cannot_be_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").touch()
    for name, message in {
        "qwen3-8": "unknown model 'qwen3-8'.*qwen3-8b",
        "Qwen3-8B": "unknown model 'Qwen3-8B'.*qwen3-8b",
        "gpt": "unknown model 'gpt'.*owner/name",
        "runs/one/final": "folder runs/one/final does not exist",
        "./final": "folder final does not exist",
        "/no/such": "folder /no/such does not exist",
        "~/no-such-folder": f"folder {Path.home()}/no-such-folder does not exist",
        "a-file": "a-file is a file",
    }.items():
        with pytest.raises(FileNotFoundError, match=message):
            find_checkpoint(name)
    (tmp_path / "qwen3-8b").mkdir()
    assert find_checkpoint("qwen3-8b") == Path("qwen3-8b")  # a folder wins over an alias


def parameters_on_meta(config: ModelConfig) -> dict[str, list[int]]:
    with torch.device("meta"):
        return {name: list(parameter.shape) for name, parameter in make_decoder(config).named_parameters()}


@pytest.mark.parametrize(
    "alias", ["qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-14b", "qwen3-32b", "r1-qwen-1.5b",
              "r1-qwen-7b", "r1-llama-8b", "llama-3.1-8b"]
)  # fmt: skip
def test_official_configs_give_the_official_tensors(alias, assets):
    folder = assets / "configs" / ALIASES[alias].partition("@")[0].split("/")[1]
    reference = json.loads((folder.parent / "shapes.json").read_text())[folder.name]
    config = ModelConfig.from_folder(folder)
    found = parameters_on_meta(config)
    layers = range(config.num_hidden_layers)
    expected = {
        name.replace(".0.", f".{i}."): shape
        for name, shape in reference["shapes"].items()
        for i in layers
        if ".0." in name or i == 0
    }
    assert found == expected
    assert len(found) == reference["tensors"]
    assert sum(torch.Size(shape).numel() for shape in found.values()) == reference["parameters"]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        listed = json.loads(index.read_text())
        spare = {"lm_head.weight"} if config.tie_word_embeddings else set()
        assert found.keys() == listed["weight_map"].keys() - spare
        stored_twice = config.vocab_size * config.hidden_size * 2 if spare & listed["weight_map"].keys() else 0
        assert listed["metadata"]["total_size"] == 2 * reference["parameters"] + stored_twice


def test_parameter_counts_by_formula():
    """The counts that the model cards round, from the dimensions alone: checks shapes.json's models without it."""
    for D, M, L, H, K, tied, vocab, expected in [
        (1024, 3072, 28, 16, 8, True, 151936, 596_049_920),
        (4096, 12288, 36, 32, 8, False, 151936, 8_190_735_360),
    ]:
        raw = dict(architectures=["Qwen3ForCausalLM"], vocab_size=vocab, hidden_size=D, intermediate_size=M,
                   num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=K, head_dim=128, rms_norm_eps=1e-6,
                   max_position_embeddings=40960, tie_word_embeddings=tied)  # fmt: skip
        layer = D * 128 * (2 * H + 2 * K) + 2 * 128 + 3 * D * M + 2 * D
        assert vocab * D * (1 if tied else 2) + L * layer + D == expected
        assert (
            sum(torch.Size(shape).numel() for shape in parameters_on_meta(ModelConfig.from_dict(raw)).values())
            == expected
        )


def test_save_over_another_model_leaves_no_template_of_its(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    world.write_policy(first)
    world.write_reward_model(second)
    (first / "chat_template.jinja").write_text("an older template, which would win")
    model, tokenizer = load_checkpoint(second, "cpu", torch.float32), load_tokenizer(second)
    save_model(model, first, tokenizer)
    conversation = [{"role": "user", "content": "Hi"}]
    assert load_tokenizer(first).render(conversation) == tokenizer.render(conversation)
