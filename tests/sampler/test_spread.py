"""Models that several ranks hold together against one process: completions, memory, what is refused, whole runs."""

import json
import os
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from spread_cases import CASES, LARGE, SHAPE, run_rl, sample_cases
from test_train import rl_args, rows_of, run_script, without_clock
from tiny_models import random_checkpoint, tiny_config, tiny_raw
from world import write_policy, write_reward_model, write_world

import train_rl
from nanosafe.model.decoder import Decoder
from nanosafe.plan.shapes import SHAPES
from nanosafe.sampler.generation import sequence
from nanosafe.sampler.params import SamplingParams
from nanosafe.sampler.spread import TensorParallelDecoder, check_spread
from nanosafe.train.cli import check_parallel


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What 1, 2 and 4 processes sample: of each number a list by rank."""
    folder = tmp_path_factory.mktemp("spread")
    for name, (family, changes) in CASES.items():
        random_checkpoint(folder / name, family, **SHAPE | changes)
    random_checkpoint(folder / "large", "llama", **LARGE)
    write_policy(folder / "policy", num_key_value_heads=4)
    write_reward_model(folder / "reward")
    for world in (1, 2, 4):
        torch.multiprocessing.spawn(sample_cases, (world, folder), nprocs=world)
    return {world: [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)] for world in (1, 2, 4)}


@pytest.mark.parametrize("case, world, shards", [(case, T, T) for case in CASES for T in (2, 4)] + [("qwen3", 4, 2)])
def test_ranks_that_hold_a_model_together_sample_what_one_process_does(results, case, world, shards):
    one, each = results[1][0][case, 1], [of_rank[case, shards] for of_rank in results[world]]
    assert one.keys() == each[0].keys() and len(one) == (4 if case == "qwen3" else 1)
    for kind in one:
        assert all(completions[kind] == each[0][kind] for completions in each), "every rank has all completions"
        for samples, expected in zip(each[0][kind], one[kind], strict=True):
            for a, b in zip(samples, expected, strict=True):
                assert a[0] == b[0] and a[2] == b[2]
                assert a[1] == pytest.approx(b[1], abs=1e-5)


def test_evals_during_training_are_answered_alike(results):
    [one] = results[1]
    assert len(one["answers"]) == 10 and max(record["tokens"] for record in one["answers"]) == 9
    for of_rank in results[2] + results[4]:
        assert of_rank["answers"] == one["answers"]


def test_ranks_with_unequal_numbers_of_conversations_score_them_by_a_sharded_reward_model(results):
    expected = results[1][0]["rewards"]
    assert len(expected.unique()) == 8
    for world in (2, 4):
        for rank, of_rank in enumerate(results[world]):
            torch.testing.assert_close(of_rank["rewards"], expected[: 2 * rank], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shards", [2, 4])
def test_a_rank_holds_its_part_of_weights_and_cache_and_one_whole_parameter_more(results, shards):
    """Bytes of live tensors; the vocabulary is a multiple of what the ranks cut it into."""
    with torch.device("meta"):
        whole = {name: tensor.nbytes for name, tensor in Decoder(tiny_config("llama", **LARGE)).named_parameters()}
    norms = sum(nbytes for name, nbytes in whole.items() if "norm" in name)  # which every rank has
    cache = 2 * 6 * (4 + 1) * 64 * (4 * 8) * 4  # keys and values, layers, slots and scratch, positions, heads, float32
    for of_rank in results[shards]:
        found = of_rank["bytes"]
        assert found["part"] == (sum(whole.values()) - norms) / shards + norms and found["cache"] == cache / shards
        assert found["part"] < found["most"] <= found["part"] + max(whole.values()) + 64
        assert found["left"] <= 64  # a number or two


def test_runs_in_groups_and_with_sharded_frozen_models_are_those_of_one_process(tmp_path):
    """Sampling, rewards, the reference's log-probs, updates: steps of whole runs."""
    world = write_world(tmp_path / "world", num_key_value_heads=4)
    plain = rl_args(world, tmp_path, "--samples-per-prompt", "3", "--temperature", "0.9", "--old-logprobs", "trainer",
                    "--steps", "2")  # fmt: skip
    spread = [*plain, "--rollout-shards", "2"]
    frozen, filtered = ["--shard-frozen"], ["--top-p", "0.9"]
    runs = {
        1: {"one": plain, "filtered": [*plain, *filtered]},
        2: {"two": spread, "two, filtered": [*spread, *frozen, *filtered]},
        4: {"two groups": [*spread, *frozen]},
    }
    for count, named in runs.items():
        torch.multiprocessing.spawn(run_rl, (count, tmp_path, named), nprocs=count)

    def metrics(name: str) -> list[dict]:
        rows = without_clock(rows_of(tmp_path / name))
        return [{key: value for key, value in row.items() if value is not None} for row in rows]

    for name, expected in (("two", "one"), ("two groups", "one"), ("two, filtered", "filtered")):
        assert len(metrics(name)) == 2
        for row, other in zip(metrics(name), metrics(expected), strict=True):
            assert row["mismatch/max"] < 1e-5  # It is rounding, of which both have their own.
            assert row == pytest.approx(other | {"mismatch/max": row["mismatch/max"]}, rel=1e-5, abs=1e-6, nan_ok=True)


