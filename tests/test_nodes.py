"""Several nodes: two torchrun agents on this machine that meet over the loopback, each with a disk of its own."""

import os
import re
import shutil
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from small_tiny import shrink
from test_train import ROOT, rl_args, rows_of, without_clock
from world import write_world

import train_rl
from nanosafe.io import locks
from nanosafe.parallel import Ranks
from nanosafe.tiny import build
from nanosafe.train.cli import readable_errors

WARNING = "warning: --rollout-shards 2 does not divide the 1 processes of a node"


def flags(world: Path, out: Path) -> list[str]:
    """Two steps in which both processes sample together, and share the reference and the reward model."""
    return rl_args(world, out, "--steps", "2", "--device", "cpu", "--rollout-shards", "2", "--shard-frozen")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def two_agents(folder: Path, *command: str) -> list[subprocess.CompletedProcess]:
    """The same torchrun command on two nodes of one process, as docs/training.md has it."""
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d",
                f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1"]  # fmt: skip
    agents = []
    for node in range(2):
        home = folder / f"node{node}"
        home.mkdir()
        agents.append(subprocess.Popen(
            [sys.executable, *launcher, *command], cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NANOSAFE_CACHE": str(home / "cache")},
        ))  # fmt: skip
    done = []
    for agent in agents:
        out, err = agent.communicate(timeout=240)
        done.append(subprocess.CompletedProcess(agent.args, agent.returncode, out, err))
    return done


class Node(NamedTuple):
    home: Path
    codes: list[int]  # of its processes
    output: str  # of all of them


def forked(nodes: int, processes: int, folder: Path, work: Callable[[], None]) -> list[Node]:
    """work() in processes that are told what torchrun would tell them; forked, since importing torch takes seconds."""
    homes = [folder / f"node{node}" for node in range(nodes)]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(nodes * processes)}
    children = []
    for rank in range(nodes * processes):
        home, local_rank = homes[rank // processes], rank % processes
        home.mkdir(exist_ok=True)
        pid = os.fork()
        if pid:
            children.append(pid)
            continue
        log = os.open(home / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.chdir(home)
        torch.set_num_threads(1)  # the parent's worker threads do not exist here
        os.environ.pop("OMP_NUM_THREADS", None)  # by which Ranks would start some
        os.environ |= meeting | {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(processes),
                                 "NANOSAFE_CACHE": str(home / "cache")}  # fmt: skip
        try:
            with readable_errors():
                work()
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(0)
        except BaseException:  # a child must never return into pytest
            traceback.print_exc()
            os._exit(2)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    found = []
    for node, home in enumerate(homes):
        found.append(Node(home, codes[node * processes : (node + 1) * processes], (home / "log").read_text()))
    return found


def assert_close(row: dict, expected: dict) -> None:
    assert row.keys() == expected.keys()
    for name, value in expected.items():
        assert row[name] == (None if value is None else pytest.approx(value, rel=1e-5, abs=1e-6)), name


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def two_nodes(world, tmp_path_factory) -> Path:
    """The run folder of two agents, which share it."""
    folder = tmp_path_factory.mktemp("nodes")
    done = two_agents(folder, str(ROOT / "train_rl.py"), *flags(world, folder / "run"))
    assert [agent.returncode for agent in done] == [0, 0], done
    # One of the two holds rank 0: it alone talks, and it alone writes.
    assert sorted(agent.stdout.count("done: ") for agent in done) == [0, 1]
    assert sorted(agent.stdout.count(WARNING) for agent in done) == [0, 1]
    return folder / "run"


def test_two_nodes_train_as_one_node_with_two_processes(world, two_nodes, tmp_path):
    [node] = forked(1, 2, tmp_path, lambda: train_rl.main(flags(world, tmp_path / "run")))
    assert node.codes == [0, 0], node.output
    assert "does not divide" not in node.output
    ours, theirs = (without_clock(rows_of(run)) for run in (two_nodes, tmp_path / "run"))
    assert [row["step"] for row in ours] == [1, 2]
    for row, expected in zip(ours, theirs, strict=True):
        assert_close(row, expected)
    texts, expected_texts = (rows_of(run, "samples.jsonl") for run in (two_nodes, tmp_path / "run"))
    assert len(texts) > 0 and [row["response"] for row in texts] == [row["response"] for row in expected_texts]


def test_a_run_of_two_nodes_goes_on_with_one(world, two_nodes, tmp_path):
    out = shutil.copytree(two_nodes, tmp_path / "run")
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoints/step-000002")
    train_rl.main(rl_args(world, out, "--steps", "2", "--device", "cpu"))
    ours, theirs = (without_clock(rows_of(run)) for run in (out, two_nodes))
    assert len(ours) == 2 and ours[0] == theirs[0]
    assert_close(ours[1], theirs[1])
    a, b = (load_file(run / "final/model.safetensors") for run in (out, two_nodes))
    assert all((a[name] - b[name]).abs().max() < 1e-5 for name in a)


def test_a_run_folder_that_the_nodes_do_not_share_is_refused_on_each(world, tmp_path):
    arguments = rl_args(world, Path("run"), "--device", "cpu")
    first, second = forked(2, 1, tmp_path, lambda: train_rl.main(arguments))
    host = socket.gethostname()
    expected = (rf"error: {second.home}/run on {host} is not the folder that process \d+ on {host} writes to: "
                "put --out on a file system that all nodes share")
    for node in (first, second):
        assert node.codes == [1] and "Traceback" not in node.output, node.output
        assert re.search(expected, node.output), node.output
    assert os.listdir(first.home / "run") == [locks.LOCK] and not (second.home / "run").exists()


def test_each_node_fills_its_own_cache_by_one_process(tmp_path, monkeypatch):
    shrink(monkeypatch)

    def look() -> None:
        ranks = Ranks("cpu")
        with ranks.local_main_first():
            print("found", build.tiny_checkpoint("tiny-reward"))

    for node in forked(2, 2, tmp_path, look):
        assert node.codes == [0, 0] and node.output.count(f"found {node.home}/cache/tiny-reward") == 2, node.output
        assert node.output.count("building tiny-reward") == 1
        assert "waiting for" not in node.output, "two looked at the same time"


class OtherNode:
    """The second of two ranks; the main rank is process 1 on a host that is called first."""

    main = False

    def __init__(self):
        self.of_main = [["process 1 on first"], []]  # who writes; which hosts see another folder

    def gather(self, items: list) -> list:
        return self.of_main.pop(0) + items


@pytest.mark.parametrize("text", [None, b"process 2 on first", b"\xff\xfe"])
def test_a_lock_file_of_another_run_is_no_sign_of_a_shared_folder(tmp_path, text):
    if text is not None:
        (tmp_path / locks.LOCK).write_bytes(text)
    expected = f"{tmp_path} on {socket.gethostname()} is not the folder that process 1 on first writes to: put --out"
    with pytest.raises(ValueError, match=re.escape(expected)):
        locks.hold_shared(tmp_path, OtherNode())
    (tmp_path / locks.LOCK).write_bytes(b"process 1 on first")
    assert locks.hold_shared(tmp_path, OtherNode()) is None, "it is shared; the main rank holds the lock"
