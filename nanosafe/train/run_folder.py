"""The run folder: what a run writes while it goes, and how it goes on after being stopped at any moment.

    args.json  metrics.jsonl  samples.jsonl
    checkpoints/step-000010/   an official-layout model folder with trainer/ inside; of LoRA, the adapters alone
    final/                     an official-layout model folder in --save-dtype, there when the run is complete
    adapter/                   with --save-adapter: LoRA's adapters as PEFT loads them

A row of metrics is on disk before the checkpoint that covers it appears, and a checkpoint appears whole, by one rename.
So the newest checkpoint decides everything: resuming cuts the row files back to its step and goes on from there.
"""

import json
import math
import os
import re
import shutil
import signal
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import partial
from pathlib import Path

import torch

from nanosafe.io.files import naming, read_own, staged, sync, write_atomic
from nanosafe.io.locks import hold_shared
from nanosafe.model.adapter_files import save_adapter
from nanosafe.model.decoder import Decoder
from nanosafe.model.weights import StoredTensors, save_model, save_tensors
from nanosafe.parallel import Ranks
from nanosafe.text.data import Row, digest_rows
from nanosafe.text.tokenizer import Tokenizer
from nanosafe.train.optim import Optimizer

# Flags that may differ between a run and its continuation: none of them changes what is computed but for rounding, and
# whoever ran out of memory goes on with other ones.
FREE_FLAGS = {"out", "resume", "save_every", "keep", "tensorboard", "wandb", "device", "recompute",
              "save_adapter", "rollout_shards", "shard_frozen", "offload", "tokens_per_microbatch"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_SKIPPED_STEPS = 5  # steps in a row without an update, after which something is broken rather than unlucky
# What may lie in a folder before its first run does (the lock, a job's files, a user's log), and in a run's own.
BEFORE_A_RUN = r"(checkpoints/)?\..*|job\..*|.*\.(txt|log|out|err)"
OF_A_RUN = BEFORE_A_RUN + r"|args\.json|(metrics|samples)\.jsonl|checkpoints|evals?|tensorboard|wandb"


class RunFolder:
    """`args.out`. Every rank calls every method; rank 0 alone writes."""

    def __init__(self, args: Namespace, ranks: Ranks):
        """Open or make the folder, and hold its lock.

        Raises ValueError, having changed nothing, if it holds a run that `args` do not continue, or other things, or
        if another process writes to it, or if not all nodes share it.
        """
        self.args, self.ranks, self.out = args, ranks, Path(args.out)
        self.dtype = getattr(torch, args.dtype)  # of the checkpoints' weights; what is finer is the optimizer's
        self.signal, self.stopping = 0, False  # the signal that asked to stop; whether this step is the last
        if ranks.main:
            self._earlier_settings()  # a folder of other things gets no lock
        self.lock = hold_shared(self.out, ranks)
        earlier = self._earlier_settings()  # now that no other process can be writing them
        checkpoints = self.checkpoints()
        self.resumed = checkpoints[-1] if checkpoints else None
        self.complete = (self.out / "final").exists()
        if self.resumed or self.complete:
            self._check_settings(earlier)
        # Midnight may fall between two ranks: one day for all.
        args.date = args.date or ranks.gather([date.today().isoformat()])[0]
        self.state = {"step": 0, "skipped": 0}
        if self.resumed and not self.complete:
            self.state = self._read_state()
        ranks.wait()  # every rank has read the folder before rank 0 changes it
        if self.complete:
            ranks.print(f"the run is complete: {self.out}/final is its model")
        elif ranks.main:
            self._begin()

    def _earlier_settings(self) -> dict:
        """args.json, if there is one. Raises ValueError for a folder of other things than a run's."""
        names = sorted(os.listdir(self.out)) if self.out.exists() else []
        known, settings = BEFORE_A_RUN, {}
        if "args.json" in names:
            expected = {"save_every": int, "keep": int}
            settings = read_own(self.out / "args.json", expected, "set another --out, or mend it")
            if self.checkpoints() or "final" in names:
                return settings  # whatever its user has put beside it
            known = OF_A_RUN
            names += [f"checkpoints/{path.name}" for path in self.out.glob("checkpoints/*")]
        others = [name for name in names if not re.fullmatch(known, name)]
        if others:
            raise ValueError(f"{self.out} holds other things than a run ({', '.join(others[:5])}): "
                             "set another --out")
        return settings

    def _check_settings(self, earlier: dict) -> None:
        """Raise ValueError unless this run may go on with the one that the folder holds. Takes over its date."""
        args = self.args
        if args.resume == "never":
            raise ValueError(f"{self.out} already holds a run: "
                             "use --resume auto to go on, or another --out")
        args.date = args.date or earlier.get("date")
        changed = []
        for name, value in vars(args).items():
            if name not in FREE_FLAGS and earlier.get(name) != value:
                flag = name.replace("_", "-")
                changed.append(f"--{flag} was {earlier.get(name)!r}, is {value!r}")
        if changed:
            hint = ""
            if earlier.get("steps") != args.steps:
                hint = (". The learning rate of each step follows from their number; to go on with more, let "
                        f"it end and start a run from its model: --model {self.out}/final --out ANOTHER")
            raise ValueError(f"{self.out} holds another run ({'; '.join(changed)}): "
                             f"repeat its flags or set --out{hint}")

    def _begin(self) -> None:
        """Bring the folder to the state of the checkpoint that is resumed, or to that of a new run."""
        # Both files are read before anything is written: a damaged one leaves the folder as it was.
        kept = {name: self._rows_to_keep(name) for name in ("metrics.jsonl", "samples.jsonl")}
        settings = json.dumps(vars(self.args), indent=2) + "\n"
        write_atomic(self.out / "args.json", settings.encode())
        for leftover in [*self.out.glob(".partial-*"), *self.out.glob("checkpoints/.partial-*")]:
            shutil.rmtree(leftover)
        for name, rows in kept.items():
            if rows is not None:
                write_atomic(self.out / name, rows)

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted((self.out / "checkpoints").glob("step-" + 6 * "[0-9]"))

    def _read_state(self) -> dict:
        path = self.resumed / "trainer" / "state.json"
        state = read_own(path, {"step": int, "skipped": int}, self._cure())
        if f"step-{state['step']:06d}" != self.resumed.name:
            raise ValueError(f"{path} is damaged (it is of step {state['step']}): {self._cure()}")
        return state

    def _cure(self) -> str:
        """What to do about a damaged checkpoint."""
        return (f"delete {self.resumed}, and the same command goes on from the checkpoint before it, "
                "or from the start")

    def attach(self, model: Decoder, tokenizer: Tokenizer, optimizer: Optimizer) -> None:
        """Take what is to be saved. If the run is resumed (`model` from `resumed`), restore the optimizer."""
        self.model, self.tokenizer, self.optimizer = model, tokenizer, optimizer
        self.save_trained = save_model
        if model.config.lora:
            self.save_trained = partial(save_adapter, base=self.args.model)
        # The type of the base's files. Those of a checkpoint, which a resumed run loads, are in --dtype.
        config = model.config.raw
        self.state.setdefault("base_dtype", str(config.get("dtype") or config.get("torch_dtype")))
        if self.resumed is not None:
            try:
                optimizer.load_state(StoredTensors(self.resumed / "trainer", "optimizer"))
            except (ValueError, FileNotFoundError) as error:
                damage = f"{self.resumed}/trainer is damaged ({error})"
                raise ValueError(f"{damage}: {self._cure()}") from None
            self.ranks.print(f"resuming after step {self.state['step']} from {self.resumed}")

    def check_data(self, name: str, rows: Sequence[Row]) -> None:
        """Keep a hash of the rows with the run; raises ValueError if it began with others."""
        digest = digest_rows(rows)
        if self.state.setdefault("data", digest) != digest:
            raise ValueError(f"{name} has changed since {self.out} began: "
                             "put the old data back, or set another --out")

    def steps(self, total: int) -> Iterator[int]:
        """The steps still to do, from 0, up to `total` or until Ctrl-C or SIGTERM: then the step is finished and saved.

        A second Ctrl-C stops at once. (Not a second signal of another kind: torchrun sends its workers SIGTERM when it
        sees the Ctrl-C that they have seen themselves.)
        """

        def request(number, frame) -> None:
            self.signal = number
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            limit = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
            kill = f"; torchrun kills what is not done in {limit} s" if "TORCHELASTIC_RUN_ID" in os.environ else ""
            self.ranks.print(f"\nstopping after this step (Ctrl-C again: at once{kill})")

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, request)
        self.total = total
        while self.state["step"] < total and not self.stopping:
            yield self.state["step"]

    def record(self, metrics: dict, updated: bool) -> dict:
        """Log the row of the step just done. Returns it as written: numbers that are not finite are None.

        Exits after MAX_SKIPPED_STEPS steps in a row that updated nothing.
        """
        self.state["step"] += 1
        self.state["skipped"] = 0 if updated else self.state["skipped"] + 1
        row = {"step": self.state["step"]}
        for name, value in metrics.items():
            row[name] = value if math.isfinite(value) else None  # JSON has no NaN
        self.log("metrics.jsonl", [row])
        if self.state["skipped"] >= MAX_SKIPPED_STEPS:
            raise SystemExit(
                f"stopped: {MAX_SKIPPED_STEPS} steps in a row updated nothing, for want of a token in "
                "the loss, or of a finite reward, loss or gradient; the last checkpoint stays in "
                f"{self.out}/checkpoints"
            )
        return row

    def log(self, name: str, rows: list[dict]) -> None:
        """Append rows to metrics.jsonl or samples.jsonl, synced."""
        if self.ranks.main:
            with naming(self.out / name), open(self.out / name, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())

    def save_if_due(self) -> None:
        """Save every --save-every steps, after the last one and when the run was asked to stop."""
        self.stopping = self.ranks.any(self.signal)
        step = self.state["step"]
        if step % self.args.save_every == 0 or step == self.total or self.stopping:
            self.save()

    def save(self) -> None:
        """Write checkpoints/step-N, then delete all but the newest `--keep`."""
        folder = self.out / "checkpoints" / f"step-{self.state['step']:06d}"
        self._write(folder, self.save_trained, self.dtype, trainer=True)
        # After a step that updated nothing none is deleted: what makes rewards or gradients NaN may be in this
        # checkpoint already, and must not push out the last good one.
        if self.ranks.main and not self.state["skipped"]:
            for old in self.checkpoints()[: -self.args.keep]:
                # Renamed first: half a checkpoint must not look whole.
                shutil.rmtree(old.rename(old.with_name(f".partial-{old.name}")))
        self.ranks.wait()

    def _write(self, folder: Path, save: Callable, dtype: torch.dtype, trainer: bool = False) -> None:
        """Write the model by `save`, and what the trainer goes on with, as `folder`: whole, by one rename, or not at
        all.
        """
        unfinished, main = folder.with_name(f".partial-{folder.name}"), self.ranks.main
        try:
            save(self.model, unfinished, self.tokenizer, dtype=dtype, writes=main)
            if trainer:
                with staged(unfinished / "trainer", main) as new:
                    save_tensors(self.optimizer.state(), new, "optimizer")
                    if main:
                        (new / "state.json").write_text(json.dumps(self.state, indent=2) + "\n")
            if main:
                os.rename(unfinished, folder)
                sync(folder.parent)
                sync(self.out)
        except OSError as error:
            if main:
                shutil.rmtree(unfinished, ignore_errors=True)
            kept = ", ".join(path.name for path in self.checkpoints()) or "none"
            raise OSError(f"saving {folder} failed ({error}); kept: {kept}. "
                          "Make room, and the same command goes on from there") from error

    def finish(self) -> None:
        """After the last step: write final/ and let go of the lock.

        A run that was stopped before it exits here, as shells say that a signal ended it: whoever started the run must
        not take it for complete.
        """
        if self.state["step"] < self.total:
            self.ranks.print(f"stopped after step {self.state['step']}; the same command goes on from there")
            self.ranks.close()
            raise SystemExit(128 + (self.signal or signal.SIGTERM))
        # Before final/, which merges the adapters; it is there already where an earlier process ended in between.
        if self.model.config.lora and self.args.save_adapter and not (self.out / "adapter").exists():
            self._write(self.out / "adapter", self.save_trained, self.dtype)
        dtype = DTYPES.get(self.args.save_dtype or self.state["base_dtype"], self.dtype)
        self._write(self.out / "final", save_model, dtype)
        self.ranks.print(f"done: {self.out}/final")
        if self.lock is not None:
            self.lock.close()

    def _rows_to_keep(self, name: str) -> bytes | None:
        """The rows up to the resumed step; a line that a crash tore lies beyond it. None: there is no such file."""
        path, kept = self.out / name, []
        if not path.exists():
            return None
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            try:
                step = json.loads(line)["step"]
                if step > self.state["step"]:
                    break
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{path}, line {number}, is no row with its step: "
                                 "mend the line or delete it") from None
            kept.append(line)
        return b"".join(kept)
