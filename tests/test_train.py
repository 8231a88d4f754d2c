"""The training scripts as a user runs them: subprocesses, torchrun, kills, a hub; and ranks against one process."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub import StandInHub
from parallel_cases import CASES, KINDS, LR, run_cases, run_resumed, shard_in_turn
from safetensors.torch import load_file, save_file
from world import write_dates, write_rows, write_world

import train_rl
import train_sft
from nanosafe.names import load_model
from nanosafe.parallel import Ranks
from nanosafe.plan import memory
from nanosafe.text.data import Episode, Row, sft_steps
from nanosafe.train import run_folder as checkpoint
from nanosafe.train.flags import rl_flags
from nanosafe.train.metrics import console_line, sample_rows
from nanosafe.train.packing import partition
from nanosafe.train.rewards import UNREAD
from nanosafe.train.run_folder import RunFolder

ROOT = Path(__file__).parent.parent
RL = ["--steps", "4", "--prompts-per-step", "4", "--samples-per-prompt", "2", "--minibatches", "2", "--lr", "1e-3",
      "--max-response-tokens", "8", "--save-every", "1"]  # fmt: skip


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def rl_args(world: Path, out: Path, *more: str) -> list[str]:
    return ["--model", str(world / "policy"), "--reward-model", str(world / "reward"), "--prompts",
            str(world / "rows.jsonl"), "--out", str(out), *RL, *more]  # fmt: skip


def sft_args(world: Path, out: Path, *more: str) -> list[str]:
    return ["--model", str(world / "policy"), "--data", str(world / "rows.jsonl"), "--out", str(out), "--epochs", "2",
            "--batch-size", "5", "--lr", "1e-3", "--save-every", "1", *more]  # fmt: skip


def run_script(*command: str, environment: dict | None = None, timeout: int = 240) -> subprocess.CompletedProcess:
    environment = (environment or dict(os.environ)) | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True,
                          timeout=timeout)  # fmt: skip


def rows_of(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def without_clock(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows]


def run_forked(script, argv: list[str], kill_at: int | None = None) -> tuple[int, int]:
    """Run script.main(argv) in a child that dies, as by SIGKILL, at its `kill_at`-th write to disk.

    Returns its exit code and how many such writes it made.
    """
    source, sink = os.pipe()
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # the parent's worker threads do not exist here
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        calls = 0

        def counted(function):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                os.write(sink, b"w")
                if calls == kill_at:
                    os._exit(9)
                return function(*args, **kwargs)

            return call

        for name in ("replace", "rename", "fsync"):
            setattr(os, name, counted(getattr(os, name)))
        shutil.rmtree = counted(shutil.rmtree)
        try:
            script.main(argv)
            os._exit(0)
        except BaseException as error:  # a child must never return into pytest
            print(repr(error), file=sys.stderr)
            os._exit(1)
    os.close(sink)
    with os.fdopen(source, "rb") as pipe:
        writes = len(pipe.read())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), writes


@pytest.mark.parametrize("script, arguments", [(train_rl, rl_args), (train_sft, sft_args)], ids=["rl", "sft"])
def test_run_killed_at_any_write_resumes_to_equal_weights_and_metrics(world, tmp_path, script, arguments):
    code, writes = run_forked(script, arguments(world, tmp_path / "whole"))
    assert code == 0
    kept: dict[int, dict] = {}
    resumed_from, code, share = [], 9, 0
    while code == 9:  # every run is killed a little later than the one before, until one gets to the end
        share += 1
        code, _ = run_forked(script, arguments(world, tmp_path / "broken"), kill_at=share * writes // 20)
        done = sorted(int(p.name[5:]) for p in (tmp_path / "broken" / "checkpoints").glob("step-*"))
        rows = rows_of(tmp_path / "broken") if done else []
        assert all(row == kept.get(row["step"], row) for row in rows), "a covered row changed, clock included"
        kept = {row["step"]: row for row in rows if row["step"] <= done[-1]}
        resumed_from += done[-1:]
    assert code == 0 and share >= 6 and len(set(resumed_from)) >= 3, resumed_from
    whole, broken = rows_of(tmp_path / "whole"), rows_of(tmp_path / "broken")
    assert len(whole) >= 4 and without_clock(whole) == without_clock(broken)
    if script is train_rl:
        assert rows_of(tmp_path / "whole", "samples.jsonl") == rows_of(tmp_path / "broken", "samples.jsonl")
    a, b = (load_file(tmp_path / run / "final" / "model.safetensors") for run in ("whole", "broken"))
    base = load_file(world / "policy" / "model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], base[name]) for name in a), "training changed nothing"
    assert not list((tmp_path / "broken").rglob(".partial*"))


def test_a_run_keeps_its_date_when_it_goes_on_another_day(tmp_path, monkeypatch):
    world = write_world(tmp_path)
    write_dates(world)

    short = ["--steps", "2", "--max-prompt-tokens", "200"]

    def run(out: str, day: int, *more: str, kill_at: int | None = None) -> int:
        monkeypatch.setattr(checkpoint, "date", SimpleNamespace(today=lambda: date(2026, 11, day)))
        return run_forked(train_rl, rl_args(world, tmp_path / out, *short, *more), kill_at)[1]

    writes = run("whole", 1)
    run("broken", 1, kill_at=writes // 2)
    assert list((tmp_path / "broken/checkpoints").glob("step-*")) and not (tmp_path / "broken/final").exists()
    run("broken", 2)
    run("other", 2)
    run("given", 3, "--date", "2026-11-01")
    rows = {out: without_clock(rows_of(tmp_path / out)) for out in ("whole", "broken", "other", "given")}
    assert rows["whole"] == rows["broken"] == rows["given"] and rows["whole"] != rows["other"]
    dates = [json.loads((tmp_path / out / "args.json").read_text())["date"] for out in ("broken", "other")]
    assert dates == ["2026-11-01", "2026-11-02"]
    with pytest.raises(ValueError, match="--date was '2026-11-01', is '2026-11-02'"):
        train_rl.main(rl_args(world, tmp_path / "broken", *short, "--date", "2026-11-02"))


def test_bf16_run_resumes_with_its_float32_masters(world, tmp_path):
    _, writes = run_forked(train_rl, rl_args(world, tmp_path / "whole", "--dtype", "bfloat16"))
    for kill_at in (writes // 2, None):
        run_forked(train_rl, rl_args(world, tmp_path / "broken", "--dtype", "bfloat16"), kill_at)
        if kill_at:
            assert list((tmp_path / "broken/checkpoints").glob("step-*")), "killed with something to resume"
    state = "checkpoints/step-000004/trainer/optimizer.safetensors"
    a, b = (load_file(tmp_path / run / state) for run in ("whole", "broken"))
    assert any(name.startswith("master/") for name in a)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert without_clock(rows_of(tmp_path / "whole")) == without_clock(rows_of(tmp_path / "broken"))


def test_a_run_that_ran_out_of_memory_goes_on_with_flags_that_need_less(world, tmp_path):
    _, writes = run_forked(train_rl, rl_args(world, tmp_path / "whole"))
    run_forked(train_rl, rl_args(world, tmp_path / "broken"), kill_at=writes // 2)
    assert list((tmp_path / "broken/checkpoints").glob("step-*")), "killed with something to resume"
    less = ("--tokens-per-microbatch", "64", "--offload")
    assert run_forked(train_rl, rl_args(world, tmp_path / "broken", *less))[0] == 0
    a, b = (load_file(tmp_path / run / "final/model.safetensors") for run in ("whole", "broken"))
    for name in a:  # The sums of smaller micro-batches are rounded otherwise.
        assert torch.allclose(a[name], b[name], atol=1e-5), name
    assert any(not torch.equal(a[name], b[name]) for name in a), "one micro-batch held all"


def test_sigkill_and_sigterm_of_the_real_script(world, tmp_path):
    command = [sys.executable, "train_rl.py", *rl_args(world, tmp_path / "run", "--steps", "60")]
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 128 + signal.SIGTERM)):
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("step "):
                break
        time.sleep(random.random() / 4)
        process.send_signal(number)
        output = process.stdout.read()
        assert process.wait() == code
    assert "stopped after step" in output
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert (tmp_path / "run" / "checkpoints" / f"step-{len(rows):06d}").is_dir(), "SIGTERM saves the finished step"
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on the size of files")
def test_a_full_disk_is_reported_and_the_last_checkpoint_stays(world, tmp_path):
    """A limit on the size of files stands in for it: metrics fit, and from the second checkpoint on nothing else."""
    limited = ("import resource, signal, sys, train_rl\n"
               "from nanosafe.train import run_folder as checkpoint; from nanosafe.train import cli as script\n"
               "save = checkpoint.RunFolder.save\n"
               "def limit(run):\n"
               "    if run.state['step'] == 2:\n"
               "        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
               "        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
               "    save(run)\n"
               "checkpoint.RunFolder.save = limit\n"
               "with script.readable_errors(): train_rl.main(sys.argv[1:])")
    done = run_script("-c", limited, *rl_args(world, tmp_path / "run"))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"saving .*step-000002 failed \(.*\); kept: step-000001. Make room", done.stderr), done.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-000001"]
    again = run_script("train_rl.py", *rl_args(world, tmp_path / "run"))
    assert again.returncode == 0 and "resuming after step 1" in again.stdout
    assert not list((tmp_path / "run").rglob(".partial*"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")
def test_a_killed_rank_ends_the_others_and_the_run_resumes(world, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_rl.py",
               *rl_args(world, tmp_path / "run", "--steps", "12")]  # fmt: skip
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True)  # fmt: skip
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    ranks = [pid for pid in children if b"train_rl.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    process.communicate(timeout=90)
    assert process.returncode != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert not (tmp_path / "run" / "final").exists()
    done = run_script(*command[1:])
    assert done.returncode == 0 and re.search("resuming after step [1-9]", done.stdout), done.stderr
    assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(1, 13))


@pytest.fixture(scope="module")
def results_by_ranks(world, tmp_path_factory) -> list[dict]:
    """What one process computes, then what each of two does."""
    out = tmp_path_factory.mktemp("ranks")
    for ranks in (1, 2):
        torch.multiprocessing.spawn(run_cases, (ranks, world, out), nprocs=ranks)
    for ranks in (1, 2):
        torch.multiprocessing.spawn(run_resumed, (ranks, world, out), nprocs=ranks)
    each = (1, 0), (2, 0), (2, 1)
    return [torch.load(out / f"{ranks}-{rank}.pt") | torch.load(out / f"resumed-{ranks}-{rank}.pt")
            for ranks, rank in each]


def test_a_model_is_sharded_while_another_rank_waits(tmp_path):
    """As the reward model of --shard-frozen, with --device cpu on a machine that has GPUs."""
    spawned = torch.multiprocessing.spawn(shard_in_turn, (tmp_path,), nprocs=2, join=False)
    deadline, done = time.monotonic() + 120, False
    while not done and time.monotonic() < deadline:
        done = spawned.join(timeout=1)
    for process in spawned.processes:
        process.kill()
    assert done, "the ranks wait for each other"


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_compute_what_one_does(results_by_ranks, name):
    """Loss, gradients, metrics and advantages on the same stored episodes; unequal rows, ranks without a token."""
    one, *two = (results[name] for results in results_by_ranks)
    assert two[0]["metrics"] == pytest.approx(two[1]["metrics"], nan_ok=True, rel=1e-12), "ranks report the same"
    assert two[0]["metrics"] == pytest.approx(one["metrics"], rel=1e-5, abs=1e-6, nan_ok=True)
    for parameter, gradient in one["gradients"].items():
        error = (two[0]["gradients"][parameter] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error <= 1e-5, (parameter, error)
    assert sum(gradient.norm() for gradient in one["gradients"].values()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_weights_spread_over_two_ranks_move_as_those_of_one(results_by_ranks, world, kind):
    """Three steps on stored episodes, and a last step of runs resumed by another number of ranks."""
    one, *two = results_by_ranks
    tolerance = dict(rel=1e-5, abs=1e-6) if kind == "float32" else dict(rel=0.05, abs=0.02)
    for other, case in [(results, kind) for results in two] + [
            (results, (by, kind)) for results in results_by_ranks for by in (1, 2)]:  # fmt: skip
        for a, b in zip(other[case]["rows"][::-1], one[kind]["rows"][::-1], strict=False):
            assert a == pytest.approx(b, nan_ok=True, **tolerance)
        if kind == "float32":  # in bfloat16 Adam moves by the learning rate where a gradient is only rounding
            for name, weight in one[kind]["weights"].items():
                assert (other[case]["weights"][name] - weight).abs().max() <= 0.05 * LR, (case, name)
    if kind == "low-memory":  # what the ranks hold together is what the plan counts
        config = load_model(world / "policy").config
        planned = memory.training_state(memory.sizes(config), 2, 2, True)
        assert one[kind]["bytes"] == sum(results[kind]["bytes"] for results in two) == 2 * sum(planned.values())
    for results, by in ((one, 1), (two[0], 2)):  # resumed with its masters, bit for bit: the model's files are coarser
        for name, weight in results[kind]["weights"].items():
            assert torch.equal(results[by, kind]["weights"][name], weight), (by, name)


def test_completions_spread_over_two_ranks_are_those_of_one_in_order(results_by_ranks):
    one, *two = (results["completions"] for results in results_by_ranks)
    assert two[0] == two[1] and [len(outputs) for outputs in one] == [23, 1, 0]
    for outputs, expected in zip(two[0], one, strict=True):
        assert [len(samples) for samples in outputs] == [1 + i % 3 for i in range(len(outputs))]
        for a, b in zip(sum(outputs, []), sum(expected, []), strict=True):
            assert a[0] == b[0] and a[2] == b[2] and a[1] == pytest.approx(b[1], abs=1e-4)


def test_shares_are_runs_of_nearly_equal_cost():
    generator = random.Random(0)
    for _ in range(300):
        world = generator.randint(1, 9)
        costs = [generator.choice((1, 10, 500)) * generator.random() + 0.01 for _ in range(generator.randint(0, 30))]
        shares = []
        for rank in range(world):
            ranks = Ranks("cpu")
            ranks.rank, ranks.world = rank, world
            shares.append(ranks.local_range(costs))
        assert [i for share in shares for i in share] == list(range(len(costs)))
        for share in shares:
            assert abs(sum(costs[i] for i in share) - sum(costs) / world) <= max(costs, default=0) + 1e-9


def test_partition_gives_every_item_to_one_rank_and_none_much_more_than_its_part():
    generator = random.Random(0)
    for _ in range(300):
        world = generator.randint(1, 9)
        costs = [generator.choice((1, 10, 500)) * generator.random() for _ in range(generator.randint(0, 30))]
        parts = partition(costs, world)
        assert len(parts) == world and all(part == sorted(part) for part in parts)
        assert sorted(i for part in parts for i in part) == list(range(len(costs)))
        # Graham (1969): a greedy assignment, the dearest first, is at most 4/3 of the best, which is at least these.
        best = max(sum(costs) / world, max(costs, default=0), sum(sorted(costs)[-world - 1 :][:2]))
        assert max(sum(costs[i] for i in part) for part in parts) <= 4 / 3 * best + 1e-9 or len(costs) <= world


def test_sampler_ranks_draw_the_same_completions(world, tmp_path):
    outputs = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        done = run_script(*launcher, "train_rl.py", *rl_args(world, out, "--steps", "1"))
        assert done.returncode == 0, done.stderr
        outputs.append(rows_of(out, "samples.jsonl"))
    texts = [[(row["row"], row["response"], row["tokens"]) for row in rows] for rows in outputs]
    assert texts[0] == texts[1] and len(texts[0]) == 8


def shrink(config: dict, **sizes) -> dict:
    return {**config, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "torch_dtype": "float32", **sizes}  # fmt: skip


def write_shards(folder: Path, config: dict, shards: int, name: str) -> None:
    """Random weights of `config` as transformers names them, in `shards` files with an index."""
    from tiny_models import random_reference

    (folder / "config.json").write_text(json.dumps(config))
    tensors = {k: v.contiguous() for k, v in random_reference(config).state_dict().items()}
    files = [name.format(i + 1, shards) for i in range(shards)]
    weight_map = {key: files[i * shards // len(tensors)] for i, key in enumerate(sorted(tensors))}
    for file in files:
        save_file({k: tensors[k] for k in tensors if weight_map[k] == file}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_the_8b_command_from_a_hub_with_official_files(assets, tmp_path):
    """`torchrun --nproc_per_node=2 train_rl.py --model qwen3-8b`: official names, files and formats; sizes shrunk."""
    policy, reward, data = (tmp_path / name for name in ("policy", "reward", "data"))
    for folder in (policy, reward, data):
        folder.mkdir()
    official = json.loads((assets / "configs/Qwen3-8B/config.json").read_text())
    shutil.copy(assets / "configs/Qwen3-8B/generation_config.json", policy)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(assets / "tokenizers/qwen3" / file, policy)
    write_shards(policy, shrink(official), 5, "model-{:05d}-of-{:05d}.safetensors")
    (policy / "pytorch_model.bin").write_bytes(b"a decoy that must not be fetched")
    llama = json.loads((assets / "configs/Llama-3.1-8B-Instruct/config.json").read_text())
    llama |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}, "pad_token_id": 128009}
    shutil.copy(assets / "tokenizers/llama3.1/tokenizer.json", reward)
    template = (assets / "templates/meta-llama-Llama-3.1-8B-Instruct.jinja").read_text()
    special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": template}
    (reward / "tokenizer_config.json").write_text(json.dumps(special))
    write_shards(reward, shrink(llama), 4, "model-{:05d}-of-{:05d}.safetensors")
    shutil.copy(assets / "data/star1/STAR-1.json", data)

    models = {"Qwen/Qwen3-8B": policy, "Skywork/Skywork-Reward-V2-Llama-3.1-8B": reward}
    shard = "model-00003-of-00005.safetensors"
    with StandInHub(models, {"UCSC-VLAA/STAR-1": data}, cut={shard: 100_000}) as hub:
        done = run_script(
            "-m", "torch.distributed.run", "--nproc_per_node=2", "train_rl.py", "--model", "qwen3-8b", "--steps", "2",
            "--device", "cpu", "--prompts-per-step", "8", "--max-prompt-tokens", "128",
            "--max-response-tokens", "8", "--out", str(tmp_path / "run"),
            environment=hub.environment(tmp_path / "home"),
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert hub.sent.get("pytorch_model.bin") is None
    assert hub.sent[shard] == (policy / shard).stat().st_size, "the cut download went on where it stopped"
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2] and all(row["reward/mean"] is not None for row in rows)
    assert "dropped" in done.stdout and "generation_config.json's temperature 0.6" in done.stdout

    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run/final", dtype=torch.float32)
    ours = load_model(tmp_path / "run/final", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(tmp_path / "run/final")("Is it safe?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (ours(ids) - expected).abs().max() <= 1e-4 * expected.abs().max()


def expect_error(argv: list[str], script, *fragments: str) -> None:
    with pytest.raises((ValueError, OSError)) as caught:
        script.main(argv)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_wrong_settings_are_refused_before_anything_is_loaded(world, tmp_path):
    def arguments(*more):
        return rl_args(world, tmp_path / "run", *more)

    expect_error(arguments("--kl-coef", "-0.1"), train_rl, "--kl-coef")
    alone = arguments("--estimator", "reinforce++-baseline", "--samples-per-prompt", "1")
    expect_error(alone, train_rl, "--samples-per-prompt")
    expect_error(arguments("--minibatches", "9"), train_rl, "--minibatches")
    expect_error(arguments("--truncated", "often"), train_rl, "--truncated", "often")
    expect_error(arguments("--reward-model", "rule:nothing"), train_rl, "rule:math", "rule:refusal")
    expect_error(arguments("--model", "qwen3-8"), train_rl, "qwen3-8b")
    expect_error(arguments("--prompts", str(tmp_path / "none.jsonl")), train_rl, "none.jsonl")
    expect_error(arguments("--max-prompt-tokens", "2"), train_rl, "12 longer than 2 tokens")
    expect_error(arguments("--max-response-tokens", "250"), train_rl, "--max-response-tokens 250", "256 positions")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "Hi"}\n{"prompt": \n')
    expect_error(arguments("--prompts", str(tmp_path / "broken.jsonl")), train_rl, "broken.jsonl, line 2")
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize("flags", [
    "--temperature 1e-40", "--temperature 1e39", "--temperature inf", "--temperature nan", "--temperature 0",
    "--top-p 1.5", "--top-p nan", "--dual-clip 0.5", "--dual-clip 1", "--dual-clip inf", "--reward-clip 2 1",
    "--reward-clip 1 1", "--reward-clip nan 1", "--reward-clip 0 inf", "--gamma 1.1", "--gamma inf", "--lr inf",
    "--lr nan", "--kl-coef nan", "--kl-coef inf", "--clip-low inf", "--clip-high nan", "--truncated nan",
    "--truncated inf", "--steps inf", "--seed nan", "--device tpu", "--tensorboard", "--wandb",
])  # fmt: skip
def test_an_impossible_setting_is_refused_before_anything_is_loaded_and_leaves_no_folder(
    flags, tmp_path, monkeypatch, capsys
):
    for package in ("tensorboard", "torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)  # an import fails, as where it is not installed
    loading = ["--model", str(tmp_path / "nowhere"), "--reward-model", str(tmp_path / "nowhere"), "--prompts", "none"]
    with pytest.raises((ValueError, SystemExit)) as caught:  # argparse prints and exits
        train_rl.main([*loading, "--out", str(tmp_path / "run"), *flags.split()])
    assert flags.split()[0] in str(caught.value) + capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_possible_settings_pass(world):
    given = ["--reward-clip", "-1", "1.5", "--dual-clip", "3", "--temperature", "0.6", "--top-p", "1", "--gamma", "1",
             "--truncated", "-2", "--kl-coef", "0"]  # fmt: skip
    args = rl_flags("").parse_args(rl_args(world, Path("run"), *given))
    train_rl.check(args)
    assert args.truncated == -2 and args.reward_clip == [-1, 1.5]


def test_every_row_is_seen_in_a_single_epoch(world, tmp_path, monkeypatch, capsys):
    write_rows(tmp_path / "rows.jsonl", 7)
    seen, backward = [], train_sft.backward

    def noted(model, batch, *rest):
        seen.extend(tuple(document.response_ids) for document in batch)
        return backward(model, batch, *rest)

    monkeypatch.setattr(train_sft, "backward", noted)
    train_sft.main(sft_args(world, tmp_path / "run", "--data", str(tmp_path / "rows.jsonl"), "--epochs", "1"))
    assert len(set(seen[:7])) == 7
    assert "2 steps of 5: 1.43 passes over the responses" in capsys.readouterr().out
    assert sft_steps(5, 1000, 128) == 39, "STAR-1's own recipe"
    assert sft_steps(1, 95, 64) == 2


@pytest.mark.parametrize("script, arguments, flag", [(train_rl, rl_args, "--prompts"), (train_sft, sft_args, "--data")],
                         ids=["rl", "sft"])  # fmt: skip
def test_a_data_file_that_changed_since_the_start_is_noticed(world, tmp_path, script, arguments, flag):
    path = tmp_path / "rows.jsonl"
    argv = arguments(world, tmp_path / "run", flag, str(path))
    write_rows(path)
    rows = path.read_text()
    for text in (rows, rows.replace("\n", "\n\n")):  # the same rows on other lines are no other data
        path.write_text(text)
        assert run_forked(script, argv)[0] == 0
        shutil.rmtree(tmp_path / "run/final")
    path.write_text(rows.replace("salad", "stew"))
    expect_error(argv, script, f"{path} has changed since {tmp_path / 'run'} began")


@pytest.mark.parametrize("script, arguments, field", [
    (train_rl, rl_args, "question"), (train_sft, sft_args, "response")], ids=["rl", "sft"])  # fmt: skip
def test_a_token_without_an_embedding_is_refused_with_file_and_line(tmp_path, script, arguments, field):
    world = write_world(tmp_path / "world")
    tokenizer = json.loads((world / "policy/tokenizer.json").read_text())
    size = max(token["id"] for token in tokenizer["added_tokens"]) + 1
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | {"id": size, "content": "<new>"})
    (world / "policy/tokenizer.json").write_text(json.dumps(tokenizer))
    lines = (world / "rows.jsonl").read_text().splitlines()
    lines[4] = json.dumps(json.loads(lines[4]) | {field: "Say <new> twice"})
    (world / "rows.jsonl").write_text("\n".join(lines))
    expect_error(arguments(world, tmp_path / "run"), script, "rows.jsonl, line 5", "'<new>'", f"for {size}")
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_script_prints_a_mistake_without_a_traceback(world, tmp_path):
    done = run_script("train_rl.py", *rl_args(world, tmp_path / "run", "--model", "qwen3-9b"))
    assert done.returncode == 1 and "Traceback" not in done.stderr and "near: qwen3-8b" in done.stderr


def test_under_torchrun_the_last_lines_repeat_the_error(world, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    done = run_script(*launcher, "train_sft.py", *sft_args(world, tmp_path / "run", "--data", "no.jsonl"))
    assert done.returncode == 1
    error = "[rank 0] error: there is no file no.jsonl"
    first, box = done.stderr.split("Root Cause", 1)
    assert first.startswith(error) and f"traceback : {error}" in box and "Traceback" not in box


def test_a_run_goes_on_only_with_its_own_settings(world, tmp_path):
    out = tmp_path / "run"
    assert run_forked(train_sft, sft_args(world, out))[0] == 0
    shutil.rmtree(out / "final")
    expect_error(sft_args(world, out, "--lr", "0.5"), train_sft, "--lr was 0.001, is 0.5")
    expect_error(sft_args(world, out, "--steps", "9"), train_sft, "--steps was", f"--model {out}/final --out ANOTHER")
    expect_error(sft_args(world, out, "--resume", "never"), train_sft, "already holds a run")
    assert len(list((out / "checkpoints").iterdir())) == 2, "--keep 2 is the default"


def test_rewards_that_are_not_finite_skip_the_step_and_then_stop_the_run(world, tmp_path, monkeypatch, capsys):
    values = iter([float("nan"), 1.0] + [float("inf")] * 5)

    def reward(conversations, answers):
        bad = next(values)
        return torch.tensor([bad, *[0.5 * i for i in range(1, len(conversations))]])

    monkeypatch.setattr(train_rl, "load_reward", lambda *_, **__: reward)
    with pytest.raises(SystemExit, match="5 steps in a row"):
        train_rl.main(rl_args(world, tmp_path / "run", "--steps", "9", "--no-normalize"))
    rows = rows_of(tmp_path / "run")
    assert [row["policy/skipped"] for row in rows] == [2, 0, 2, 2, 2, 2, 2], "one bad row of eight skips all updates"
    assert rows[0]["reward/mean"] is None, "JSON has no NaN"
    first, second = (load_file(tmp_path / f"run/checkpoints/step-00000{i}/model.safetensors") for i in (5, 6))
    assert all(torch.equal(first[name], second[name]) for name in first), "a skipped step changes no weight"


def test_a_row_that_could_never_be_scored_is_named_before_the_first_rollout(world, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1", "answer": 2}\n{"question": "Prove it."}\n')
    more = ["--reward-model", "rule:math", "--prompts", str(tmp_path / "rows.jsonl")]
    expect_error(rl_args(world, tmp_path / "run", *more), train_rl, "rows.jsonl, line 2", "'answer'")
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize("estimator", ["reinforce++", "reinforce++-baseline"])
def test_a_response_too_long_for_the_reward_model_is_left_out(world, tmp_path, monkeypatch, capsys, estimator):
    """Of rows 0 to 7, two a prompt: one of the first group is unread in step 1, all are in step 2, none in step 3."""
    values = iter([[UNREAD, 1, 2, 3, 4, 5, 6, 7], [UNREAD] * 8, [1.0] * 8])
    batches = []
    real = train_rl.set_advantages
    monkeypatch.setattr(train_rl, "load_reward", lambda *_, **__: lambda *_: torch.tensor(next(values)))
    monkeypatch.setattr(train_rl, "set_advantages", lambda batch, args: batches.append(batch) or real(batch, args))
    train_rl.main(rl_args(world, tmp_path / "run", "--steps", "3", "--estimator", estimator, "--kl-coef", "0"))
    rows = rows_of(tmp_path / "run")
    assert [row["reward/unread"] for row in rows] == [1, 8, 0]
    assert [row["policy/skipped"] for row in rows] == [0, 2, 0], "a step without any reward updates nothing"
    assert [row["reward/mean"] for row in rows] == [4, None, 1]
    assert [row["reward/min"] for row in rows] == [1, None, 1]
    assert batches[0].loss_mask.any(1).tolist() == [False, *[True] * 7], "nothing is learnt from that response"
    firsts = batches[0].advantages[1:, 0].tolist()
    if estimator == "reinforce++-baseline":  # the mean of its group is that of what was read of it
        assert firsts[0] == pytest.approx((firsts[1] + firsts[2]) / 2, abs=1e-6)
    else:
        assert firsts == sorted(firsts)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert ["too long for the reward model" in line for line in lines] == [True, True, False]
    assert "1 too long" in lines[0] and "all rewards equal" in lines[2]


def test_what_cannot_work_is_refused_before_the_policy_is_loaded(world, tmp_path, monkeypatch):
    def loaded(*_):
        raise AssertionError("the policy was loaded")

    monkeypatch.setattr(train_rl, "load_policy", loaded)
    monkeypatch.setattr(train_sft, "load_policy", loaded)
    (tmp_path / "mine.py").write_text("def short(rows, responses):\n    return []\n")
    for flags, message in ((["--eval-every", "5"], "--eval-every asks the tiny world's questions"),
                           (["--max-response-tokens", "99999"], "passes .* positions"),
                           (["--reward-model", f"{tmp_path}/mine.py:short"], "mine.py:short")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            train_rl.main(rl_args(world, tmp_path / "run", *flags))
    words = {"prompt": "Hi", "response": "word " * 2000}
    (tmp_path / "long.jsonl").write_text(json.dumps(words) + "\n")
    for flags, message in ((["--eval-every", "5"], "--eval-every asks the tiny world's questions"),
                           (["--max-tokens", "1"], "no prompt leaves room"),
                           (["--data", f"{tmp_path}/long.jsonl", "--max-tokens", "9999"], "positions")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            train_sft.main(sft_args(world, tmp_path / "run", *flags))


def test_samples_hold_no_number_that_json_lacks():
    episode = Episode([1], [2], row=0, group=0, source=Row([], "row 1"), sampler_logprobs=[0.0], truncated=False,
                      text="", reward=UNREAD, reward_parts={"rm": UNREAD, "rule:math": 1.0})  # fmt: skip
    [row] = sample_rows([episode], 0)
    assert row["reward"] is row["reward/rm"] is None and row["reward/rule:math"] == 1.0
    json.dumps(row, allow_nan=False)


def test_checkpoints_of_steps_that_update_nothing_push_out_no_other(world, tmp_path, monkeypatch):
    good, bad = [float(i) for i in range(8)], [float("nan")] * 8
    values = iter([good, good, bad, bad, good, *[bad] * 9])
    monkeypatch.setattr(train_rl, "load_reward", lambda *_, **__: lambda *_: torch.tensor(next(values)))
    kept = []
    real = RunFolder.save

    def save(run):
        real(run)
        kept.append([int(path.name[5:]) for path in run.checkpoints()])

    monkeypatch.setattr(RunFolder, "save", save)
    with pytest.raises(SystemExit, match="5 steps in a row"):
        train_rl.main(rl_args(world, tmp_path / "run", "--steps", "20", "--keep", "1"))
    assert kept[:5] == [[1], [2], [2, 3], [2, 3, 4], [5]]
    assert kept[5:] == [[5, 6], [5, 6, 7], [5, 6, 7, 8], [5, 6, 7, 8, 9]]


@pytest.mark.parametrize("changed, sign", [
    ({}, None), ({"reward/min": 2.0, "reward/max": 2.0}, "all rewards equal"),
    ({"response/truncated": 1.0}, "all responses cut: raise --max-response-tokens"),
    ({"policy/grad_norm": 0.0}, "gradient exactly 0"), ({"policy/skipped": 2}, "2 updates skipped"),
    ({"policy/grad_norm": 0.0, "policy/skipped": 2}, "2 updates skipped"),
    ({"reward/min": None, "reward/max": None, "reward/unread": 8}, "8 too long for the reward model"),
])
def test_signs_of_a_hopeless_run_stand_in_the_steps_line(changed, sign):
    row = {"step": 1, "reward/min": 0.0, "reward/max": 0.1, "reward/unread": 0, "response/truncated": 0.5,
           "policy/grad_norm": 1e-9, "policy/skipped": 0, "time/step": 1.0, "time/rollout_per_s": 1.0}
    parts = console_line(row | changed, 9).split(" | ")
    assert parts[9:] == ([] if sign is None else [sign])


def test_options_of_the_loop_run_and_differ(world, tmp_path):
    """Every estimator, reduction and truncation rule gives its own weights."""
    variants = {
        "plain": [],
        "baseline": ["--estimator", "reinforce++-baseline"],
        "sequence": ["--reduction", "sequence"],
        "masked": ["--truncated", "mask"],
        "fixed": ["--truncated", "-3"],
        "no-kl": ["--kl-coef", "0"],
        "hot": ["--temperature", "1.5"],
        "raw": ["--no-normalize"],
        "refusal": ["--reward-model", "rule:refusal"],
        "twice": ["--epochs", "2", "--dual-clip", "3"],
    }
    norms = {}
    for name, more in variants.items():
        long = ["--steps", "2", "--max-response-tokens", "60"]  # long enough for some to end by themselves
        assert run_forked(train_rl, rl_args(world, tmp_path / name, *long, *more))[0] == 0, name
        final = load_file(tmp_path / name / "final/model.safetensors")
        norms[name] = sum(tensor.double().abs().sum().item() for tensor in final.values())
        first, row = rows_of(tmp_path / name)
        assert ("kl/k1" in row) == (name != "no-kl")
        assert abs(first.get("kl/k1", 0)) < 1e-6, "before the first update the policy is the reference"
        assert name in ("no-kl", "refusal") or abs(row["kl/k1"]) > 1e-4, "the reference follows the policy"
        assert row["mismatch/mean"] < 1e-5 and row["mismatch/max"] < 1e-4, "the sampler has the trainer's log-probs"
    assert len({round(value, 9) for value in norms.values()}) == len(norms), norms


@pytest.mark.parametrize("temperature", ["1", "1.5"])
def test_the_samplers_logprobs_serve_as_the_trainers(world, tmp_path, temperature):
    """One forward pass less, the same run within rounding; the trainer scores the policy before the update."""
    rows, weights = {}, {}
    for whose in ("sampler", "trainer"):
        options = ["--steps", "2", "--temperature", temperature, "--old-logprobs", whose]
        assert run_forked(train_rl, rl_args(world, tmp_path / whose, *options))[0] == 0
        rows[whose] = rows_of(tmp_path / whose)
        weights[whose] = load_file(tmp_path / whose / "final/model.safetensors")
    for name, tensor in weights["trainer"].items():
        torch.testing.assert_close(weights["sampler"][name], tensor, atol=1e-5, rtol=1e-4)
    for one, other in zip(rows["sampler"], rows["trainer"], strict=True):
        assert one.keys() == other.keys()
        assert one["mismatch/max"] < 1e-4, "only rows that no update had touched are compared"
        for name in ("kl/k1", "kl/k3", "policy/loss", "policy/grad_norm", "policy/ppo_kl"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), name
        # The entropies are those of some rows of the same rollout.
        for name in ("policy/entropy", "reflection/entropy"):
            if other[name] is not None and one[name] is not None:
                assert one[name] == pytest.approx(other[name], rel=0.2), name


def test_tied_embeddings_stay_tied_through_training_and_resume(tmp_path):
    world = write_world(tmp_path / "world", tie_word_embeddings=True)
    run_forked(train_rl, rl_args(world, tmp_path / "run"), kill_at=100)
    assert list((tmp_path / "run/checkpoints").glob("step-*")), "killed with something to resume"
    run_forked(train_rl, rl_args(world, tmp_path / "run"))
    assert "lm_head.weight" not in load_file(tmp_path / "run/final/model.safetensors")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run/final", dtype=torch.float32)
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        ours, expected = load_model(tmp_path / "run/final", dtype=torch.float32)(ids), theirs(ids).logits
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_reward_for_a_letter_makes_the_policy_write_it(tmp_path, monkeypatch):
    """Learning, end to end, in the direction that a sign error would turn."""
    world = write_world(tmp_path / "world")

    def reward(conversations, answers):
        return torch.tensor([float(c[-1]["content"].count("e")) for c in conversations])

    monkeypatch.setattr(train_rl, "load_reward", lambda *_, **__: reward)
    train_rl.main(rl_args(world, tmp_path / "run", "--steps", "12", "--prompts-per-step", "16", "--lr", "1e-2"))
    means = [row["reward/mean"] for row in rows_of(tmp_path / "run")]
    assert sum(means[-3:]) > 2 * sum(means[:3]) + 1, means


def test_several_rewards_one_of_them_a_function_of_ones_own(world, tmp_path):
    """The command of docs/your-own.md, through the script: each is logged, and the data's own fields arrive."""
    (tmp_path / "mine.py").write_text(
        "def shorter(conversations, rows):\n"
        "    return [-len(c[-1]['content']) * row['weight'] for c, row in zip(conversations, rows)]\n"
    )
    rows = [{"question": f"What is {i}?", "weight": 0.25} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = ["--reward-model", "rule:refusal", f"{tmp_path}/mine.py:shorter", "--reward-weights", "3", "0.5",
            "--prompts", str(tmp_path / "data.jsonl"), "--steps", "1"]  # fmt: skip
    train_rl.main(rl_args(world, tmp_path / "run", *more))
    [row] = rows_of(tmp_path / "run")
    assert row["reward/shorter"] < 0 <= row["reward/rule_refusal"]
    assert row["reward/mean"] == pytest.approx(3 * row["reward/rule_refusal"] + 0.5 * row["reward/shorter"])
    for sample in rows_of(tmp_path / "run", "samples.jsonl"):
        assert sample["reward/shorter"] == -0.25 * len(sample["response"])


def test_gated_offline_and_missing_data_are_explained(tmp_path):
    environment = {k: v for k, v in os.environ.items()} | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = run_script("train_sft.py", "--model", "qwen3-0.6b", "--out", str(tmp_path / "run"), environment=environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "HF_HUB_OFFLINE" in done.stderr


def test_reward_model_as_policy_and_policy_as_reward_model_are_refused(world, tmp_path):
    expect_error(rl_args(world, tmp_path / "a", "--model", str(world / "reward")), train_rl, "reward model")
    expect_error(rl_args(world, tmp_path / "b", "--reward-model", str(world / "policy")), train_rl)
