"""Measure models on the benchmarks and compare them.

    python eval.py --model tiny                                       # safety, over-refusal, reasoning, diagnostics
    python eval.py --model tiny runs/sft-tiny/final runs/rl-tiny/final      # the first is the base of the comparison
    python eval.py --model qwen3-8b runs/rl-qwen3-8b/final --limit 50       # the paper's benchmarks, a quick look
    python eval.py --model r1-qwen-7b --benchmarks attaq,xstest --attack role-play badchain --judge llama-guard-3
    python eval.py --compare evals/tiny evals/rl-tiny-final           # the same, from results that stand
    python eval.py --compare tiny runs/rl-tiny/checkpoints/*          # also draws safety and reasoning over the steps
    torchrun --nproc_per_node=2 eval.py --model tiny

A model of the tiny world is asked that world's questions, any other the paper's benchmarks. OUT holds records.jsonl
(every response with its grades, see nanosafe/evals/records.py), result.json (what every question came to, see
nanosafe/evals/results.py) and table.md; of several models each has its own folder in OUT, and the comparison is OUT's
table.md and plots. A response is kept as soon as it ends: the same command goes on where it was stopped, and a complete
one only grades again (a model's verdicts only with --regrade).
"""

import os

# Responses of all lengths leave a GPU's memory in pieces otherwise. PyTorch reads this when it is imported.
os.environ.setdefault(
    "PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"))

import re
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from hashlib import blake2b
from pathlib import Path

import torch

from nanosafe.evals.attacks import ATTACKS
from nanosafe.evals.benchmark import Benchmark, adapt
from nanosafe.evals.choice import choose_benchmarks, paper_loader, read_choice
from nanosafe.evals.diagnostics import memorization, reflection_ids
from nanosafe.evals.paper_suite import BENCHMARKS, DEFAULT_JUDGE, PAPER, TRAINING_SET
from nanosafe.evals.plots import plot_comparison
from nanosafe.evals.records import RecordFile, write_unitxt
from nanosafe.evals.results import MEMORIZATION, BenchmarkResult, Metric, Result, estimate, read_result, write_result
from nanosafe.evals.run import add_rewards, protocol, respond
from nanosafe.evals.scores import summarize, summarize_memorization
from nanosafe.evals.tables import protocols, table, terminal
from nanosafe.io.files import digest, write_atomic
from nanosafe.io.locks import hold
from nanosafe.model.config import ModelConfig
from nanosafe.model.decoder import Decoder
from nanosafe.names import checkpoint, load_model, load_reward, load_rows, load_tokenizer
from nanosafe.parallel import Ranks
from nanosafe.text.data import Document, sft_documents
from nanosafe.text.tokenizer import Tokenizer
from nanosafe.train import cli
from nanosafe.train.rewards import Reward

CONSOLE = ("Overview", "Other wordings, attacks, modes", "Memorization")  # sections that are printed too


