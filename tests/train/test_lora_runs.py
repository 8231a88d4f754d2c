"""Runs with --lora-rank: resumed, on two ranks, in bfloat16, with less memory; and what their folders hold."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from parallel_cases import KINDS, LR, STEPS, arguments, joined, prepared, stored_episodes
from safetensors.torch import load_file
from test_train import expect_error, rl_args, rows_of, run_forked, sft_args, without_clock
from world import write_world

import train_rl
import train_sft
from nanosafe.model.adapter_files import Adapter, save_adapter
from nanosafe.model.lora import adapted, is_adapter
from nanosafe.model.weights import load_checkpoint, save_model
from nanosafe.names import load_model, load_policy, load_reference
from nanosafe.parallel import full_tensor, unsharded
from nanosafe.sampler.generation import generate
from nanosafe.sampler.params import SamplingParams
from nanosafe.text.data import Document
from nanosafe.train.optim import Optimizer

LORA = ["--lora-rank", "4"]
IDS = torch.tensor([[5, 9, 3, 77, 20, 41, 8, 13]])


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    [*_, newest] = sorted((run / "checkpoints").glob("step-*"))
    files = [newest / "adapter_model.safetensors", newest / "trainer/optimizer.safetensors"]
    files.append(run / "final/model.safetensors")
    found = {}
    for file in files:
        found |= {f"{file.name}: {name}": tensor for name, tensor in load_file(file).items()}
    return found


@pytest.mark.parametrize("script, arguments, more", [
    (train_rl, rl_args, []), (train_rl, rl_args, ["--dtype", "bfloat16"]),
    (train_rl, rl_args, ["--dtype", "bfloat16", "--low-memory", "--recompute", "some", "--old-logprobs", "sampler"]),
    (train_sft, sft_args, ["--recompute", "layer"]),
], ids=["rl", "rl-bf16", "rl-low-memory", "sft"])  # fmt: skip
def test_a_resumed_run_ends_with_equal_adapters_and_metrics(world, tmp_path, script, arguments, more):
    code, writes = run_forked(script, arguments(world, tmp_path / "whole", *LORA, *more))
    assert code == 0
    for kill_at in (writes // 2, None):
        run_forked(script, arguments(world, tmp_path / "broken", *LORA, *more), kill_at)
        if kill_at:
            assert list((tmp_path / "broken/checkpoints").glob("step-*")), "killed with something to resume"
            assert not (tmp_path / "broken/final").exists()
    whole, broken = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "broken")
    assert whole.keys() == broken.keys() and all(torch.equal(whole[name], broken[name]) for name in whole)
    assert without_clock(rows_of(tmp_path / "whole")) == without_clock(rows_of(tmp_path / "broken"))
    # Nothing but adapters is in checkpoint and optimizer, and only what has an adapter has changed.
    base = load_file(world / "policy/model.safetensors")
    for name, tensor in whole.items():
        file, key = name.split(": ")
        if file != "model.safetensors":
            assert "lora_" in key
        else:
            frozen = base[key].to(torch.bfloat16 if "bfloat16" in more else torch.float32).float()
            assert torch.equal(tensor, frozen) != ("_proj." in key), key


def test_checkpoints_final_and_adapter_are_one_policy_for_scripts_and_evals(world, tmp_path, capsys):
    import transformers

    train_sft.main(sft_args(world, tmp_path / "run", *LORA, "--lora-alpha", "12", "--save-adapter"))
    out = capsys.readouterr().out
    assert "LoRA: rank 4, alpha 12 on 14 linear layers" in out and "merged in" in out
    newest = sorted((tmp_path / "run/checkpoints").glob("step-*"))[-1]
    final = load_model(tmp_path / "run/final", dtype=torch.float32)
    with torch.no_grad():
        expected = final(IDS)
        for folder in (newest, tmp_path / "run/adapter"):
            torch.testing.assert_close(load_model(folder, dtype=torch.float32)(IDS), expected, rtol=1e-5, atol=1e-5)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/final", dtype=torch.float32)
        torch.testing.assert_close(theirs(IDS).logits, expected, rtol=1e-4, atol=1e-4)
        # By hand from the files: base + alpha / R * B A.
        merged, adapter = load_file(tmp_path / "run/final/model.safetensors"), Adapter(newest)
        for name, weight in load_file(world / "policy/model.safetensors").items():
            A, B = adapter.get(name.removesuffix(".weight"), (None, None))
            change = 0 if A is None else 3 * B.double() @ A.double()
            torch.testing.assert_close(merged[name].double(), weight.double() + change, rtol=0, atol=1e-6)
    settings = json.loads((newest / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str((world / "policy").resolve())
    assert not list(newest.glob("model*.safetensors"))
    # Trained on from a checkpoint, the merged model is where the new adapters, and the reference, begin.
    again = ["--model", str(newest), *LORA, "--steps", "1"]
    train_rl.main(rl_args(world, tmp_path / "again", *again))
    [row] = rows_of(tmp_path / "again")
    assert abs(row["kl/k1"]) < 1e-6 and row["mismatch/max"] < 1e-4
    shutil.move(world / "policy", world / "elsewhere")
    try:
        with pytest.raises(FileNotFoundError, match="policy does not exist"):
            load_model(newest)
    finally:
        shutil.move(world / "elsewhere", world / "policy")


def test_the_reference_is_the_policy_without_its_adapters(world, tmp_path):
    """The KL is that of a run whose reference is a second model."""
    args = Namespace(**vars(arguments({})), lora_rank=4, lora_alpha=8.0, device="cpu", dtype="float32", offload=False)
    ranks = joined(0, 1, tmp_path)
    policy = load_policy(args, world / "policy", None, ranks)
    with torch.no_grad():
        for layer in adapted(policy).values():
            layer.lora_B.normal_(std=0.05)
    assert load_reference(args, world / "policy", policy, ranks) is policy
    episodes = stored_episodes(5, policy.config.vocab_size)
    second = load_checkpoint(world / "policy", "cpu", torch.float32)
    metrics = {}
    for name, reference in (("policy", policy), ("second", second)):
        batch, metrics[name] = prepared(policy, reference, episodes, args, ranks)
    assert metrics["policy"] == pytest.approx(metrics["second"], nan_ok=True)
    assert abs(metrics["policy"]["kl/k1"]) > 1e-3
    args.kl_coef = 0
    assert load_reference(args, world / "policy", policy, ranks) is None


def test_the_learning_rate_is_ten_times_the_recipes_unless_it_is_given(world, tmp_path, capsys):
    def first(*more):
        flags = ["--lora-rank", "2", "--steps", "1", *more]
        argv = sft_args(world, tmp_path / f"run{len(more)}", *flags)
        if not more:
            position = argv.index("--lr")
            del argv[position : position + 2]
        train_sft.main(argv)
        return rows_of(tmp_path / f"run{len(more)}")[0]["sft/lr"], capsys.readouterr().out

    lr, out = first()
    assert lr == pytest.approx(1e-4) and "from the recipe, times 10 for LoRA: lr 0.0001" in out
    lr, out = first("--lr", "0.003")
    assert lr == 0.003 and "times 10" not in out


def test_flags_of_lora_alone_are_refused(world, tmp_path):
    for flag in (["--lora-alpha", "8"], ["--save-adapter"]):
        expect_error(rl_args(world, tmp_path / "run", *flag), train_rl, "need --lora-rank")
    with pytest.raises(SystemExit):
        train_rl.main(rl_args(world, tmp_path / "run", "--lora-rank", "0"))
    assert not (tmp_path / "run").exists()
    code, _ = run_forked(train_rl, rl_args(world, tmp_path / "run", *LORA, "--steps", "1"))
    shutil.rmtree(tmp_path / "run/final")
    other = rl_args(world, tmp_path / "run", "--lora-rank", "5", "--steps", "1")
    expect_error(other, train_rl, "--lora-rank was 4, is 5")


# Two ranks.


def train_on_ranks(rank: int, world_size: int, world: Path, out: Path) -> None:
    """Three updates on stored episodes, SFT's loss, a completion and saved folders; to OUT/WORLD_SIZE-RANK.pt."""
    ranks = joined(rank, world_size, out / "store")
    results = {}
    for name, (dtype, low_memory) in KINDS.items():
        args = Namespace(**vars(arguments({"low_memory": low_memory})), lora_rank=4, lora_alpha=8.0, device="cpu",
                         dtype=str(dtype).removeprefix("torch."))  # fmt: skip
        policy = load_policy(args, world / "policy", None, ranks)
        policy.recompute("layer" if dtype == torch.float32 else "some")
        frozen = {str(p.dtype) for n, p in policy.named_parameters() if not is_adapter(n)}
        optimizer, rows = Optimizer(policy, low_memory=low_memory), []
        for step in range(STEPS):
            episodes = stored_episodes(7 if step else 1, policy.config.vocab_size)  # one row: a rank has none
            batch, metrics = prepared(policy, policy, episodes, args, ranks)
            rows.append(metrics | train_rl.update(policy, optimizer, batch, args, ranks, step))
        documents = [Document(e.prompt_ids, e.response_ids) for e in episodes]
        rows.append(train_sft.backward(policy, documents, args.tokens_per_microbatch, ranks))
        optimizer.discard()
        with unsharded(policy, dtype) as model:
            params = SamplingParams(max_new_tokens=20, seed=1)  # so few that nothing is packed
            [[completion]] = generate(model, [IDS[0].tolist()], params)
        save_adapter(policy, out / f"adapter-{world_size}-{name}", base=str(world / "policy"), dtype=dtype,
                     writes=ranks.main)  # fmt: skip
        masters = {key: full_tensor(p).detach().clone() for key, p in optimizer.masters.items()}
        save_model(policy, out / f"final-{world_size}-{name}", dtype=dtype, writes=ranks.main)
        results[name] = {"rows": rows, "masters": masters, "frozen": frozen,
                         "completion": (completion.token_ids, completion.logprobs)}  # fmt: skip
    torch.save(results, out / f"{world_size}-{rank}.pt")
    ranks.wait()
    ranks.close()


