"""What this process has: its rank, cores, and the host's memory within the limits of a container or job.

And what it tells PyTorch by the environment.
"""

import os
import platform
from pathlib import Path

MAIN_RANK = os.environ.get("RANK", "0") == "0"  # torchrun sets it; the other ranks show no progress bars
THREAD_SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # of libgomp, PyTorch's OpenMP on Linux
# Rounds of about 26 ns that a thread waits awake for another, about as long as the pauses between small products last;
# then it sleeps. libgomp's own 300,000 (8 ms) suit a machine that does nothing else: where another process holds the
# core of one thread, the others wait awake through its turns, and keep it from theirs, at every single product.
SPINS = 2000
# The two layouts of cgroups, by the controllers that /proc/self/cgroup names: where they are mounted,
# the files of limit and use, and the line of memory.stat that counts files the kernel can drop.
LAYOUTS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
               "total_inactive_file"),
}  # fmt: skip


def prepare_torch() -> None:
    """Set what PyTorch and its threads read from the environment when they are loaded; what the user has set stays."""
    # Responses of all lengths leave a GPU's memory in pieces otherwise.
    older_name = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", older_name)
    # NCCL would take a buffer of a captured exchange for one piece of memory, which expandable segments are not.
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    # To wait by another policy than to change the number of threads: on that, the order of sums may depend.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def thread_settings() -> str:
    """What the environment tells the threads, as NAME VALUE, NAME VALUE."""
    return ", ".join(f"{name} {os.environ[name]}" for name in THREAD_SETTINGS if name in os.environ)


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name(root: Path = Path("/")) -> str:
    """The machine's processor, with what tells its generations apart: virtual machines name all of them alike."""
    cores, fields = 0, {}  # the fields of the last core
    for line in _lines(root / "proc/cpuinfo"):
        field, _, value = line.partition(":")
        fields[field.strip()] = value.strip()
        cores += field.strip() == "model name"
    if not cores:
        return platform.processor() or platform.machine()
    name = f"{cores} cores of {fields['model name']}"
    if "cpu family" in fields:  # of x86-64
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name


def host_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Bytes of all memory, and of what is free without swapping; beyond Linux all of it counts as free."""
    kernel = _numbers(root / "proc/meminfo")
    if "MemAvailable:" not in kernel:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total, total
    total, free = kernel["MemTotal:"] * 1024, kernel["MemAvailable:"] * 1024
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers not in LAYOUTS:
            continue
        mount, limit_file, use_file, cached = LAYOUTS[controllers]
        group = root / mount / path.lstrip("/")
        for folder in (group, *group.parents):  # the limits of the groups around it hold too
            limit, use = _lines(folder / limit_file), _lines(folder / use_file)
            if use and limit and limit[0].isdigit():  # a limit may be "max"
                used = int(use[0]) - _numbers(folder / "memory.stat").get(cached, 0)
                total = min(total, int(limit[0]))
                free = min(free, int(limit[0]) - used)
    return total, max(0, free)


def _numbers(path: Path) -> dict[str, int]:
    """The numbers of a file with lines NAME NUMBER, perhaps with a unit."""
    numbers = {}
    for line in _lines(path):
        name, number, *_ = line.split()
        numbers[name] = int(number)
    return numbers


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []
