"""The run folder: one writer, what is no run, damaged files, a full disk, and how a run that was stopped ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import ROOT, expect_error, rows_of, run_script, sft_args
from world import write_world

import eval as evaluation
import train_rl
import train_sft
from nanosafe.io import locks
from nanosafe.io.files import write_atomic
from nanosafe.io.locks import hold
from nanosafe.model.weights import save_model
from nanosafe.names import load_model
from nanosafe.parallel import Ranks
from nanosafe.train.cli import readable_errors
from nanosafe.train.run_folder import RunFolder

ENVIRONMENT = dict(os.environ) | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    """A run of four steps with its last two checkpoints."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train_sft.main(sft_args(world, out, "--steps", "4"))
    return out


@pytest.fixture
def cut(finished, tmp_path) -> Path:
    """The same run, stopped after its third step."""
    out = shutil.copytree(finished, tmp_path / "cut")
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoints/step-000004")
    return out


def content(folder: Path) -> dict[str, bytes]:
    """Of every file but the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != locks.LOCK]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def until_step(process: subprocess.Popen, step: int) -> None:
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            return
    raise AssertionError(f"the run ended before step {step}")


# One writer.


def test_of_two_starts_on_one_folder_one_goes_on_and_the_other_is_refused(world, tmp_path):
    out, command = tmp_path / "run", [sys.executable, "train_sft.py"]
    arguments = sft_args(world, out, "--steps", "40", "--save-every", "3")
    first = subprocess.Popen([*command, *arguments], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    until_step(first, 1)
    first.send_signal(signal.SIGSTOP)  # so that it still runs when the second one looks
    second = run_script("train_sft.py", *arguments)
    first.send_signal(signal.SIGCONT)
    rest = first.communicate()[0]
    assert second.returncode == 1 and f"is being written by process {first.pid} on " in second.stderr
    assert first.returncode == 0 and "done:" in rest
    assert [row["step"] for row in rows_of(out)] == list(range(1, 41))
    assert (out / "final/config.json").exists()


@contextmanager
def held_by_another(folder: Path) -> Iterator[int]:
    """Another process holds the folder's lock until it is killed; -> its id."""
    source, sink = os.pipe()
    process = os.fork()
    if process == 0:
        lock = hold(folder)
        os.write(sink, lock.holder().encode())
        time.sleep(60)
        os._exit(0)
    os.read(source, 100)
    try:
        yield process
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path):
    with held_by_another(tmp_path) as process, pytest.raises(ValueError, match=f"written by process {process} on "):
        hold(tmp_path)
    lock = hold(tmp_path)
    assert hold(tmp_path) is lock, "a process does not shut itself out"


# What is no run, or another one.


