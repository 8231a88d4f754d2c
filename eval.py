"""Measure models on the benchmarks and compare them.

    python eval.py --model tiny                                       # safety, over-refusal, reasoning, diagnostics
    python eval.py --model tiny runs/sft-tiny/final runs/rl-tiny/final      # the first is the base of the comparison
    python eval.py --model qwen3-8b runs/rl-qwen3-8b/final --limit 50       # the paper's benchmarks, a quick look
    python eval.py --model r1-qwen-7b --benchmarks attaq,xstest --attack role-play badchain --judge llama-guard-3
    python eval.py --compare evals/tiny evals/rl-tiny-final           # the same, from results that stand
    python eval.py --compare tiny runs/rl-tiny/checkpoints/*          # also draws safety and reasoning over the steps
    torchrun --nproc_per_node=2 eval.py --model tiny

A model of the tiny world is asked that world's questions, any other the paper's benchmarks. OUT holds records.jsonl
(every response with its grades, see nanosafe/evals/results.py), result.json and table.md; of several models each has
its own folder in OUT, and the comparison is OUT's table.md and plots. A response is kept as soon as it ends: the same
command goes on where it was stopped, and a complete one only grades again (a model's verdicts only with --regrade).

result.json: model, label, step and run (of a checkpoint in a run folder, else null), settings (with a fingerprint of
the weights), memorization (null, or a part) and benchmarks, {name: part}. An estimate is {mean, low, high, n, over}. A
part has:

    about, headline, shown, variation, source, judge    of the benchmark (nanosafe/evals/benchmark.py)
    protocol, responses                     how it was sampled and judged; number of responses
    metrics, diagnostics                    {metric: estimate} of the grader (and pass@k), and of the responses' form
    bounds                                  null, or the headline's mean if every response without a verdict counted 0,
                                            and if it counted 1
    categories                              {category: {metric: estimate}}
    items, category_of                      {metric: {question id: mean}}, {question id: category}, for differences
    with_training_prompts                   null, or {training_prompts: questions that all the above leaves out since
                                            they stand among the training prompts, metrics: with them}
    reflection, forking, entropy_curve      a ReflectionSummary, ForkingSummary and EntropyCurve of the first samples
                                            (nanosafe/evals/diagnostics.py)
"""

import os

# Responses of all lengths leave a GPU's memory in pieces otherwise. PyTorch reads this when it is imported.
os.environ.setdefault(
    "PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"))

import json
import re
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from datetime import date
from hashlib import blake2b
from pathlib import Path

import torch

from nanosafe.evals.attacks import ATTACKS, with_attacks
from nanosafe.evals.benchmark import Benchmark, adapt, slug
from nanosafe.evals.diagnostics import memorization, reflection_ids
from nanosafe.evals.paper_suite import BENCHMARKS, DEFAULT_JUDGE, PAPER, TRAINING_SET, load_benchmarks, load_graders
from nanosafe.evals.plots import plot_comparison
from nanosafe.evals.results import RecordFile
from nanosafe.evals.run import add_rewards, protocol, respond, summarize
from nanosafe.evals.statistics import Estimate, over_items
from nanosafe.evals.tables import PART, forking_tokens, protocols, read_result, table, terminal
from nanosafe.evals.tiny_suite import tiny_part, tiny_suite
from nanosafe.evals.unitxt import write_unitxt
from nanosafe.io.files import digest, misfit, write_atomic
from nanosafe.io.locks import hold
from nanosafe.model.config import ModelConfig
from nanosafe.model.decoder import Decoder
from nanosafe.names import checkpoint, load_model, load_reward, load_rows, load_tokenizer
from nanosafe.parallel import Ranks
from nanosafe.text.data import sft_documents
from nanosafe.train import cli
from nanosafe.train.rewards import Reward

MEASURED = PART | {"protocol": dict}
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


