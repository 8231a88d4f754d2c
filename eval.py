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

import nanosafe  # noqa: F401  First, for it sets what PyTorch reads when it is imported.
from nanosafe.evals.flags import eval_flags

if __name__ == "__main__":
    eval_flags(__doc__).parse_args()  # --help and wrong flags end here, before the seconds that PyTorch takes to load

# isort: split
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

from nanosafe.evals.choice import paper_loader, read_choice
from nanosafe.evals.comparison import plot_comparison
from nanosafe.evals.evaluation import Shared, evaluate
from nanosafe.evals.results import Result, read_result
from nanosafe.evals.tables import terminal, write_table
from nanosafe.names import checkpoint, load_reward, load_rows
from nanosafe.parallel import Ranks
from nanosafe.sampler.params import SamplingParams
from nanosafe.train import cli

# Sections that are printed too
CONSOLE = ("Overview", "Other wordings, attacks, modes", "Memorization")


def main(argv: list[str] | None = None) -> None:
    args = eval_flags(__doc__).parse_args(argv)
    low, high = args.judge_bounds or (0.0, 1.0)
    if low >= high:
        raise ValueError(f"--judge-bounds {low} {high}: LOW must be below HIGH")
    SamplingParams(args.temperature or 0.0, 1.0 if args.top_p is None else args.top_p)  # or a ValueError
    read_choice(args)
    names, measured = args.compare or args.model, {}  # measured: the results that stand, by name
    for name in args.compare or ():
        if (Path(name) / "result.json").exists():
            measured[name] = read_result(Path(name) / "result.json")
    labels = args.label or [measured[name].label if name in measured else short_name(name) for name in names]
    if len(labels) != len(names) or len(set(labels)) < len(labels):
        raise ValueError(f"{len(names)} models need as many different names, found "
                         f"{', '.join(labels)}: use --label")
    ranks = Ranks(args.device)
    args.dtype = args.dtype or ("bfloat16" if ranks.device.type == "cuda" else "float32")
    processes = "1 process" if ranks.world == 1 else f"{ranks.world} processes"
    ranks.print(f"{processes} on {ranks.device.type}, PyTorch {torch.__version__}")
    # Each model is measured in a folder of its own; a comparison has one for its table and plots.
    outs = [Path(args.out or "evals") / short_name(label) for label in labels]
    if args.out and len(names) == 1:
        outs = [Path(args.out)]
    is_comparison = len(names) > 1 or bool(measured)
    table_folder = comparison_folder(names, args.out) if is_comparison else outs[0]
    args.date = comparison_date(args.date, [*measured.values(), *results_in(outs)], ranks)
    reward, results = None, []
    if args.reward_model:
        with ranks.local_main_first():
            reward = load_reward(args.reward_model, device=ranks.device,
                                 dtype=getattr(torch, args.dtype), date=args.date)
    # What is missing is said before the first model is measured.
    with ranks.local_main_first():
        for name in names:
            if name not in measured:
                checkpoint(name, weights=False)
        if args.memorization:
            load_rows(args.memorization)
    shared = Shared(args, ranks, paper_loader(args, ranks), reward)
    for name, label, out in zip(names, labels, outs, strict=True):
        if name in measured:
            results.append(replace(measured[name], label=label))
        else:
            results.append(evaluate(name, label, out, shared))
    if is_comparison and ranks.main:
        write_table(results, table_folder, compared(names))
        ranks.print("drew", *plot_comparison(results, table_folder))
    ranks.print(f"\n{terminal(results, CONSOLE)}\n\nall of it is in {table_folder}/table.md")
    ranks.wait()
    ranks.close()


def results_in(folders: Sequence[Path]) -> list[Result]:
    files = [folder / "result.json" for folder in folders]
    return [read_result(file) for file in files if file.exists()]


def comparison_date(given: str | None, measured: Sequence[Result], ranks: Ranks) -> str:
    """The day that templates of a comparison write: `given`, a measured result's, or today."""
    days = sorted({result.settings.get("date") for result in measured} - {None})
    if len(days) > 1:
        ranks.print(f"warning: asked on different days ({', '.join(days)}), which some chat "
                    "templates write")
    return given or ranks.gather([*days, date.today().isoformat()])[0]


def short_name(model: str) -> str:
    """A name for folders and tables: the last part, with the run's for its final/ and checkpoints/."""
    unnamed = ("", ".", "..", "checkpoints")
    parts = [part for part in model.split("/") if part not in unnamed] or [model]
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


if __name__ == "__main__":
    with cli.readable_errors():
        main()