@pytest.mark.parametrize("files", [
    {"model.safetensors": "weights", "config.json": "{}"}, {"metrics.jsonl": '{"step": 9}\n'},
    {"args.json": '{"lr": 1}', "metrics.jsonl": '{"step": 9}\n'}, {"notes/today.md": "x"},
    {"args.json": '{"save_every": 5, "keep": 1}', "checkpoints/best/weights.bin": "x"},
], ids=lambda files: next(iter(files)))  # fmt: skip
def test_a_folder_of_other_things_is_left_as_it_is(world, tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    expect_error(sft_args(world, tmp_path), train_sft, str(tmp_path), "set another --out")
    assert content(tmp_path) == {name: text.encode() for name, text in files.items()}
    assert not (tmp_path / locks.LOCK).exists()


def test_a_log_may_lie_in_the_folder_before_the_run(tmp_path):
    (tmp_path / "log.txt").write_text("nohup")
    (tmp_path / "job.lock").write_text("")
    args = Namespace(out=str(tmp_path), dtype="float32", resume="auto", save_every=1, keep=1, date=None)
    RunFolder(args, Ranks("cpu"))
    assert (tmp_path / "args.json").exists()


def test_a_finished_run_without_checkpoints_still_compares_flags(world, finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(out / "checkpoints")
    expect_error(sft_args(world, out, "--steps", "4", "--lr", "0.5"), train_sft, "--lr was 0.001, is 0.5")
    expect_error(sft_args(world, out, "--steps", "4", "--resume", "never"), train_sft, "already holds a run")
    train_sft.main(sft_args(world, out, "--steps", "4"))
    assert "the run is complete" in capsys.readouterr().out


@pytest.mark.parametrize("script, flag", [
    (train_sft, "--model"), (train_rl, "--model"), (train_rl, "--reward-model"), (evaluation, "--model"),
    (evaluation, "--compare"), (evaluation, "--reward-model"), (train_rl, "--plan"),
], ids=str)  # fmt: skip
def test_a_run_folder_in_place_of_a_model_asks_for_its_final(world, finished, cut, tmp_path, script, flag):
    more = {"--plan": ["--plan"], "--reward-model": ["--model", str(finished / "final")]}.get(flag, [])
    for folder, meant in ((finished, finished / "final"), (cut, cut / "checkpoints/step-000003")):
        arguments = [flag.replace("--plan", "--model"), str(folder), "--out", str(tmp_path / "out"), *more]
        data = {train_rl: "--prompts", train_sft: "--data", evaluation: "--memorization"}[script]
        arguments += [data, str(world / "rows.jsonl")]
        expect_error(arguments, script, f"{folder} is a run folder, no model: did you mean {meant}?")


def test_chat_asks_it_too(finished, capfd):
    from nanosafe.sampler import __main__ as chat

    with pytest.raises(FileNotFoundError, match="did you mean .*/run/final"):
        chat.talk(chat.flags().parse_args(["--model", str(finished)]))


# Damage.


def drop(path: Path, name: str) -> None:
    tensors = load_file(path)
    del tensors[next(key for key in tensors if key.startswith(name))]
    save_file(tensors, path)


def reshape(path: Path) -> None:
    tensors = load_file(path)
    name = next(key for key in tensors if key.startswith("exp_avg/"))
    save_file(tensors | {name: torch.zeros(3)}, path)


STATE, OPTIMIZER = "checkpoints/step-000003/trainer/state.json", "checkpoints/step-000003/trainer/optimizer.safetensors"


@pytest.mark.parametrize("name, damage, fragments", [
    ("metrics.jsonl", lambda p: p.write_text('{"step": 1}\n{"step": 2\n{"step": 3}\n'), ["line 2"]),
    ("metrics.jsonl", lambda p: p.write_text('{"step": 1}\n7\n'), ["line 2"]),
    ("samples.jsonl", lambda p: p.write_text('{"step": "one"}\n'), ["line 1"]),
    ("args.json", lambda p: p.write_text("[]"), ["set another --out"]),
    (STATE, lambda p: p.unlink(), ["missing"]),
    (STATE, lambda p: p.write_text('{"step": '), ["not valid JSON"]),
    (STATE, lambda p: p.write_text('{"step": 2, "skipped": 0}'), ["it is of step 2"]),
    (STATE, lambda p: p.write_text('{"step": 3, "skipped": null}'), ["'skipped'"]),
    (OPTIMIZER, lambda p: p.unlink(), ["missing"]),
    (OPTIMIZER, lambda p: p.write_bytes(p.read_bytes()[:-9]), ["not a whole safetensors file"]),
    (OPTIMIZER, lambda p: drop(p, "exp_avg_sq/"), ["does not fit", ": exp_avg_sq/"]),
    (OPTIMIZER, reshape, ["does not fit", ": exp_avg/"]),
])  # fmt: skip
def test_a_damaged_file_is_named_with_its_cure_and_nothing_is_changed(world, cut, name, damage, fragments):
    damage(cut / name)
    before = content(cut)
    newest = str(cut / "checkpoints/step-000003")
    cures = [f"delete {newest}, and the same command goes on"] if name in (STATE, OPTIMIZER) else [Path(name).name]
    expect_error(sft_args(world, cut, "--steps", "4"), train_sft, *fragments, *cures, Path(name).name)
    if name != OPTIMIZER:  # it is read when the run has begun
        assert content(cut) == before


# The end.


def test_ranks_end_when_their_torchrun_is_killed(tmp_path):
    """Rank 0 waits for rank 1, which never comes: without torchrun nobody else would end either."""
    code = ("import os, time; from nanosafe.parallel import Ranks; ranks = Ranks('cpu')\n"
            "os.write(1, b'up\\n'); ranks.wait() if ranks.main else time.sleep(60)")
    (tmp_path / "waiting.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launcher = subprocess.Popen([*command, str(tmp_path / "waiting.py")], env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
                                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
    assert [launcher.stdout.readline() for _ in range(2)] == [b"up\n", b"up\n"]
    launcher.kill()
    launcher.communicate(timeout=20)  # until no process has the pipe any more


def test_control_characters_in_an_error_are_shown_and_not_sent(capfd):
    child = os.fork()
    if child == 0:  # the script ends its process
        with readable_errors():
            raise ValueError("field '\x1b]0;owned\x07\x9b2J' of\nmodel.json, \u202e\u00e9")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert "error: field '\\x1b]0;owned\\x07\\x9b2J' of\nmodel.json, \\u202e\u00e9\n" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_was_stopped_says_so_by_its_exit_code(world, cut, monkeypatch, number):
    backward = train_sft.backward
    monkeypatch.setattr(train_sft, "backward", lambda *a: (os.kill(os.getpid(), number), backward(*a))[1])
    arguments = sft_args(world, cut.parent / "run", "--steps", "4")
    with pytest.raises(SystemExit) as caught:
        train_sft.main(arguments)
    assert caught.value.code == 128 + number
    assert [path.name for path in (cut.parent / "run/checkpoints").iterdir()] == ["step-000001"]


def test_a_full_disk_names_the_file_and_leaves_no_half_folder(finished, tmp_path, monkeypatch):
    out = tmp_path / "run"
    args = Namespace(save_dtype=None, out=str(out), dtype="float32", resume="auto", save_every=1, keep=1, date=None)
    run = RunFolder(args, Ranks("cpu"))
    run.state, run.total = {"step": 1, "skipped": 0, "base_dtype": "float32"}, 1
    run.model, run.tokenizer = load_model(finished / "final", dtype=torch.float32), None

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*/args.json'"):
            write_atomic(out / "args.json", b"{}")
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*metrics.jsonl'"):
            run.log("metrics.jsonl", [{"step": 1}])
        with pytest.raises(OSError, match=r"saving .*/final failed .*No space left on device: '.*\.partial-final/.*'"):
            run.finish()
    assert not list(out.rglob(".partial*"))


# The type of final/.


def types(folder: Path) -> tuple[str, set[torch.dtype]]:
    """What config.json says, and what the files hold."""
    tensors = load_file(folder / "model.safetensors")
    return json.loads((folder / "config.json").read_text())["dtype"], {t.dtype for t in tensors.values()}


def test_final_is_in_the_type_of_the_base_and_checkpoints_are_exact(world, finished, tmp_path):
    shutil.copytree(world, tmp_path / "world")
    base, run, asked = tmp_path / "world/policy", tmp_path / "run", tmp_path / "asked"
    save_model(load_model(base, dtype=torch.bfloat16), base)
    assert types(base) == ("bfloat16", {torch.bfloat16})
    arguments = sft_args(tmp_path / "world", run, "--steps", "2")
    train_sft.main(arguments)
    last = run / "checkpoints/step-000002"
    assert types(last) == ("float32", {torch.float32}) and types(run / "final") == ("bfloat16", {torch.bfloat16})
    exact, final = (load_file(folder / "model.safetensors") for folder in (last, run / "final"))
    assert all(torch.equal(exact[name].bfloat16(), tensor) for name, tensor in final.items())
    assert any(not torch.equal(exact[name], tensor.float()) for name, tensor in final.items())

    shutil.rmtree(run / "final")  # a resumed run, which loads a float32 checkpoint, remembers
    shutil.rmtree(last)
    train_sft.main(arguments)
    assert types(last)[0] == "float32" and types(run / "final") == ("bfloat16", {torch.bfloat16})
    again = load_file(run / "final/model.safetensors")
    assert all(torch.equal(final[name], tensor) for name, tensor in again.items())

    train_sft.main(sft_args(tmp_path / "world", asked, "--steps", "2", "--save-dtype", "float32"))
    assert types(asked / "final") == ("float32", {torch.float32})
    whole = load_file(asked / "final/model.safetensors")
    assert all(torch.equal(exact[name], tensor) for name, tensor in whole.items())
    assert types(finished / "final") == ("float32", {torch.float32}), "of a float32 base"


def test_final_of_a_base_whose_config_names_no_type_is_in_the_type_of_training(world, tmp_path):
    shutil.copytree(world, tmp_path / "world")
    path = tmp_path / "world/policy/config.json"
    config = json.loads(path.read_text())
    del config["dtype"]  # the name that this version of transformers writes
    path.write_text(json.dumps(config))
    train_sft.main(sft_args(tmp_path / "world", tmp_path / "run", "--steps", "1", "--dtype", "bfloat16"))
    tensors = load_file(tmp_path / "run/final/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