def main(argv: list[str] | None = None) -> None:
    args = flags().parse_args(argv)
    low, high = args.judge_bounds or (0.0, 1.0)
    if low >= high:
        raise ValueError(f"--judge-bounds {low} {high}: LOW must be below HIGH")
    names = args.compare or args.model
    ready = {name: read_result(Path(name) / "result.json", MEASURED) for name in args.compare or ()
             if (Path(name) / "result.json").exists()}
    labels = args.label or [ready[name]["label"] if name in ready else short_name(name) for name in names]
    if len(labels) != len(names) or len(set(labels)) < len(labels):
        raise ValueError(f"{len(names)} models need as many different names, found {', '.join(labels)}: use --label")
    ranks = Ranks(args.device)
    args.dtype = args.dtype or ("bfloat16" if ranks.device.type == "cuda" else "float32")
    ranks.print(f"{ranks.world} process{'es' * (ranks.world > 1)} on {ranks.device.type}, PyTorch {torch.__version__}")
    top, several = Path(args.out or "evals"), len(names) > 1 or bool(ready)
    together = comparison_folder(names, args.out) if several else None
    outs = [top if args.out and len(names) == 1 else top / short_name(label) for label in labels]
    args.date = comparison_date(args.date, [*map(Path, ready), *outs], ranks)
    reward, results, suite = None, [], Suite(args, ranks)
    if args.reward_model:
        with ranks.main_first():
            dtype = getattr(torch, args.dtype)
            reward = load_reward(args.reward_model, device=ranks.device, dtype=dtype, date=args.date)
    for name, label, out in zip(names, labels, outs, strict=True):
        if name in ready:
            results.append(ready[name] | {"label": label})
        else:
            results.append(Evaluation(name, label, out, args, ranks, suite).run(reward))
    if several:
        out = together
        write_table(results, out, ranks, compared(names))
        if ranks.main:
            ranks.print("drew", *plot_comparison(results, out))
    ranks.print(f"\n{terminal(results, CONSOLE)}\n\nall of it is in {out}/table.md")
    ranks.wait()
    ranks.close()


def comparison_date(given: str | None, folders: list[Path], ranks: Ranks) -> str:
    """The day that templates of a comparison write: `given`, a measured result's, or today."""
    files = [folder / "result.json" for folder in folders if (folder / "result.json").exists()]
    found = set()
    for file in files:
        settings = read_result(file, MEASURED).get("settings")
        if isinstance(settings, dict) and settings.get("date"):
            found.add(settings["date"])
    if len(found) > 1:
        days = ", ".join(sorted(found))
        ranks.print(f"warning: asked on different days ({days}), which some chat templates write")
    return given or ranks.gather([*sorted(found), date.today().isoformat()])[0]


def short_name(model: str) -> str:
    """A name for folders and tables: the last part, with the run's for its final/ and checkpoints/."""
    *parents, last = [part for part in model.split("/") if part not in ("", ".", "..", "checkpoints")] or [model]
    belongs = parents and re.fullmatch(r"final|step-\d+", last)
    return re.sub(r"[@/:\\]", "-", f"{parents[-1]}-{last}" if belongs else last)


def comparison_folder(names: list[str], out: str | None) -> Path:
    """Of the table and plots of several models: `out`, or one in evals/ that is named after them.

    Raises ValueError for one that holds another table.
    """
    folder = Path(out or "evals/" + "-vs-".join(map(short_name, names))[:100])
    path = folder / "table.md"
    if path.exists() and compared(names) not in path.read_text().splitlines():
        raise ValueError(f"{path} is the table of other models: set another --out")
    return folder


def compared(names: list[str]) -> str:
    """The line by which a table says whose it is."""
    return f"Compared: {', '.join(f'`{name}`' for name in names)}"


def write_table(results: list[dict], folder: Path, ranks: Ranks, title: str = "") -> None:
    text = f"{title}\n\n{table(results)}\n\n**Protocol**\n\n{protocols(results)}\n"
    if lines := forking_tokens(results):
        text += "\n".join(["\n**Forking tokens** (those in the top fifth by entropy; nats)", *lines, ""])
    if ranks.main:
        write_atomic(folder / "table.md", text.lstrip().encode())


class Suite:
    """The benchmarks that the flags choose, for one model after another; the paper's are loaded once."""

    def __init__(self, args: Namespace, ranks: Ranks):
        self.args, self.ranks, self.paper = args, ranks, None
        self.chosen = list(dict.fromkeys(args.benchmarks.split(","))) if args.benchmarks else []
        known = ["tiny", *(slug(benchmark.name) for benchmark in tiny_suite(args.split, "okay")), *BENCHMARKS]
        if unknown := [name for name in self.chosen if name not in known]:
            raise ValueError(f"--benchmarks: no benchmark {', '.join(unknown)}; there are {', '.join(known)}")
        pairs = [pair.partition("=") for pair in args.data]
        if wrong := [name + sign + file for name, sign, file in pairs if name not in BENCHMARKS or not file]:
            raise ValueError(f"--data {wrong[0]}: give NAME=FILE, NAME one of {', '.join(BENCHMARKS)}")
        self.files = {name: file for name, _, file in pairs}

    def of(self, name: str, config: ModelConfig) -> list[Benchmark]:
        """Those that the model in `name` is asked; raises ValueError where the flags choose none for it."""
        args, tiny = self.args, tiny_part(config, self.chosen, self.args.split)
        names = [one for one in self.chosen if one in BENCHMARKS]
        unused = sorted(self.files.keys() - set(names or PAPER))
        if unused or self.files and tiny and not names:
            raise ValueError(f"--data {' '.join(unused or self.files)}: {name} is not asked that: "
                             "name it in --benchmarks, or leave the file out")
        if not tiny and not names:
            if self.chosen:
                raise ValueError(f"{name} is no model of the tiny world: --benchmarks tiny,{args.benchmarks} asks it "
                                 "that world's questions nevertheless")  # fmt: skip
            names = list(PAPER)
        if args.attack and not names:
            raise ValueError("--attack wraps the paper's benchmarks; the tiny world's suite has attacks of its own")
        if names and self.paper is None:
            with self.ranks.main_first():
                graders = load_graders(names, args.judge, device=self.ranks.device,
                                       dtype=getattr(torch, args.dtype), bounds=args.judge_bounds)
                plain = load_benchmarks(names, graders, files=self.files, training=args.training_prompts,
                                        seed=args.seed)
                self.paper = with_attacks(plain, args.attack)
        return tiny + (self.paper if names else [])


