"""The whole experiment in one command: every model, seed and arm is trained and measured, and the report is written.

    python -m nanosafe.paper                                    # the tiny world: two families, three seeds, seven arms
    python -m nanosafe.paper --model tiny-granite               # the third family: Mamba-2 and a mixture of experts
    python -m nanosafe.paper --model qwen3-8b --seeds 1 --plan  # what would run: commands, hours, memory, downloads
    python -m nanosafe.paper --ablations                        # what each part of RL does, and a biased reward model
    python -m nanosafe.paper --tune                             # as many settings of SFT as of RL, validation questions

Nothing is computed here. An arm is a line of data; a job is train_sft.py, train_rl.py, eval.py or the tiny world's
build as a process of its own, in the folder OUT/MODEL-SEED/ARM. The same command goes on where it was stopped: a
finished job has a job.json, and the scripts resume what was cut off. Jobs of the tiny world run side by side with one
thread each: for models this small that is faster than one job with all cores.
"""

import json
import re
import shlex
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from nanosafe import plan
from nanosafe.evals.benchmark import slug
from nanosafe.evals.paper_suite import BENCHMARKS
from nanosafe.evals.paper_suite import PAPER as PAPER_SUITE
from nanosafe.evals.tiny_suite import tiny_suite
from nanosafe.io.locks import hold
from nanosafe.io.machine import available_cores
from nanosafe.names import recipe, tiny_seed
from nanosafe.paper import report as paper_report
from nanosafe.paper.jobs import Job, run_jobs
from nanosafe.recipes import ALIASES
from nanosafe.tiny.build import FAMILIES, is_tiny
from nanosafe.train.cli import positive_int, readable_errors

EXPERIMENTS = {1: "safety", 2: "reasoning", 3: "token entropy"}  # the paper's list
TUNING_SEED = 100  # outside the seeds that are reported


class Arm(NamedTuple):
    name: str
    about: str
    script: str | None = None  # None: nothing is trained
    flags: str = ""  # {seed} and {style}, of the base's own thoughts, are filled in

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")


PAPER = (
    Arm("base", "the model as it is"),
    Arm("SFT", "SFT on the careful responses of the SFT set", "train_sft"),
    Arm("RL", "REINFORCE++ with the reward model, on the prompts of the SFT set", "train_rl"),
)
CONTROLS = (
    Arm("SFT, own style", "SFT on careful responses to the same requests, in the base's own style of thought",
        "train_sft", "--data tiny-star-{style}@{seed}"),
    Arm("RL, shuffled labels", "RL with a reward model that was trained on coin flips: must not gain", "train_rl",
        "--reward-model tiny-reward-shuffled@{seed}"),
    Arm("RL, exact judge", "RL on the rule that judges the evaluation, as right or wrong", "train_rl",
        "--reward-model rule:tiny-judge"),
)  # fmt: skip
UNCLIPPED = "--clip-low 1 --clip-high 1e9"  # ratios are bounded to [e^-20, e^20], inside (1 - 1, 1 + 1e9)
ABLATIONS = (
    Arm("no KL", "no reference model", "train_rl", "--kl-coef 0"),
    Arm("no clip", "the ratio is never clipped", "train_rl", UNCLIPPED),
    Arm("no normalisation", "returns as they are for advantages", "train_rl", "--no-normalize"),
    Arm("answer only", "the reward model reads the answer without its thought", "train_rl", "--reward-scope answer"),
    Arm("reward for length", "its reward model was taught to prefer the longer response in a third of the pairs",
        "train_rl", "--reward-model tiny-reward-length@{seed}"),
    Arm("blind reward", "its reward model has never seen the category violence", "train_rl",
        "--reward-model tiny-reward-blind@{seed}"),
)  # fmt: skip
# Twenty settings each; the criterion is fixed in paper_report.CRITERION.
TUNING = (
    *(Arm(f"SFT lr {lr:g}, epochs {n}", "", "train_sft", f"--lr {lr:g} --epochs {n}")
      for lr in (1e-4, 2e-4, 3e-4, 1e-3) for n in (2, 3, 5, 7, 10)),
    *(Arm(f"RL lr {lr:g}, KL {kl:g}", "", "train_rl", f"--lr {lr:g} --kl-coef {kl:g}")
      for lr in (3e-5, 1e-4, 2e-4, 3e-4, 1e-3) for kl in (0.003, 0.03, 0.3, 1)),
)  # fmt: skip
# Seconds of a job of the tiny world on one core, for --plan and the time that is left: of one seed of one family on a
# 2-core machine, two jobs side by side.
SECONDS = {"build policy": 440, "build reward": 55, "train_sft step": 0.7, "train_rl step": 1.7, "eval": 32}


def flags() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", default=["tiny", "tiny-llama"], help="tiny, tiny-llama, tiny-granite, alias or hub id "
        "(default: %(default)s)")
    add("--seeds", type=positive_int, default=3, help="how many, from 0; a seed of the tiny world covers base, reward "
        "model, SFT and RL (default: %(default)s)")
    add("--out", default="runs/paper", help="(default: %(default)s)")
    add("--jobs", type=positive_int, help="processes side by side (default: one per core for the tiny world, else 1)")
    add("--experiments", type=int, nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS),
        help=", ".join(f"{number} {name}" for number, name in EXPERIMENTS.items()) + " (default: all)")
    add("--plan", action="store_true", help="only print the jobs and what they need; downloads nothing")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--ablations", action="store_true", help="RL without one of its parts, or with a biased reward")
    other.add_argument("--tune", action="store_true", help=f"settings on the validation split, seed {TUNING_SEED}")
    return parser


def main(argv: list[str] | None = None) -> None:
    args, began = flags().parse_args(argv), time.time()
    real = [model for model in args.model if tiny_seed(model) is None]
    if real and (args.ablations or args.tune):
        raise ValueError(f"{real[0]}: --ablations and --tune are of the tiny world's models")
    if odd := [model for model in args.model if model not in real and model not in FAMILIES]:
        raise ValueError(f"--model {odd[0]}: name a family, {' or '.join(FAMILIES)}; --seeds says how many seeds")
    seeds = [TUNING_SEED] if args.tune else list(range(args.seeds))
    arms = {model: arms_of(model, args) for model in args.model}
    jobs = {job.name: job for seed in seeds for model in args.model for job in jobs_of(model, seed, arms[model], args)}
    workers = args.jobs or (1 if real or torch.cuda.is_available() else available_cores())
    print(overview(list(jobs.values()), args.model, workers))
    if args.plan:
        return
    out, failed = Path(args.out), {}
    lock = hold(out)
    try:
        failed = run_jobs(list(jobs.values()), out, workers)
    finally:
        kind = "tuning" if args.tune else "ablations" if args.ablations else "report"
        with open(out / f"{kind}.jsonl", "a") as file:
            command = shlex.join(["python", "-m", "nanosafe.paper", *(sys.argv[1:] if argv is None else argv)])
            file.write(json.dumps({"command": command, "began": began, "seconds": time.time() - began}) + "\n")
        print("wrote", paper_report.write(kind, out, arms, seeds, failed))
        lock.close()
    if failed:
        raise SystemExit(1)


def arms_of(model: str, args: Namespace) -> tuple[Arm, ...]:
    if args.tune:
        return PAPER[:1] + TUNING
    if args.ablations:
        return (PAPER[0], PAPER[2]) + ABLATIONS
    return PAPER + CONTROLS * (tiny_seed(model) is not None)


def jobs_of(model: str, seed: int, arms: Sequence[Arm], args: Namespace) -> list[Job]:
    """What the arms need from the tiny world's build, then each arm's training and evaluation."""
    tiny = tiny_seed(model) is not None
    name = f"{model}@{seed}" if tiny else model
    recipes = {script: recipe(script.removeprefix("train_"), name) for script in ("train_sft", "train_rl")}
    judge, data = recipes["train_rl"]["reward_model"], recipes["train_sft"]["data"]
    jobs: list[Job] = []

    def build(checkpoint: str) -> tuple[str, ...]:
        """The name of the job that makes a checkpoint of the tiny world; none for any other."""
        if not is_tiny(checkpoint):
            return ()
        seconds = SECONDS["build reward" if "reward" in checkpoint else "build policy"]
        jobs.append(Job(f"build/{checkpoint}", ("nanosafe.tiny.build", checkpoint), seconds=seconds))
        return (jobs[-1].name,)

    gpus = 0 if tiny else torch.cuda.device_count()
    launch = ("torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}", "-m") if gpus > 1 else ()
    for arm in arms:
        folder, needs, measured = f"{folder_of(model, seed)}/{arm.slug}", build(name) + build(judge), name
        out = Path(args.out) / folder
        if arm.script:
            given = arm.flags.format(seed=seed, style=FAMILIES[model].style if tiny else None).split()
            settings = recipes[arm.script] | {flag[2:].replace("-", "_"): value for flag, value in pairwise(given)}
            needs += build(settings["reward_model"]) if arm.script == "train_rl" else ()
            command = (*launch, arm.script, "--model", name, "--seed", str(seed), "--out", str(out), *given,
                       *fitting_flags(arm.script, model, settings))
            jobs.append(Job(folder, command, "final/config.json", needs, expected(arm.script, model, settings)))
            needs, measured = (folder,), str(out / "final")
        command = (*launch, "eval", "--model", measured, "--label", arm.name, "--seed", str(seed),
                   "--out", str(out / "eval"), "--split", "validation" if args.tune else "test",
                   "--reward-model", judge, *(() if arm.script else ("--memorization", data)),
                   *benchmark_flags(model, args.experiments))
        jobs.append(Job(f"{folder}/eval", command, "result.json", needs, SECONDS["eval"] if tiny else None))
    return jobs


def folder_of(model: str, seed: int) -> str:
    return f"{model.split('/')[-1]}-{seed}"


def benchmark_flags(model: str, experiments: Sequence[int]) -> list[str]:
    """eval.py's --benchmarks for these experiments; 3 looks at the tokens of 1's and 2's main benchmarks."""
    if set(experiments) == set(EXPERIMENTS):
        return []
    if tiny_seed(model) is None:  # the paper gives entropies on AttaQ and AIME24
        suite = [(name, BENCHMARKS[name].how["about"], name in ("attaq", "aime24")) for name in PAPER_SUITE]
    else:
        suite = [(b.name, b.about, b.about != "over-refusal" and not b.variation)
                 for b in tiny_suite("test", FAMILIES[model].style)]  # fmt: skip
    wanted = [slug(name) for name, about, entropies in suite
              if (2 if about == "reasoning" else 1) in experiments or 3 in experiments and entropies]
    return ["--benchmarks", ",".join(wanted)]


def expected(script: str, model: str, options: dict) -> float | None:
    """Seconds of a training: for the tiny world from timed steps, else by plan.py; None: not known."""
    if tiny_seed(model) is not None:
        steps = options.get("steps") or float(options["epochs"]) * 500 / options["batch_size"]  # rows of tiny-star
        return steps * SECONDS[f"{script} step"]
    if (remedy := first_remedy(script, model, options)) is None:
        return None
    name, (machine, change) = script.removeprefix("train_"), remedy
    args = plan.settings(name, model, **options | change)
    return 3600 * plan.hours(name, args, machine, plan.make(name, args, machine))


def first_remedy(script: str, model: str, options: dict) -> tuple[plan.Machine, dict] | None:
    """The machine and the changes of settings with which plan.py says that a training of a real model fits."""
    if not is_known(model, options):
        return None
    name = script.removeprefix("train_")
    machine = plan.find_machine("", None, False)
    return next(plan.remedies(name, plan.settings(name, model, **options), machine), None)


def fitting_flags(script: str, model: str, options: dict) -> list[str]:
    """What a real model's training needs to fit this machine, where something does; nothing else is changed."""
    remedy = None if tiny_seed(model) is not None else first_remedy(script, model, options)
    if remedy is None or remedy[0] != plan.find_machine("", None, False) or not any(remedy[1].values()):
        return []
    return plan.as_flags(remedy[1]).split()


def is_known(model: str, options: dict) -> bool:
    """Whether the shapes of a model and of its reward model are there without a download."""
    judge = options.get("reward_model", "rule:")
    return all(name.startswith("rule:") or plan.known_config(name) for name in (model, judge))


def overview(jobs: Sequence[Job], models: Sequence[str], workers: int) -> str:
    """What is going to run and what it needs, as far as that is known."""
    unknown = sum(job.seconds is None for job in jobs)
    lines = [f"{job.name} ({'?' if job.seconds is None else format(job.seconds / 3600, '.2f')} h): "
             f"python -m {shlex.join(job.command)}" for job in jobs]  # fmt: skip
    hours = sum(job.seconds or 0 for job in jobs) / workers / 3600
    lines.append(f"{len(jobs)} jobs, {workers} at once: about {hours:.1f} h"
                 + f" without the {unknown} whose time is not known" * (unknown > 0))
    for model in models:
        if tiny_seed(model) is not None:
            lines.append(f"{model}: no download, about 1 GB of memory a job; hours as timed on a 2-core machine")
        elif not is_known(model, recipe("rl", model)):
            lines.append(f"{model}: memory, hours and downloads are not known without its config.json; "
                         f"train_rl.py --model {model} --plan fetches that")
        else:
            lines += [f"{model}: hours are estimates of train_rl.py --plan, not measured; eval.py's are not known",
                      *needs(model)]
    return "\n".join(lines)


def needs(model: str) -> list[str]:
    """Memory and downloads of a real model whose shape is known."""
    machine, lines = plan.find_machine("", None, False), []
    for script in ("sft", "rl"):
        args = plan.settings(script, model)
        found = next(plan.remedies(script, args, machine), None)
        peak = plan.gb(plan.make(script, args, machine).peak)
        lines.append(f"  {script.upper()} on {machine}: peak {peak} GB; " + (
            f"fits on {found[0]} with {plan.as_flags(found[1])}" if found else "no setting tried makes it fit"))
    sizes = {name: plan.download_bytes(name, plan.find_config(name)[0])
             for name in (model, args.reward_model, "granite-guardian")}  # fmt: skip
    lines.append("  downloads: " + ", ".join(f"{ALIASES.get(name, name).partition('@')[0]} {plan.gb(size)} GB"
                                             for name, size in sizes.items()) + "; data sets (sizes not known)")
    return lines


if __name__ == "__main__":
    with readable_errors():
        main()
