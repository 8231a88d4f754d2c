"""What a training script reports of its steps beside the run folder: seconds, memory, TensorBoard, Weights & Biases."""

import os
import resource
import sys
import time
from argparse import Namespace
from importlib import import_module

import torch

from nanosafe.parallel import Ranks

TRACKERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}  # flag and package, module


def require_trackers(args: Namespace) -> None:
    """Raise ValueError if --tensorboard or --wandb is set without the package."""
    for name, module in TRACKERS.items():
        try:
            if getattr(args, name):
                import_module(module)
        except ImportError:
            raise ValueError(f"--{name} needs a package that is not there: pip install {name}") from None


class Tracker:
    """Metrics to TensorBoard and Weights & Biases where asked for; otherwise its calls do nothing."""

    def __init__(self, args: Namespace, ranks: Ranks):
        self.writer = self.run = None
        if args.tensorboard and ranks.main:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(os.path.join(args.out, "tensorboard"))
        if args.wandb and ranks.main:
            import wandb

            self.run = wandb.init(project="nanosafe", dir=args.out, config=vars(args))

    def log(self, row: dict) -> None:
        numbers = {name: value for name, value in row.items() if value is not None}
        step = numbers.pop("step")
        if self.writer is not None:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, step)
        if self.run is not None:
            self.run.log(numbers, step=step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        if self.run is not None:
            self.run.finish()


class Clock:
    """Seconds of each phase of a step, and the memory of its peak."""

    def __init__(self, ranks: Ranks):
        self.on_cuda = ranks.device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self.start = self.last = time.perf_counter()
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()

    def lap(self, phase: str) -> None:
        """What was done since the last lap was `phase`."""
        if self.on_cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] = now - self.last
        self.last = now

    def metrics(self, **tokens: int) -> dict[str, float]:
        """time/PHASE in seconds, time/PHASE_per_s of phases with a count, memory/peak_gb of this rank."""
        metrics = {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}
        for phase, count in tokens.items():
            metrics[f"time/{phase}_per_s"] = count / self.seconds[phase]
        return metrics | {"time/step": self.last - self.start, "memory/peak_gb": self._peak_bytes() / 1e9}

    def _peak_bytes(self) -> int:
        if self.on_cuda:
            return torch.cuda.max_memory_allocated()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux KiB
