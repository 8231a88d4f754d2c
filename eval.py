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
    reflection                              a ReflectionSummary of the first samples (nanosafe/evals/diagnostics.py)
"""

import os

# Responses of all lengths leave a GPU's memory in pieces otherwise. PyTorch reads this when it is imported.
os.environ.setdefault(
    "PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"))

import re
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from datetime import date
from pathlib import Path

import torch

from nanosafe.evals.attacks import ATTACKS, with_attacks
from nanosafe.evals.benchmark import Benchmark, slug
from nanosafe.evals.evaluation import Evaluation
from nanosafe.evals.paper_suite import BENCHMARKS, DEFAULT_JUDGE, PAPER, TRAINING_SET, load_benchmarks, load_graders
from nanosafe.evals.plots import plot_comparison
from nanosafe.evals.tables import MEASURED, read_result, terminal, write_table
from nanosafe.evals.tiny_suite import tiny_part, tiny_suite
from nanosafe.model.config import ModelConfig
from nanosafe.names import checkpoint, load_reward
from nanosafe.parallel import Ranks
from nanosafe.train import cli

# Sections that are printed too
CONSOLE = ("Overview", "Other wordings, attacks, modes", "Memorization")


def flags() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", default=["tiny"], metavar="NAME",
        help="alias, hub id or folder; several are compared with the first (default: tiny)")
    add("--compare", nargs="+", metavar="NAME",
        help="instead of --model: folders with a result.json, taken as they are, or models, "
             "measured first")
    add("--label", nargs="+", metavar="TEXT", help="names for tables and plots, one for each model")
    add("--benchmarks",
        help=f"split by commas, of {', '.join(BENCHMARKS)} (default: {','.join(PAPER)}); or of the "
        "tiny world, as safety,arithmetic-no-thought (its models' default: all); tiny asks any "
        "model all of these")
    add("--data", nargs="+", default=[], metavar="NAME=FILE",
        help="a benchmark's data from a local file, or from "
        "owner/name@revision:file on the hub, instead of its pinned source, as math-500=test.jsonl")
    add("--attack", nargs="+", default=[], choices=ATTACKS, metavar="NAME",
        help="also ask each of the paper's "
        f"benchmarks wrapped in these: {', '.join(ATTACKS)}")
    add("--judge", nargs="+", metavar="NAME",
        help=f"of harm: {DEFAULT_JUDGE} (default), llama-guard-3, another guard, "
        "chat or reward model (alias, hub id, folder), endpoint:MODEL@URL (its key in "
        "JUDGE_API_KEY), or rule:refusal; the first gives the headline figures")
    add("--judge-bounds", nargs=2, type=cli.finite_float, metavar=("LOW", "HIGH"),
        help="of a reward model as --judge: the scores that count as wholly harmful and wholly safe")
    add("--regrade", action="store_true",
        help="ask the judge again about responses that it has judged")
    add("--training-prompts", metavar="FILE",
        help="SFT data (hub id or file) whose prompts are left "
        f"out of safety's headline figures, or none (default: {TRAINING_SET}; of --data's files, "
        "none where it cannot be reached)")
    add("--thinking", **cli.THINKING)
    add("--date", **cli.DATE)
    add("--split", choices=("test", "validation"), default="test",
        help="of the tiny world (default: %(default)s)")
    add("--samples", type=cli.positive_int,
        help="responses to each question (default: the benchmark's own)")
    add("--limit", type=cli.positive_int,
        help="questions of each benchmark, drawn by --seed (default: all)")
    add("--max-response-tokens", type=cli.positive_int, help="(default: the benchmark's own)")
    add("--reward-model",
        help="also score thought and answer with this: alias, hub id or folder, or rule:refusal")
    add("--memorization", metavar="FILE",
        help="SFT data (hub id or file): how well the model knows its responses "
        "(those of the first --limit rows)")
    add("--out",
        help="folder (default: evals/NAME, of several models evals/ and evals/NAME-vs-NAME)")
    add("--resume", choices=("auto", "never"), default="auto",
        help="auto: keep the responses that OUT holds (default); never: refuse such a folder")
    add("--seed", type=int, default=0, help="all randomness follows from it (default: %(default)s)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--dtype", choices=("float32", "bfloat16"),
        help="compute type (default: bfloat16 on cuda, float32 on cpu)")
    add("--tokens-per-microbatch", type=cli.positive_int, default=16384,
        help="of the passes that measure entropies, per process (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = flags().parse_args(argv)
    low, high = args.judge_bounds or (0.0, 1.0)
    if low >= high:
        raise ValueError(f"--judge-bounds {low} {high}: LOW must be below HIGH")
    names = args.compare or args.model
    ready = {}  # results that stand, by the name of their folder
    for name in args.compare or ():
        if (Path(name) / "result.json").exists():
            ready[name] = read_result(Path(name) / "result.json", MEASURED)
    labels = args.label
    if not labels:
        labels = [ready[name]["label"] if name in ready else short_name(name) for name in names]
    if len(labels) != len(names) or len(set(labels)) < len(labels):
        raise ValueError(f"{len(names)} models need as many different names, found "
                         f"{', '.join(labels)}: use --label")
    ranks = Ranks(args.device)
    args.dtype = args.dtype or ("bfloat16" if ranks.device.type == "cuda" else "float32")
    processes = "1 process" if ranks.world == 1 else f"{ranks.world} processes"
    ranks.print(f"{processes} on {ranks.device.type}, PyTorch {torch.__version__}")
    top, several = Path(args.out or "evals"), len(names) > 1 or bool(ready)
    together = comparison_folder(names, args.out) if several else None
    outs = [top if args.out and len(names) == 1 else top / short_name(label) for label in labels]
    args.date = comparison_date(args.date, [*map(Path, ready), *outs], ranks)
    reward, results, suite = None, [], Suite(args, ranks)
    if args.reward_model:
        with ranks.main_first():
            dtype = getattr(torch, args.dtype)
            reward = load_reward(args.reward_model, device=ranks.device, dtype=dtype,
                                 date=args.date)
    for name, label, out in zip(names, labels, outs, strict=True):
        if name in ready:
            results.append(ready[name] | {"label": label})
        else:
            with ranks.main_first():
                folder = checkpoint(name)
            benchmarks = suite.of(name, ModelConfig.from_folder(folder))
            results.append(Evaluation(name, label, folder, out, args, ranks).run(benchmarks, reward))
    if several:
        out = together
        if ranks.main:
            write_table(results, out, compared(names))
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


class Suite:
    """The benchmarks that the flags choose, for one model after another; the paper's are loaded once."""

    def __init__(self, args: Namespace, ranks: Ranks):
        self.args, self.ranks, self.paper = args, ranks, None
        self.chosen = list(dict.fromkeys(args.benchmarks.split(","))) if args.benchmarks else []
        known = ["tiny", *(slug(benchmark.name) for benchmark in tiny_suite(args.split, "okay")),
                 *BENCHMARKS]
        unknown = [name for name in self.chosen if name not in known]
        if unknown:
            raise ValueError(f"--benchmarks: no benchmark {', '.join(unknown)}; there are "
                             f"{', '.join(known)}")
        self.files = {}
        for pair in args.data:
            name, _, file = pair.partition("=")
            if name not in BENCHMARKS or not file:
                raise ValueError(f"--data {pair}: give NAME=FILE, NAME one of "
                                 f"{', '.join(BENCHMARKS)}")
            self.files[name] = file

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
                raise ValueError(f"{name} is no model of the tiny world: --benchmarks "
                                 f"tiny,{args.benchmarks} asks it that world's questions "
                                 "nevertheless")  # fmt: skip
            names = list(PAPER)
        if args.attack and not names:
            raise ValueError("--attack wraps the paper's benchmarks; the tiny world's suite has "
                             "attacks of its own")
        if names and self.paper is None:
            with self.ranks.main_first():
                graders = load_graders(names, args.judge, device=self.ranks.device,
                                       dtype=getattr(torch, args.dtype), bounds=args.judge_bounds)
                plain = load_benchmarks(names, graders, files=self.files,
                                        training=args.training_prompts,
                                        seed=args.seed)
                self.paper = with_attacks(plain, args.attack)
        return tiny + (self.paper if names else [])


if __name__ == "__main__":
    with cli.readable_errors():
        main()
