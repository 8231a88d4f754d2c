"""One model, measured: its benchmarks one after the other, into a folder where the same command goes on."""

import re
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch

from nanosafe.evals.benchmark import Benchmark, adapt
from nanosafe.evals.choice import choose_benchmarks
from nanosafe.evals.diagnostics import memorization, reflection_ids
from nanosafe.evals.records import RecordFile, write_unitxt
from nanosafe.evals.results import MEMORIZATION, BenchmarkResult, Metric, Result, estimate, read_result, write_result
from nanosafe.evals.run import add_rewards, protocol, respond
from nanosafe.evals.scores import summarize, summarize_memorization
from nanosafe.evals.tables import write_table
from nanosafe.io.files import digest
from nanosafe.io.locks import hold_shared
from nanosafe.model.config import ModelConfig
from nanosafe.model.decoder import Decoder
from nanosafe.names import checkpoint, load_model, load_rows, load_tokenizer
from nanosafe.parallel import Ranks
from nanosafe.text.data import Document, sft_documents
from nanosafe.text.tokenizer import Tokenizer
from nanosafe.train.rewards import Reward


@dataclass(frozen=True)
class Shared:
    """What all models of a command have in common."""

    args: Namespace
    ranks: Ranks
    load_paper: Callable[[], list[Benchmark]]
    reward: Reward | None


def evaluate(name: str, label: str, out: Path, shared: Shared) -> Result:
    """Measure one model; out/result.json grows by each benchmark."""
    # What the flags do not choose for this model is refused before a weight is loaded.
    args, ranks = shared.args, shared.ranks
    with ranks.local_main_first():
        folder = checkpoint(name)
    benchmarks = choose_benchmarks(name, ModelConfig.from_folder(folder), args, shared.load_paper)
    tokenizer = load_tokenizer(folder)
    tokenizer.think(args.thinking == "on")
    tokenizer.date = args.date
    model = load_model(folder, device=ranks.device, dtype=getattr(torch, args.dtype))
    settings = {
        "seed": args.seed, "dtype": args.dtype, "thinking": args.thinking, "date": args.date,
        "temperature": args.temperature, "top_p": args.top_p,
        "max_response_tokens": args.max_response_tokens, "weights": fingerprint(model),
        "template": digest(tokenizer.chat_template),
    }  # fmt: skip
    result = Result(label, {}, model=name, settings=settings)
    # A checkpoint in a run folder is a point on a line over steps.
    if of_run := re.fullmatch(r"(.+)/checkpoints/step-(\d+)", str(folder)):
        result.run, result.step = of_run[1], int(of_run[2])
    lock = hold_shared(out, ranks)
    records = RecordFile(out / "records.jsonl", ranks)
    if records.rows:
        result.benchmarks = kept_benchmarks(out, settings, args.resume)
    ranks.wait()  # every rank has read the folder before rank 0 changes it

    adapted = []
    for benchmark in benchmarks:
        adapted.append(adapt(benchmark, seed=args.seed, limit=args.limit, samples=args.samples,
                             temperature=args.temperature, top_p=args.top_p,
                             max_response_tokens=args.max_response_tokens))
        check_kept(out, adapted[-1], result.benchmarks.get(benchmark.name), args)
    save(result, out, ranks)

    reflection = reflection_ids(tokenizer)
    for benchmark, complete in zip(adapted, benchmarks, strict=True):
        start, before = time.perf_counter(), len(records.rows)
        graded = respond(model, tokenizer, benchmark, ranks=ranks, seed=args.seed, file=records,
                         tokens_per_microbatch=args.tokens_per_microbatch, regrade=args.regrade)
        seconds, new = time.perf_counter() - start, len(records.rows) - before
        # Rewards are kept with the responses, so that another run need not score them again.
        if shared.reward is not None:
            add_rewards(graded, shared.reward, args.reward_model, ranks)
            records.rewrite(graded)
        if benchmark.name == "attaq" and ranks.main:
            write_unitxt(graded, out / "attaq.unitxt.jsonl")
        summary = summarize(benchmark, graded, reflection)
        summary.protocol = protocol(benchmark, tokenizer, len(complete.questions))
        result.benchmarks[benchmark.name] = summary
        save(result, out, ranks)
        done = f"{new} generated in {seconds:.0f} s" if new else "all there already"
        value = estimate(result, Metric(benchmark.name, benchmark.headline)) or "not judged"
        ranks.print(f"{benchmark.name}: {benchmark.headline.replace('_', ' ')} {value}, "
                    f"{len(graded)} responses, {done}")

    if args.memorization:
        result.benchmarks[MEMORIZATION] = measure_memorization(model, tokenizer, args, ranks)
        save(result, out, ranks)
    if ranks.main:
        write_table([result], out)
    if lock:
        lock.close()
    return result