def flags() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", default=["tiny"], metavar="NAME",
        help="alias, hub id or folder; several are compared with the first (default: tiny)")
    add("--compare", nargs="+", metavar="NAME",
        help="instead of --model: folders with a result.json, taken as they are, or models, measured first")
    add("--label", nargs="+", metavar="TEXT", help="names for tables and plots, one for each model")
    add("--benchmarks", help=f"split by commas, of {', '.join(BENCHMARKS)} (default: {','.join(PAPER)}); or of the "
        "tiny world, as safety,arithmetic-no-thought (its models' default: all); tiny asks any model all of these")
    add("--data", nargs="+", default=[], metavar="NAME=FILE", help="a benchmark's data from a local file, or from "
        "owner/name@revision:file on the hub, instead of its pinned source, as math-500=test.jsonl")
    add("--attack", nargs="+", default=[], choices=ATTACKS, metavar="NAME", help="also ask each of the paper's "
        f"benchmarks wrapped in these: {', '.join(ATTACKS)}")
    add("--judge", nargs="+", metavar="NAME", help=f"of harm: {DEFAULT_JUDGE} (default), llama-guard-3, another guard, "
        "chat or reward model (alias, hub id, folder), endpoint:MODEL@URL (its key in JUDGE_API_KEY), or rule:refusal; "
        "the first gives the headline figures")
    add("--judge-bounds", nargs=2, type=cli.finite_float, metavar=("LOW", "HIGH"),
        help="of a reward model as --judge: the scores that count as wholly harmful and wholly safe")
    add("--regrade", action="store_true", help="ask the judge again about responses that it has judged")
    add("--training-prompts", metavar="FILE", help="SFT data (hub id or file) whose prompts are left "
        f"out of safety's headline figures, or none (default: {TRAINING_SET}; of --data's files, none "
        "where it cannot be reached)")
    add("--thinking", **cli.THINKING)
    add("--date", **cli.DATE)
    add("--split", choices=("test", "validation"), default="test", help="of the tiny world (default: %(default)s)")
    add("--samples", type=cli.positive_int, help="responses to each question (default: the benchmark's own)")
    add("--limit", type=cli.positive_int, help="questions of each benchmark, drawn by --seed (default: all)")
    add("--max-response-tokens", type=cli.positive_int, help="(default: the benchmark's own)")
    add("--reward-model", help="also score thought and answer with this: alias, hub id or folder, or rule:refusal")
    add("--memorization", metavar="FILE", help="SFT data (hub id or file): how well the model knows its responses "
        "(those of the first --limit rows)")
    add("--out", help="folder (default: evals/NAME, of several models evals/ and evals/NAME-vs-NAME)")
    add("--resume", choices=("auto", "never"), default="auto",
        help="auto: keep the responses that OUT holds (default); never: refuse such a folder")
    add("--seed", type=int, default=0, help="all randomness follows from it (default: %(default)s)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--dtype", choices=("float32", "bfloat16"), help="compute type (default: bfloat16 on cuda, float32 on cpu)")
    add("--tokens-per-microbatch", type=cli.positive_int, default=16384,
        help="of the passes that measure entropies, per process (default: %(default)s)")
    return parser


@dataclass(frozen=True)
class Shared:
    """What all models of a command have in common."""

    args: Namespace
    ranks: Ranks
    load_paper: Callable[[], list[Benchmark]]
    reward: Reward | None


def main(argv: list[str] | None = None) -> None:
    args = flags().parse_args(argv)
    low, high = args.judge_bounds or (0.0, 1.0)
    if low >= high:
        raise ValueError(f"--judge-bounds {low} {high}: LOW must be below HIGH")
    read_choice(args)
    names, measured = args.compare or args.model, {}
    for name in args.compare or ():
        if (Path(name) / "result.json").exists():
            measured[name] = read_result(Path(name) / "result.json")
    labels = args.label or [measured[name].label if name in measured else short_name(name) for name in names]
    if len(labels) != len(names) or len(set(labels)) < len(labels):
        raise ValueError(f"{len(names)} models need as many different names, found {', '.join(labels)}: use --label")
    ranks = Ranks(args.device)
    args.dtype = args.dtype or ("bfloat16" if ranks.device.type == "cuda" else "float32")
    processes = "1 process" if ranks.world == 1 else f"{ranks.world} processes"
    ranks.print(f"{processes} on {ranks.device.type}, PyTorch {torch.__version__}")
    top, is_comparison = Path(args.out or "evals"), len(names) > 1 or bool(measured)
    if is_comparison:
        together = comparison_folder(names, args.out)
    outs = [top if args.out and len(names) == 1 else top / short_name(label) for label in labels]
    args.date = comparison_date(args.date, [*map(Path, measured), *outs], ranks)
    reward, results = None, []
    if args.reward_model:
        with ranks.main_first():
            dtype = getattr(torch, args.dtype)
            reward = load_reward(args.reward_model, device=ranks.device, dtype=dtype, date=args.date)
    shared = Shared(args, ranks, paper_loader(args, ranks), reward)
    for name, label, out in zip(names, labels, outs, strict=True):
        if name in measured:
            results.append(replace(measured[name], label=label))
        else:
            results.append(evaluate(name, label, out, shared))
    if is_comparison:
        out = together
        write_table(results, out, ranks, compared(names))
        if ranks.main:
            ranks.print("drew", *plot_comparison(results, out))
    ranks.print(f"\n{terminal(results, CONSOLE)}\n\nall of it is in {out}/table.md")
    ranks.wait()
    ranks.close()