class Evaluation:
    """One model, and the folder of its result."""

    def __init__(self, name: str, label: str, out: Path, args: Namespace, ranks: Ranks, suite: Suite):
        """Load it and open the folder; raises ValueError if that holds the responses of other weights or settings."""
        self.args, self.ranks, self.out = args, ranks, out
        with ranks.main_first():
            folder = checkpoint(name)
        self.suite = suite.of(name, ModelConfig.from_folder(folder))
        self.tokenizer = load_tokenizer(folder)
        self.tokenizer.think(args.thinking == "on")
        self.tokenizer.date = args.date
        self.vocabulary = self.tokenizer.vocabulary()
        self.model = load_model(folder, device=ranks.device, dtype=getattr(torch, args.dtype))
        of_run = re.fullmatch(r"(.+)/checkpoints/step-(\d+)", str(folder))
        settings = {"seed": args.seed, "dtype": args.dtype, "thinking": args.thinking, "date": args.date,
                    "max_response_tokens": args.max_response_tokens, "weights": fingerprint(self.model),
                    "template": digest(self.tokenizer.chat_template)}  # fmt: skip
        self.result = {"model": name, "label": label, "run": of_run and of_run[1],
                       "step": of_run and int(of_run[2]), "settings": settings, "memorization": None,
                       "benchmarks": {}}  # fmt: skip
        self.lock = hold(out) if ranks.main else None
        self.records = RecordFile(out / "records.jsonl", ranks)
        if self.records.rows and args.resume == "never":
            raise ValueError(f"{out} already holds responses: use --resume auto to keep them, or another --out")
        if self.records.rows:
            path = out / "result.json"
            old = read_result(path, MEASURED) if path.exists() else {}
            before = {} if misfit(old, {"settings": dict}) else old["settings"]
            changed = [f"{key} was {before.get(key)}, is {settings[key]}" for key in settings
                       if before.get(key) != settings[key]]  # fmt: skip
            if changed:
                raise ValueError(f"{out} holds responses of another model or evaluation ({'; '.join(changed)}): "
                                 "set another --out, or delete it")
            self.result["memorization"] = old.get("memorization")
            self.result["benchmarks"] = old["benchmarks"]
        ranks.wait()  # every rank has read the folder before rank 0 changes it

    def run(self, reward: Reward | None) -> dict:
        """Measure what --benchmarks and --memorization name; result.json grows by each."""
        args = self.args
        asked = [adapt(benchmark, seed=args.seed, samples=args.samples, limit=args.limit,
                       max_response_tokens=args.max_response_tokens) for benchmark in self.suite]
        for benchmark in asked:
            self.check(benchmark)
        self.save()
        reflection = reflection_ids(self.tokenizer)
        for benchmark, whole in zip(asked, self.suite, strict=True):
            self.measure(benchmark, len(whole.questions), reflection, reward)
        if self.args.memorization:
            self.result["memorization"] = self.memorized()
            self.save()
        write_table([self.result], self.out, self.ranks)
        return self.result

    def check(self, benchmark: Benchmark) -> None:
        """Raise ValueError for a benchmark of other data, or of less of it than result.json holds.

        Less is what is wanted where --out names the folder itself; the responses are kept anyway.
        """
        before = self.result["benchmarks"].get(benchmark.name)
        if before and before["source"] != benchmark.source:
            raise ValueError(f"{self.out} holds {benchmark.name} from {before['source']}, now it is "
                             f"from {benchmark.source}: set another --out")
        held = before["protocol"]["questions"] if before else 0
        if len(benchmark.questions) < held and self.out != Path(self.args.out or ""):
            raise ValueError(
                f"{self.out}/result.json holds {held} questions of {benchmark.name}, --limit would leave "
                f"{len(benchmark.questions)}: --compare {self.out} takes it as it is, or set another --out"
            )

    def measure(self, benchmark: Benchmark, total: int, reflection: list[int], reward: Reward | None) -> None:
        start, before = time.perf_counter(), len(self.records.rows)
        records = respond(
            self.model, self.tokenizer, benchmark, ranks=self.ranks, seed=self.args.seed, file=self.records,
            tokens_per_microbatch=self.args.tokens_per_microbatch, regrade=self.args.regrade,
        )  # fmt: skip
        seconds, new = time.perf_counter() - start, len(self.records.rows) - before
        if reward is not None:
            add_rewards(records, reward, self.args.reward_model, self.ranks)
            self.records.rewrite(records)
        if benchmark.name == "attaq" and self.ranks.main:
            write_unitxt(records, self.out / "attaq.unitxt.jsonl")
        part = summarize(benchmark, records, reflection, self.vocabulary)
        part["protocol"] = protocol(benchmark, self.tokenizer, total)
        self.result["benchmarks"][benchmark.name] = part
        self.save()
        done = f"{new} generated in {seconds:.0f} s" if new else "all there already"
        found = part["metrics"].get(benchmark.headline)
        self.ranks.print(f"{benchmark.name}: {benchmark.headline.replace('_', ' ')} "
                         f"{Estimate(**found) if found else 'not judged'}, {len(records)} responses, {done}")

    def memorized(self) -> dict:
        """Scores of the responses in --memorization, as a part of result.json."""
        rows, limit = load_rows(self.args.memorization), self.model.config.max_position_embeddings
        documents = [d for row in rows[: self.args.limit] for d in sft_documents(row, self.tokenizer, limit)[0]]
        if not documents:
            raise ValueError(f"--memorization {self.args.memorization}: no prompt leaves room for a response in "
                             f"the model's {limit} positions")  # fmt: skip

        def scores(part: list) -> list[dict[str, float]]:
            values = memorization(self.model, part, self.args.tokens_per_microbatch)
            return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]

        measured = self.ranks.split_work(documents, scores)
        items = {metric: {str(i): row[metric] for i, row in enumerate(measured)} for metric in measured[0]}
        return {"about": "memorization", "data": self.args.memorization, "items": items,
                "metrics": {metric: over_items(v.values())._asdict() for metric, v in items.items()}}  # fmt: skip

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


if __name__ == "__main__":
    with cli.readable_errors():
        main()