def save(result: Result, out: Path, ranks: Ranks) -> None:
    if ranks.main:
        write_result(out / "result.json", result)


def kept_benchmarks(out: Path, settings: dict, resume: str) -> dict[str, BenchmarkResult]:
    """What a folder with responses holds already.

    Raises ValueError if the responses are of other weights or settings.
    """
    if resume == "never":
        raise ValueError(f"{out} already holds responses: use --resume auto to keep them, or "
                         "another --out")
    kept = Result("", {})
    if (out / "result.json").exists():
        kept = read_result(out / "result.json")
    changed = []
    for key, value in settings.items():
        if kept.settings.get(key) != value:
            changed.append(f"{key} was {kept.settings.get(key)}, is {value}")
    if changed:
        raise ValueError(f"{out} holds responses of another model or evaluation "
                         f"({'; '.join(changed)}): set another --out, or delete it")
    return kept.benchmarks


def check_kept(out: Path, benchmark: Benchmark, kept: BenchmarkResult | None,
               args: Namespace) -> None:
    """Raise ValueError for a benchmark of other data, or of less of it than result.json holds.

    Less may be asked for where --out names this very folder; the responses are kept anyway.
    """
    if kept is None:
        return
    if kept.source != benchmark.source:
        raise ValueError(f"{out} holds {benchmark.name} from {kept.source}, now it is from "
                         f"{benchmark.source}: set another --out")
    held = kept.protocol["questions"]
    if len(benchmark.questions) < held and out != Path(args.out or ""):
        raise ValueError(f"{out}/result.json holds {held} questions of {benchmark.name}, --limit "
                         f"would leave {len(benchmark.questions)}: --compare {out} takes it as it is, "
                         "or set another --out")


def measure_memorization(model: Decoder, tokenizer: Tokenizer, args: Namespace,
                         ranks: Ranks) -> BenchmarkResult:
    """How well the model knows the responses of --memorization."""
    limit, documents = model.config.max_position_embeddings, []
    for row in load_rows(args.memorization)[: args.limit]:
        documents += sft_documents(row, tokenizer, limit)[0]
    if not documents:
        raise ValueError(f"--memorization {args.memorization}: no prompt leaves room for a "
                         f"response in the model's {limit} positions")

    def measure(part: Sequence[Document]) -> list[dict[str, float]]:
        scores = memorization(model, part, args.tokens_per_microbatch)
        return [{name: scores[name][i] for name in scores} for i in range(len(part))]

    return summarize_memorization(args.memorization, ranks.split_work(documents, measure))


def fingerprint(model: Decoder) -> str:
    """Of a sample of every tensor: a folder that was trained anew holds another model under the same name."""
    digest = blake2b(digest_size=8)
    for tensor in model.state_dict().values():
        sample = tensor.flatten()[:: max(1, tensor.numel() // 256)].float().cpu().contiguous()
        digest.update(bytes(sample.view(torch.uint8).tolist()))
    return digest.hexdigest()
