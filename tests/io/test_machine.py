"""Free memory, against /proc and cgroup files written by hand; what PyTorch finds in the environment."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from nanosafe.io.machine import cpu_name, host_memory

ROOT = Path(__file__).parents[2]
GIB = 2**30
KERNEL = {"proc/meminfo": "MemTotal: 67108864 kB\nMemFree: 1048576 kB\nMemAvailable: 33554432 kB"}  # 64, 1, 32 GiB
JOB = "sys/fs/cgroup/job/"
V1 = "sys/fs/cgroup/memory/"


def write(root: Path, files: dict[str, str | int]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


@pytest.mark.parametrize("cgroups, total, free", [
    ({}, 64, 32),  # what the page cache holds is free too
    ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": 8 * GIB, "sys/fs/cgroup/memory.current": 6 * GIB,
      "sys/fs/cgroup/memory.stat": f"anon 5\ninactive_file {GIB}"}, 8, 3),  # cached files can be dropped
    ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/memory.current": 6 * GIB}, 64, 32),
    ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": 4 * GIB, "sys/fs/cgroup/memory.current": 5 * GIB}, 4, 0),
    ({"proc/self/cgroup": "0::/job/step", f"{JOB}step/memory.max": "max", f"{JOB}step/memory.current": 2 * GIB,
      f"{JOB}memory.max": 16 * GIB, f"{JOB}memory.current": 9 * GIB}, 16, 7),  # the limit of the group around it
    ({"proc/self/cgroup": "3:cpu:/\n4:memory:/docker/abc\n0::/", f"{V1}memory.limit_in_bytes": 10 * GIB,
      f"{V1}memory.usage_in_bytes": 4 * GIB, f"{V1}memory.stat": f"total_inactive_file {2 * GIB}"}, 10, 8),
    ({"proc/self/cgroup": "4:memory:/", f"{V1}memory.limit_in_bytes": 2**63 - 4096,
      f"{V1}memory.usage_in_bytes": 4 * GIB}, 64, 32),
])  # fmt: skip
def test_free_memory_is_what_the_kernel_gives_within_the_limits_of_the_cgroups(cgroups, total, free, tmp_path):
    assert host_memory(write(tmp_path, KERNEL | cgroups)) == (total * GIB, free * GIB)


def test_a_processor_is_named_with_its_generation(tmp_path):
    core = "processor : {}\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n"
    info = write(tmp_path, {"proc/cpuinfo": core.format(0) + "\n" + core.format(1)})
    assert cpu_name(info) == "2 cores of AMD EPYC (family 25, model 17)"
    assert cpu_name(tmp_path / "elsewhere") in (platform.processor(), platform.machine())


def test_without_proc_all_memory_counts(tmp_path):
    total, free = host_memory(tmp_path)
    assert total == free > GIB // 4


def test_the_machine_that_runs_this_has_free_memory():
    total, free = host_memory()
    assert 0 < free <= total


@pytest.mark.parametrize("program", [
    "train_rl.py", "train_sft.py", "eval.py", "-mnanosafe.sampler --model tiny", "-mtrain_rl"])
@pytest.mark.parametrize("given, expected", [
    ({}, "expandable_segments:True 2000 0"),
    ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native", "GOMP_SPINCOUNT": "7", "NCCL_GRAPH_REGISTER": "1"},
     "backend:native 7 1"),
    ({"OMP_WAIT_POLICY": "active", "OMP_NUM_THREADS": "2"}, "expandable_segments:True None 0"),
])  # fmt: skip
def test_programs_set_the_environment_before_torch_is_there(program, given, expected, tmp_path):
    names = ["PYTORCH_ALLOC_CONF", "GOMP_SPINCOUNT", "NCCL_GRAPH_REGISTER"]
    (tmp_path / "torch.py").write_text(f"import os\nprint(*map(os.environ.get, {names}))\nraise SystemExit\n")
    done = subprocess.run([sys.executable, *program.split()], cwd=ROOT, env={"PYTHONPATH": str(tmp_path), **given},
                          capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr
