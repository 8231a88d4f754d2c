"""Which benchmarks the flags of eval.py choose: a model of the tiny world is asked that world's, others the paper's."""

from argparse import Namespace
from collections.abc import Callable
from functools import cache

import torch

from nanosafe.evals.attacks import with_attacks
from nanosafe.evals.benchmark import Benchmark, slug
from nanosafe.evals.own_questions import is_question_file, own_benchmark, read_columns
from nanosafe.evals.paper_suite import BENCHMARKS, PAPER, load_benchmarks, load_graders
from nanosafe.evals.tiny_suite import tiny_part, tiny_suite
from nanosafe.model.config import ModelConfig
from nanosafe.parallel import Ranks


def read_choice(args: Namespace) -> None:
    """Replace the texts of --benchmarks and --data by a list of names and {name: file}; ValueError for unknown ones.

    Question files become entries of args.own, under the names that they then have among args.benchmarks.
    """
    given = list(dict.fromkeys(args.benchmarks.split(","))) if args.benchmarks else []
    columns = read_columns(args.columns)
    args.own, args.benchmarks = {}, []
    for name in given:
        if is_question_file(name):
            name, args.own[name] = own_benchmark(name, args.about, columns)
        args.benchmarks.append(name)
    if columns and not args.own:
        raise ValueError("--columns is for a file of questions: give one to --benchmarks")
    tiny = [slug(benchmark.name) for benchmark in tiny_suite(args.split, "okay")]
    known = ["tiny", *tiny, *BENCHMARKS]
    for name in args.benchmarks:
        if name not in known and name not in args.own:
            raise ValueError(f"--benchmarks: no benchmark {name}; there are {', '.join(known)}, or give "
                             "a file of questions")
    files = {}
    for pair in args.data:
        name, _, file = pair.partition("=")
        if name not in BENCHMARKS or not file:
            raise ValueError(f"--data {pair}: give NAME=FILE, NAME one of {', '.join(BENCHMARKS)}")
        files[name] = file
    args.data = files


def paper_loader(args: Namespace, ranks: Ranks) -> Callable[[], list[Benchmark]]:
    """A function that loads the paper's benchmarks when the first model is asked them, and with them the judges."""

    @cache
    def load() -> list[Benchmark]:
        entries = {name: (BENCHMARKS | args.own)[name] for name in _of_the_paper(args) or PAPER}
        with ranks.local_main_first():
            graders = load_graders(entries, args.judge, device=ranks.device,
                                   dtype=getattr(torch, args.dtype), bounds=args.judge_bounds)
            plain = load_benchmarks(entries, graders, files=args.data,
                                    training=args.training_prompts, seed=args.seed)
            return with_attacks(plain, args.attack)

    return load


def _of_the_paper(args: Namespace) -> list[str]:
    """The chosen ones of the paper's, and question files."""
    return [name for name in args.benchmarks if name in BENCHMARKS or name in args.own]


def choose_benchmarks(name: str, config: ModelConfig, args: Namespace,
                      load_paper: Callable[[], list[Benchmark]]) -> list[Benchmark]:
    """Those that the model `name` is asked; raises ValueError where the flags choose none for it."""
    tiny, paper = tiny_part(config, args.benchmarks, args.split), _of_the_paper(args)
    if not tiny and not paper and args.benchmarks:
        raise ValueError(f"{name} is no model of the tiny world: --benchmarks "
                         f"tiny,{','.join(args.benchmarks)} asks it that world's questions "
                         "nevertheless")
    if not tiny and not paper:
        paper = list(PAPER)
    unused = sorted(args.data.keys() - set(paper))
    if unused:
        raise ValueError(f"--data {' '.join(unused)}: {name} is not asked that: name it in "
                         "--benchmarks, or leave the file out")
    if args.attack and not paper:
        raise ValueError("--attack wraps the paper's benchmarks; the tiny world's suite has attacks "
                         "of its own")
    return tiny + (load_paper() if paper else [])