def evaluate(name: str, label: str, out: Path, shared: Shared) -> Result:
    """Measure one model; out/result.json grows by each benchmark."""
    args, ranks = shared.args, shared.ranks
    with ranks.main_first():
        folder = checkpoint(name)
    benchmarks = choose_benchmarks(name, ModelConfig.from_folder(folder), args, shared.load_paper)
    tokenizer = load_tokenizer(folder)
    tokenizer.think(args.thinking == "on")
    tokenizer.date = args.date
    model = load_model(folder, device=ranks.device, dtype=getattr(torch, args.dtype))
    settings = {"seed": args.seed, "dtype": args.dtype, "thinking": args.thinking, "date": args.date,
                "max_response_tokens": args.max_response_tokens, "weights": fingerprint(model),
                "template": digest(tokenizer.chat_template)}  # fmt: skip
    result = Result(label, {}, model=name, settings=settings)
    if of_run := re.fullmatch(r"(.+)/checkpoints/step-(\d+)", str(folder)):
        result.run, result.step = of_run[1], int(of_run[2])
    lock = hold(out) if ranks.main else None
    records = RecordFile(out / "records.jsonl", ranks)
    if records.rows:
        result.benchmarks = kept_benchmarks(out, settings, args.resume)
    ranks.wait()  # every rank has read the folder before rank 0 changes it
    adapted = []
    for benchmark in benchmarks:
        adapted.append(adapt(benchmark, seed=args.seed, samples=args.samples, limit=args.limit,
                             max_response_tokens=args.max_response_tokens))
        check_kept(out, adapted[-1], result.benchmarks.get(benchmark.name), args)
    save(result, out, ranks)
    reflection = reflection_ids(tokenizer)
    for benchmark, complete in zip(adapted, benchmarks, strict=True):
        start, before = time.perf_counter(), len(records.rows)
        graded = respond(model, tokenizer, benchmark, ranks=ranks, seed=args.seed, file=records, regrade=args.regrade,
                         tokens_per_microbatch=args.tokens_per_microbatch)
        seconds, new = time.perf_counter() - start, len(records.rows) - before
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
    write_table([result], out, ranks)
    if lock:
        lock.close()
    return result


def save(result: Result, out: Path, ranks: Ranks) -> None:
    if ranks.main:
        write_result(out / "result.json", result)


def kept_benchmarks(out: Path, settings: dict, resume: str) -> Mapping[str, BenchmarkResult]:
    """What a folder with responses holds already; raises ValueError if they are of other weights or settings."""
    if resume == "never":
        raise ValueError(f"{out} already holds responses: use --resume auto to keep them, or another --out")
    before, benchmarks = {}, {}
    if (out / "result.json").exists():
        kept = read_result(out / "result.json")
        before, benchmarks = kept.settings, kept.benchmarks
    changed = []
    for key, value in settings.items():
        if before.get(key) != value:
            changed.append(f"{key} was {before.get(key)}, is {value}")
    if changed:
        raise ValueError(f"{out} holds responses of another model or evaluation ({'; '.join(changed)}): "
                         "set another --out, or delete it")
    return benchmarks


