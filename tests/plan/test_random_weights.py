"""--random-weights: folders of the true shape that load, and the scripts running from them, without any download."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_models import tiny_raw

from nanosafe import load_model, load_reward_model, load_tokenizer
from nanosafe.parallel import Ranks
from nanosafe.plan.random_weights import random_checkpoint, substitute
from nanosafe.plan.shapes import SHAPES

ROOT = Path(__file__).parents[2]
SMALL = dict(vocab_size=3000, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
             head_dim=16, num_hidden_layers=3)  # fmt: skip


@pytest.fixture
def shapes(tmp_path, monkeypatch) -> dict[str, str]:
    """Folders that hold a config.json and nothing else: Qwen3-8B and its reward model, scaled down."""
    monkeypatch.setenv("NANOSAFE_CACHE", str(tmp_path / "cache"))
    for name, alias in (("policy", "qwen3-8b"), ("judge", "skywork-v2-llama-8b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(SHAPES[alias] | SMALL))
    return {name: str(tmp_path / name) for name in ("policy", "judge")}


def test_the_folder_loads_and_is_written_once_in_shards(shapes):
    folder = random_checkpoint(shapes["policy"], shard_bytes=100_000)
    files = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(files) > 3 and set(index["weight_map"].values()) == {file.name for file in files}
    for file in files:
        with safe_open(file, "pt") as shard:
            names = list(shard.keys())
        assert len(names) == 1 or file.stat().st_size < 104_000
    written = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert random_checkpoint(shapes["policy"]) == folder
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == written
    model = load_model(folder, dtype=torch.bfloat16)
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    assert model.lm_head.weight.float().std().item() == pytest.approx(64**-0.5, rel=0.02)
    added = model.model.layers[0].self_attn.o_proj.weight  # of 4 heads of 16, one of 6 additions to the residual stream
    assert added.float().std().item() == pytest.approx((64 * 6) ** -0.5, rel=0.05)
    assert model.model.layers[2].input_layernorm.weight.eq(1).all()
    assert model(torch.tensor([[5, 2999]])).isfinite().all()
    first, second = (layer.mlp.up_proj.weight for layer in model.model.layers[:2])
    assert not torch.equal(first, second)


def test_another_shape_is_another_folder_and_half_a_folder_is_begun_again(shapes, tmp_path):
    folder = random_checkpoint(shapes["policy"])
    half = folder.rename(folder.with_name(f"{folder.name}.building"))
    names = {file.name for file in half.iterdir()}
    (half / "config.json").rename(half / "model-00001-of-00009.safetensors")  # of other shards
    assert random_checkpoint(shapes["policy"]) == folder and not half.exists()
    assert {file.name for file in folder.iterdir()} == names
    (tmp_path / "policy" / "config.json").write_text(json.dumps(SHAPES["qwen3-8b"] | SMALL | {"hidden_size": 32}))
    assert random_checkpoint(shapes["policy"]) != folder


def test_the_stand_in_tokenizer_ends_turns_and_decodes_every_id_of_the_model(shapes):
    tokenizer = load_tokenizer(random_checkpoint(shapes["policy"]))
    assert tokenizer.vocab_size < 3000 and max(tokenizer.eos_ids) < tokenizer.vocab_size
    ids = tokenizer.encode_chat([{"role": "user", "content": "Grüße, 世界"}], add_generation_prompt=True)
    assert "Grüße, 世界" in tokenizer.decode(ids)
    assert tokenizer.decode([*ids, 2999, tokenizer.vocab_size]) == tokenizer.decode(ids)
    reward = load_reward_model(random_checkpoint(shapes["judge"]))
    conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]
    assert reward.score([conversation]).isfinite().all()


def test_too_small_a_vocabulary_and_a_full_disk_are_said(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOSAFE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "config.json").write_text(json.dumps(tiny_raw("qwen3")))
    with pytest.raises(ValueError, match="'vocab_size' = 97"):
        random_checkpoint(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(tiny_raw("qwen3", vocab_size=2000)))
    monkeypatch.setattr("shutil.disk_usage", lambda path: Namespace(free=10))
    with pytest.raises(OSError, match="NANOSAFE_CACHE"):
        random_checkpoint(str(tmp_path))
    assert not list((tmp_path / "cache").glob("random-*building"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.disk_usage", lambda path: Namespace(free=10**12))
    monkeypatch.setattr("nanosafe.plan.random_weights.write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        random_checkpoint(str(tmp_path))
    assert not list((tmp_path / "cache").glob("random-*building"))


def run(script: str, *flags: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, script, *flags, "--device", "cpu"], cwd=ROOT, env=environment, timeout=400,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_step_of_rl_runs_from_two_configs_without_a_download(shapes, tmp_path):
    out = tmp_path / "run"
    text = run("train_rl.py", "--random-weights", "--model", shapes["policy"], "--reward-model", shapes["judge"],
               "--steps", "1", "--prompts-per-step", "4", "--minibatches", "2", "--max-response-tokens", "12",
               "--out", str(out))  # fmt: skip
    assert "prompts tiny-star, for nothing is downloaded" in text and "done:" in text
    [row] = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    # Random logits: close to uniform over all 3,000 ids, most of which the stand-in tokenizer does not know.
    assert row["response/length_mean"] > 10 and 7 < row["policy/entropy"] < 8.007 and row["policy/skipped"] == 0
    assert json.loads((out / "final" / "config.json").read_text())["vocab_size"] == 3000


def test_sft_runs_too_and_data_that_are_given_stay(shapes, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "Why?", "response": "Because."}) + "\n")
    text = run("train_sft.py", "--random-weights", "--model", shapes["policy"], "--steps", "1", "--batch-size", "2",
               "--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "run"))  # fmt: skip
    assert "tiny-star" not in text and "1 responses from 1 rows" in text and "done:" in text


def test_the_recipes_questions_are_not_asked_of_random_weights(tmp_path, monkeypatch):
    """Those of --eval-every, which the tiny world's recipe has and a run cannot switch off."""
    monkeypatch.setenv("NANOSAFE_CACHE", str(tmp_path))
    args = Namespace(model="tiny", prompts="p", reward_model="rule:refusal", eval_every=10)
    substitute(args, [], Ranks("cpu"))
    assert args.eval_every is None
    args.eval_every = 10
    substitute(args, ["eval_every"], Ranks("cpu"))
    assert args.eval_every == 10, "then the script refuses it by name"