def test_70b_in_small_runs_from_its_config_alone(tmp_path):
    """The 70B's 64 heads, of which 8 have keys, and an MLP 3.5 times as wide as the model, cut in width and depth."""
    small = dict(hidden_size=256, intermediate_size=896, head_dim=4, num_hidden_layers=2, vocab_size=5000)
    for name, alias in (("policy", "r1-llama-70b"), ("judge", "skywork-v2-llama-8b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(SHAPES[alias] | small))
    environment = dict(os.environ) | {"NANOSAFE_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = run_script(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4", "train_rl.py", "--random-weights",
        "--model", str(tmp_path / "policy"), "--reward-model", str(tmp_path / "judge"), "--rollout-shards", "4",
        "--shard-frozen", "--device", "cpu", "--dtype", "bfloat16", "--steps", "2", "--prompts-per-step", "4",
        "--samples-per-prompt", "1", "--minibatches", "2", "--max-response-tokens", "12",
        "--out", str(tmp_path / "run"), environment=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 2 and all(row["policy/skipped"] == 0 and row["mismatch/mean"] < 0.05 for row in rows)


def test_a_model_that_cannot_be_cut_is_refused_by_name_before_it_is_loaded(tmp_path):
    for shards, family, field, changes in [
        (4, "qwen3", "num_key_value_heads 2", {}),
        (3, "llama", "num_attention_heads 4", {}),
        (2, "qwen2", "intermediate_size 47", dict(intermediate_size=47)),
        (2, "granite4", "Granite 4", {}),
    ]:
        config = tiny_config(family, **changes)
        with pytest.raises(ValueError, match=f"--rollout-shards {shards}.*{field}"):
            check_spread(config, shards, "model")
        check_spread(config, 1, "model")
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text(json.dumps(tiny_raw("qwen3", num_key_value_heads=1)))
    args = ["--model", str(tmp_path / "policy"), "--reward-model", "rule:refusal", "--prompts", "none"]
    spread = {"refused": [*args, "--rollout-shards", "2"]}
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="num_key_value_heads 1 of .*/policy: take"):
        torch.multiprocessing.spawn(run_rl, (2, tmp_path, spread), nprocs=2)
    assert not (tmp_path / "refused").exists()
    with pytest.raises(ValueError, match="--rollout-shards 2 spreads a model over 2 processes, and this is one"):
        train_rl.main([*args, "--rollout-shards", "2"])
    with pytest.raises(ValueError, match="--shard-frozen .* this is one"):
        train_rl.main([*args, "--shard-frozen"])
    settings = Namespace(rollout_shards=3, shard_frozen=False, offload=False)
    with pytest.raises(ValueError, match="--rollout-shards 3 does not divide the 8 processes"):
        check_parallel(settings, 8)
    with pytest.raises(ValueError, match="leave one out"):
        check_parallel(Namespace(rollout_shards=2, shard_frozen=True, offload=True), 8)


def test_a_spread_model_needs_seeds():
    with pytest.raises(ValueError, match="prompt 0 has no seed"):
        model = TensorParallelDecoder(tiny_config("qwen3"), SimpleNamespace(shards=2, index=0))
        sequence(model, [5], SamplingParams(max_new_tokens=9))
