"""The run folder: what a run writes while it goes, and how it goes on after being stopped at any moment.

    args.json  metrics.jsonl  samples.jsonl
    checkpoints/step-000010/   an official-layout model folder with trainer/ inside
    final/                     an official-layout model folder, there when the run is complete

A row of metrics is on disk before the checkpoint that covers it appears, and a checkpoint appears whole, by one rename.
So the newest checkpoint decides everything: resuming cuts the row files back to its step and goes on from there.
"""

import json
import math
import os
import shutil
import signal
from argparse import Namespace
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

import torch

from nanosafe.config import read_json
from nanosafe.data import Row, digest
from nanosafe.distributed import Ranks
from nanosafe.model import Decoder
from nanosafe.optim import Optimizer
from nanosafe.tokenizer import Tokenizer
from nanosafe.weights import StoredTensors, save_model, save_tensors, staged, sync, write_atomic

# Flags that may differ between a run and its continuation: none of them changes a computed number.
FREE_FLAGS = {"out", "resume", "save_every", "keep", "tensorboard", "wandb", "device"}
MAX_SKIPPED_STEPS = 5  # steps in a row without an update, after which something is broken rather than unlucky


class RunFolder:
    """`args.out`. Every rank calls every method; rank 0 alone writes."""

    def __init__(self, args: Namespace, ranks: Ranks):
        """Open or make the folder. Raises ValueError if it holds a run that `args` do not continue."""
        self.args, self.ranks, self.out = args, ranks, Path(args.out)
        self.dtype = getattr(torch, args.dtype)  # of the weights in the files; what is finer is the optimizer's
        self.requested = self.stopping = False
        found = self.checkpoints()
        if found and args.resume == "never":
            raise ValueError(f"{self.out} already holds a run: use --resume auto to go on, or another --out")
        if found:
            old = read_json(self.out / "args.json")
            args.date = args.date or old.get("date")
            changed = [
                f"--{name.replace('_', '-')} was {old.get(name)!r}, is {value!r}"
                for name, value in vars(args).items()
                if name not in FREE_FLAGS and old.get(name) != value
            ]
            if changed:
                raise ValueError(f"{self.out} holds another run ({'; '.join(changed)}): repeat its flags or set --out")
        # One day for all ranks; and that every rank has read the folder before rank 0 changes it.
        args.date = args.date or ranks.gather([date.today().isoformat()])[0]
        ranks.wait()
        self.resumed = found[-1] if found else None
        self.state = read_json(self.resumed / "trainer" / "state.json") if found else {"step": 0, "skipped": 0}
        self.complete = (self.out / "final").exists()
        if self.complete:
            ranks.print(f"{self.out}/final is there: the run is complete")
        if ranks.main and not self.complete:
            self.out.mkdir(parents=True, exist_ok=True)
            write_atomic(self.out / "args.json", (json.dumps(vars(args), indent=2) + "\n").encode())
            for leftover in [*self.out.glob(".partial-*"), *self.out.glob("checkpoints/.partial-*")]:
                shutil.rmtree(leftover)
            self._cut("metrics.jsonl")
            self._cut("samples.jsonl")

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted((self.out / "checkpoints").glob("step-*"))

    def attach(self, model: Decoder, tokenizer: Tokenizer, optimizer: Optimizer) -> None:
        """What is to be saved. If the run is resumed (`model` from `resumed`), restores the optimizer."""
        self.model, self.tokenizer, self.optimizer = model, tokenizer, optimizer
        if self.resumed is not None:
            optimizer.load_state(StoredTensors(self.resumed / "trainer", "optimizer"))
            self.ranks.print(f"resuming after step {self.state['step']} from {self.resumed}")

    def check_data(self, name: str, rows: Sequence[Row]) -> None:
        """Keep a hash of the rows with the run; raises ValueError if it began with others."""
        read = digest(rows)
        if self.state.setdefault("data", read) != read:
            raise ValueError(f"{name} has changed since {self.out} began: "
                             "put the old data back, or set another --out")

    def steps(self, total: int) -> Iterator[int]:
        """The steps still to do, from 0, up to `total` or until Ctrl-C or SIGTERM: then the step is finished and saved.

        A second Ctrl-C stops at once. (Not a second signal of another kind: torchrun sends its workers SIGTERM when it
        sees the Ctrl-C that they have seen themselves.)
        """

        def request(number, frame) -> None:
            self.requested = True
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            self.ranks.print("\nstopping after this step (Ctrl-C again: at once)")

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, request)
        self.total = total
        while self.state["step"] < total and not self.stopping:
            yield self.state["step"]

    def record(self, metrics: dict, updated: bool) -> dict:
        """Log the row of the step just done. Returns it as written: numbers that are not finite are None.

        Exits after MAX_SKIPPED_STEPS steps in a row that updated nothing.
        """
        step = self.state["step"] + 1
        self.state |= {"step": step, "skipped": 0 if updated else self.state["skipped"] + 1}
        row = {"step": step, **{k: v if math.isfinite(v) else None for k, v in metrics.items()}}  # JSON has no NaN
        self.log("metrics.jsonl", [row])
        if self.state["skipped"] >= MAX_SKIPPED_STEPS:
            raise SystemExit(
                f"stopped: {MAX_SKIPPED_STEPS} steps in a row updated nothing, for want of a token in the loss, or of "
                f"a finite reward, loss or gradient; the last checkpoint stays in {self.out}/checkpoints"
            )
        return row

    def log(self, name: str, rows: list[dict]) -> None:
        """Append rows to metrics.jsonl or samples.jsonl, synced."""
        if self.ranks.main:
            with open(self.out / name, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())

    def save_if_due(self) -> None:
        """Save every --save-every steps, after the last one and when the run was asked to stop."""
        self.stopping = self.ranks.any(self.requested)
        if self.state["step"] % self.args.save_every == 0 or self.state["step"] == self.total or self.stopping:
            self.save()

    def save(self) -> None:
        """Write checkpoints/step-N, then delete all but the newest `--keep`; after a step that updated nothing, none:
        what makes rewards or gradients NaN may be in this one already, and must not push out the last good one."""
        folder = self.out / "checkpoints" / f"step-{self.state['step']:06d}"
        partial, main = folder.with_name(f".partial-{folder.name}"), self.ranks.main
        try:
            save_model(self.model, partial, self.tokenizer, dtype=self.dtype, writes=main)
            with staged(partial / "trainer", main) as new:
                save_tensors(self.optimizer.state(), new, "optimizer")
                if main:
                    (new / "state.json").write_text(json.dumps(self.state, indent=2) + "\n")
        except OSError as error:
            kept = [path.name for path in self.checkpoints()]
            raise OSError(f"saving {folder} failed ({error}); kept: {', '.join(kept) or 'none'}. Make room, and the "
                          "same command goes on from there") from error
        if main:
            os.rename(partial, folder)
            sync(folder.parent)
            sync(self.out)
            surplus = [] if self.state["skipped"] else self.checkpoints()[: -self.args.keep]
            for old in surplus:  # renamed first: half a checkpoint must not look whole
                shutil.rmtree(old.rename(old.with_name(f".partial-{old.name}")))
        self.ranks.wait()

    def finish(self) -> None:
        """After the last step: write final/, unless the run was stopped before it."""
        if self.state["step"] < self.total:
            return self.ranks.print(f"stopped after step {self.state['step']}; the same command goes on from there")
        save_model(self.model, self.out / ".partial-final", self.tokenizer, dtype=self.dtype, writes=self.ranks.main)
        if self.ranks.main:
            os.rename(self.out / ".partial-final", self.out / "final")
            sync(self.out)
        self.ranks.print(f"done: {self.out}/final")

    def _cut(self, name: str) -> None:
        """Keep the rows up to the resumed step; a line that a crash tore lies beyond it."""
        path, kept = self.out / name, []
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n") or json.loads(line)["step"] > self.state["step"]:
                    break
                kept.append(line)
            write_atomic(path, b"".join(kept))