def test_two_ranks_train_the_adapters_of_one(world, tmp_path):
    for count in (1, 2):
        torch.multiprocessing.spawn(train_on_ranks, (count, world, tmp_path), nprocs=count)
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for kind in KINDS:
        tolerance = dict(rel=1e-5, abs=1e-6) if kind == "float32" else dict(rel=0.05, abs=0.02)
        assert one[kind]["frozen"] == first[kind]["frozen"] == {str(KINDS[kind][0])}
        for other in (first, second):
            for a, b in zip(other[kind]["rows"], one[kind]["rows"], strict=True):
                assert a == pytest.approx(b, nan_ok=True, **tolerance)
        for name, master in one[kind]["masters"].items():
            assert torch.equal(first[kind]["masters"][name], second[kind]["masters"][name])
            if kind == "float32":
                assert (first[kind]["masters"][name] - master).abs().max() <= 0.05 * LR, name
    assert one["float32"]["completion"][0] == first["float32"]["completion"][0]
    assert first["float32"]["completion"][1] == pytest.approx(one["float32"]["completion"][1], abs=1e-4)
    for count in (1, 2):
        with torch.no_grad():
            merged = load_model(tmp_path / f"final-{count}-float32", dtype=torch.float32)(IDS)
            adapter = load_model(tmp_path / f"adapter-{count}-float32", dtype=torch.float32)(IDS)
        torch.testing.assert_close(merged, adapter, rtol=1e-5, atol=1e-5)