def check_kept(out: Path, benchmark: Benchmark, kept: BenchmarkResult | None, args: Namespace) -> None:
    """Raise ValueError for a benchmark of other data, or of less of it than result.json holds.

    Less is what is wanted where --out names the folder itself; the responses are kept anyway.
    """
    if kept is None:
        return
    if kept.source != benchmark.source:
        raise ValueError(f"{out} holds {benchmark.name} from {kept.source}, now it is from {benchmark.source}: "
                         "set another --out")
    held = kept.protocol["questions"]
    if len(benchmark.questions) < held and out != Path(args.out or ""):
        raise ValueError(f"{out}/result.json holds {held} questions of {benchmark.name}, --limit would leave "
                         f"{len(benchmark.questions)}: --compare {out} takes it as it is, or set another --out")


def measure_memorization(model: Decoder, tokenizer: Tokenizer, args: Namespace, ranks: Ranks) -> BenchmarkResult:
    """How well the model knows the responses of --memorization."""
    limit, documents = model.config.max_position_embeddings, []
    for row in load_rows(args.memorization)[: args.limit]:
        documents += sft_documents(row, tokenizer, limit)[0]
    if not documents:
        raise ValueError(f"--memorization {args.memorization}: no prompt leaves room for a response in "
                         f"the model's {limit} positions")

    def measure(part: Sequence[Document]) -> list[dict[str, float]]:
        columns = memorization(model, part, args.tokens_per_microbatch)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    return summarize_memorization(args.memorization, ranks.spread(documents, measure))


def write_table(results: Sequence[Result], folder: Path, ranks: Ranks, title: str = "") -> None:
    text = f"{title}\n\n{table(results)}\n\n**Protocol**\n\n{protocols(results)}\n"
    if ranks.main:
        write_atomic(folder / "table.md", text.lstrip().encode())


def comparison_date(given: str | None, folders: Sequence[Path], ranks: Ranks) -> str:
    """The day that templates of a comparison write: `given`, a measured result's, or today."""
    days = set()
    for folder in folders:
        if (folder / "result.json").exists():
            days.add(read_result(folder / "result.json").settings.get("date"))
    days = sorted(days - {None})
    if len(days) > 1:
        ranks.print(f"warning: asked on different days ({', '.join(days)}), which some chat templates write")
    return given or ranks.gather([*days, date.today().isoformat()])[0]


def short_name(model: str) -> str:
    """A name for folders and tables: the last part, with the run's for its final/ and checkpoints/."""
    parts = [part for part in model.split("/") if part not in ("", ".", "..", "checkpoints")] or [model]
    if len(parts) > 1 and re.fullmatch(r"final|step-\d+", parts[-1]):
        parts = ["-".join(parts[-2:])]
    return re.sub(r"[@/:\\]", "-", parts[-1])


def comparison_folder(names: Sequence[str], out: str | None) -> Path:
    """The folder of several models' table and plots: `out`, or one in evals/ that is named after them.

    Raises ValueError for one that holds another table.
    """
    folder = Path(out or "evals/" + "-vs-".join(map(short_name, names))[:100])
    path = folder / "table.md"
    if path.exists() and compared(names) not in path.read_text().splitlines():
        raise ValueError(f"{path} is the table of other models: set another --out")
    return folder


def compared(names: Sequence[str]) -> str:
    """The line by which a table says whose it is."""
    quoted = [f"`{name}`" for name in names]
    return f"Compared: {', '.join(quoted)}"


def fingerprint(model: Decoder) -> str:
    """Of a sample of every tensor: a folder that was trained anew holds another model under the same name."""
    digest = blake2b(digest_size=8)
    for tensor in model.state_dict().values():
        sample = tensor.flatten()[:: max(1, tensor.numel() // 256)].float().cpu().contiguous()
        digest.update(bytes(sample.view(torch.uint8).tolist()))
    return digest.hexdigest()


if __name__ == "__main__":
    with cli.readable_errors():
        main()
