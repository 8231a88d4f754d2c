"""One model, measured: its benchmarks one after the other into the folder of its result, which can be gone on with."""

import json
import re
import time
from argparse import Namespace
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import torch

from nanosafe.evals.benchmark import Benchmark, adapt
from nanosafe.evals.diagnostics import MEMORIZATION, memorization, reflection_ids
from nanosafe.evals.results import RecordFile, write_unitxt
from nanosafe.evals.run import add_rewards, protocol, respond, summarize
from nanosafe.evals.statistics import Estimate, over_items
from nanosafe.evals.tables import MEASURED, read_result, write_table
from nanosafe.io.files import digest, misfit, write_atomic
from nanosafe.io.locks import hold
from nanosafe.model.decoder import Decoder
from nanosafe.names import load_model, load_rows, load_tokenizer
from nanosafe.parallel import Ranks
from nanosafe.text.data import sft_documents
from nanosafe.train.rewards import Reward


class Evaluation:
    """One model, and the folder of its result."""

    def __init__(self, name: str, label: str, folder: Path, out: Path, args: Namespace, ranks: Ranks):
        """Load the model `name` from its `folder`, and open the folder of its result, `out`.

        Raises ValueError if that holds the responses of other weights or settings.
        """
        self.args, self.ranks, self.out = args, ranks, out
        self.tokenizer = load_tokenizer(folder)
        self.tokenizer.think(args.thinking == "on")
        self.tokenizer.date = args.date
        self.model = load_model(folder, device=ranks.device, dtype=getattr(torch, args.dtype))
        of_run = re.fullmatch(r"(.+)/checkpoints/step-(\d+)", str(folder))
        settings = {
            "seed": args.seed, "dtype": args.dtype, "thinking": args.thinking, "date": args.date,
            "max_response_tokens": args.max_response_tokens, "weights": fingerprint(self.model),
            "template": digest(self.tokenizer.chat_template),
        }  # fmt: skip
        self.result = {
            "model": name, "label": label, "run": of_run and of_run[1],
            "step": of_run and int(of_run[2]), "settings": settings, "memorization": None,
            "benchmarks": {},
        }  # fmt: skip
        self.lock = hold(out) if ranks.main else None
        self.records = RecordFile(out / "records.jsonl", ranks)
        if self.records.rows:
            self.go_on(settings)
        ranks.wait()  # every rank has read the folder before rank 0 changes it

    def go_on(self, settings: dict) -> None:
        """Take up the result that the folder holds; raises ValueError if that is of other settings."""
        if self.args.resume == "never":
            raise ValueError(f"{self.out} already holds responses: use --resume auto to keep them, "
                             "or another --out")
        path, old, before = self.out / "result.json", {}, {}
        if path.exists():
            old = read_result(path, MEASURED)
            before = {} if misfit(old, {"settings": dict}) else old["settings"]
        changed = []
        for key, value in settings.items():
            if before.get(key) != value:
                changed.append(f"{key} was {before.get(key)}, is {value}")
        if changed:
            raise ValueError(f"{self.out} holds responses of another model or evaluation "
                             f"({'; '.join(changed)}): set another --out, or delete it")
        self.result["memorization"] = old.get("memorization")
        self.result["benchmarks"] = old["benchmarks"]

    def run(self, suite: Sequence[Benchmark], reward: Reward | None) -> dict:
        """Measure the benchmarks of `suite`, and what --memorization names; result.json grows by each."""
        args = self.args
        asked = []
        for benchmark in suite:
            asked.append(adapt(benchmark, seed=args.seed, samples=args.samples, limit=args.limit,
                               max_response_tokens=args.max_response_tokens))
            self.check(asked[-1])
        self.save()
        reflection = reflection_ids(self.tokenizer)
        for benchmark, whole in zip(asked, suite, strict=True):
            self.measure(benchmark, len(whole.questions), reflection, reward)
        if self.args.memorization:
            self.result["memorization"] = self.memorized()
            self.save()
        if self.ranks.main:
            write_table([self.result], self.out)
        return self.result

    def check(self, benchmark: Benchmark) -> None:
        """Raise ValueError for a benchmark of other data, or of less of it than result.json holds.

        Less is what is wanted where --out names the folder itself; the responses are kept anyway.
        """
        before = self.result["benchmarks"].get(benchmark.name)
        if before and before["source"] != benchmark.source:
            raise ValueError(f"{self.out} holds {benchmark.name} from {before['source']}, now it "
                             f"is from {benchmark.source}: set another --out")
        held = before["protocol"]["questions"] if before else 0
        if len(benchmark.questions) < held and self.out != Path(self.args.out or ""):
            raise ValueError(
                f"{self.out}/result.json holds {held} questions of {benchmark.name}, --limit would "
                f"leave {len(benchmark.questions)}: --compare {self.out} takes it as it is, or set "
                "another --out"
            )

    def measure(self, benchmark: Benchmark, total: int, reflection: list[int],
                reward: Reward | None) -> None:
        start, before = time.perf_counter(), len(self.records.rows)
        records = respond(
            self.model, self.tokenizer, benchmark, ranks=self.ranks, seed=self.args.seed,
            file=self.records, tokens_per_microbatch=self.args.tokens_per_microbatch,
            regrade=self.args.regrade,
        )  # fmt: skip
        seconds, new = time.perf_counter() - start, len(self.records.rows) - before
        if reward is not None:
            add_rewards(records, reward, self.args.reward_model, self.ranks)
            self.records.rewrite(records)
        if benchmark.name == "attaq" and self.ranks.main:
            write_unitxt(records, self.out / "attaq.unitxt.jsonl")
        part = summarize(benchmark, records, reflection)
        part["protocol"] = protocol(benchmark, self.tokenizer, total)
        self.result["benchmarks"][benchmark.name] = part
        self.save()
        done = f"{new} generated in {seconds:.0f} s" if new else "all there already"
        found = part["metrics"].get(benchmark.headline)
        self.ranks.print(f"{benchmark.name}: {benchmark.headline.replace('_', ' ')} "
                         f"{Estimate(**found) if found else 'not judged'}, {len(records)} "
                         f"responses, {done}")

    def memorized(self) -> dict:
        """Scores of the responses in --memorization, as a part of result.json."""
        rows, limit = load_rows(self.args.memorization), self.model.config.max_position_embeddings
        documents = []
        for row in rows[: self.args.limit]:
            documents += sft_documents(row, self.tokenizer, limit)[0]
        if not documents:
            raise ValueError(f"--memorization {self.args.memorization}: no prompt leaves room for "
                             f"a response in the model's {limit} positions")  # fmt: skip

        def scores(part: list) -> list[tuple[float, ...]]:
            return list(zip(*memorization(self.model, part,
                                          self.args.tokens_per_microbatch).values(), strict=True))

        columns = zip(*self.ranks.split_work(documents, scores), strict=True)
        items, metrics = {}, {}
        for metric, values in zip(MEMORIZATION, columns, strict=True):
            items[metric] = {str(i): value for i, value in enumerate(values)}
            metrics[metric] = over_items(values)._asdict()
        return {"about": "memorization", "data": self.args.memorization, "items": items,
                "metrics": metrics}

    def save(self) -> None:
        if self.ranks.main:
            write_atomic(self.out / "result.json", (json.dumps(self.result, indent=1) + "\n").encode())


def fingerprint(model: Decoder) -> str:
    """Of a sample of every tensor: a folder that was trained anew holds another model under the same name."""
    digest = blake2b(digest_size=8)
    for tensor in model.state_dict().values():
        sample = tensor.flatten()[:: max(1, tensor.numel() // 256)].float().cpu().contiguous()
        digest.update(bytes(sample.view(torch.uint8).tolist()))
    return digest.hexdigest()
