"""The whole experiment in one command: every model, seed and arm is trained and measured, and the report is written.

    python -m nanosafe.paper                                    # the tiny world: two families, three seeds, seven arms
    python -m nanosafe.paper --model tiny-granite               # the third family: Mamba-2 and a mixture of experts
    python -m nanosafe.paper --model qwen3-8b --seeds 1 --plan  # what would run: commands, hours, memory, downloads
    python -m nanosafe.paper --ablations                        # what each part of RL does, and a biased reward model
    python -m nanosafe.paper --tune                             # as many settings of SFT as of RL, validation questions

Nothing is computed here. An arm is a line of data; a job is train_sft.py, train_rl.py, eval.py or the tiny world's
build as a process of its own, in the folder OUT/MODEL-SEED/ARM. The same command goes on where it was stopped: a
finished job has a job.json, and the scripts resume what was cut off. Where all is done, it trains nothing and only
writes the report and its pictures anew. Jobs of the tiny world run side by side with one
thread each: for models this small that is faster than one job with all cores.
"""

from nanosafe.paper.flags import EXPERIMENTS, TUNING_SEED, paper_flags

if __name__ == "__main__":
    paper_flags(__doc__).parse_args()  # --help and wrong flags end here, before the seconds that PyTorch takes to load

# isort: split
import json
import re
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from itertools import product
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
from nanosafe.plan.machine import download_bytes, find_config, find_machine, gb, known_config
from nanosafe.recipes import ALIASES
from nanosafe.tiny.build import FAMILIES, is_tiny
from nanosafe.train.cli import readable_errors


class Arm(NamedTuple):
    name: str
    about: str
    script: str | None = None  # None: nothing is trained
    flags: str = ""  # {seed} and {style}, of the base's own thoughts, are filled in

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")


BASE = Arm("base", "the model as it is")
SFT = Arm("SFT", "SFT on the careful responses of the SFT set", "train_sft")
RL = Arm("RL", "REINFORCE++ with the reward model, on the prompts of the SFT set", "train_rl")
CONTROLS = (
    Arm("SFT, own style",
        "SFT on careful responses to the same requests, in the base's own style of thought",
        "train_sft", "--data tiny-star-{style}@{seed}"),
    Arm("RL, shuffled labels",
        "RL with a reward model that was trained on coin flips: must not gain", "train_rl",
        "--reward-model tiny-reward-shuffled@{seed}"),
    Arm("RL, exact judge", "RL on the rule that judges the evaluation, as right or wrong",
        "train_rl",
        "--reward-model rule:tiny-judge"),
)  # fmt: skip
# Ratios are bounded to [e^-20, e^20], inside (1 - 1, 1 + 1e9)
UNCLIPPED = "--clip-low 1 --clip-high 1e9"
ABLATIONS = (
    Arm("no KL", "no reference model", "train_rl", "--kl-coef 0"),
    Arm("no clip", "the ratio is never clipped", "train_rl", UNCLIPPED),
    Arm("no normalisation", "returns as they are for advantages", "train_rl", "--no-normalize"),
    Arm("answer only", "the reward model reads the answer without its thought", "train_rl",
        "--reward-scope answer"),
    Arm("reward for length",
        "its reward model was taught to prefer the longer response in a third of the pairs",
        "train_rl", "--reward-model tiny-reward-length@{seed}"),
    Arm("blind reward", "its reward model has never seen the category violence", "train_rl",
        "--reward-model tiny-reward-blind@{seed}"),
)  # fmt: skip
# Twenty settings each; the criterion is fixed in report.CRITERION.
TUNING = []
for lr, epochs in product((1e-4, 2e-4, 3e-4, 1e-3), (2, 3, 5, 7, 10)):
    TUNING.append(Arm(f"SFT lr {lr:g}, epochs {epochs}", "", "train_sft",
                      f"--lr {lr:g} --epochs {epochs}"))
for lr, kl in product((3e-5, 1e-4, 2e-4, 3e-4, 1e-3), (0.003, 0.03, 0.3, 1)):
    TUNING.append(Arm(f"RL lr {lr:g}, KL {kl:g}", "", "train_rl", f"--lr {lr:g} --kl-coef {kl:g}"))
# Seconds of a job of the tiny world on one core, for --plan and the time that is left: of one seed of one family on a
# 2-core machine, two jobs side by side.
SECONDS = {"build policy": 170, "build reward": 25, "train_sft step": 0.7, "train_rl step": 1.7,
           "eval": 32}


def main(argv: list[str] | None = None) -> None:
    args, began = paper_flags(__doc__).parse_args(argv), time.time()
    real = [model for model in args.model if tiny_seed(model) is None]
    if real and (args.ablations or args.tune):
        raise ValueError(f"{real[0]}: --ablations and --tune are of the tiny world's models")
    for model in args.model:
        if model not in real and model not in FAMILIES:
            raise ValueError(f"--model {model}: name a family, {' or '.join(FAMILIES)}; --seeds "
                             "says how many seeds")
    seeds = [TUNING_SEED] if args.tune else list(range(args.seeds))
    arms = {model: arms_of(model, args) for model in args.model}
    jobs: dict[str, Job] = {}  # by name: several arms need the same builds
    for seed in seeds:
        for model in args.model:
            jobs |= {job.name: job for job in jobs_of(model, seed, arms[model], args)}
    side_by_side = 1 if real or torch.cuda.is_available() else available_cores()
    workers = args.jobs or side_by_side
    print(overview(list(jobs.values()), args.model, workers))
    if args.plan:
        return
    kind = "report"
    if args.tune or args.ablations:
        kind = "tuning" if args.tune else "ablations"
    out, failed = Path(args.out), {}
    lock, sessions = hold(out), out / f"{kind}.jsonl"
    commit = paper_report.commit()  # Now: who works on the files while jobs run may commit.
    only_report = sessions.exists() and all(job.is_done(out) for job in jobs.values())
    try:
        failed = run_jobs(list(jobs.values()), out, workers)
    finally:
        if not only_report:  # Written anew, a report says how its numbers came about, which has not changed.
            command = shlex.join(["python", "-m", "nanosafe.paper",
                                  *(sys.argv[1:] if argv is None else argv)])
            session = {"command": command, "commit": commit, "began": began,
                       "seconds": time.time() - began}
            with open(sessions, "a") as file:
                file.write(json.dumps(session) + "\n")
        print("wrote", paper_report.write(kind, out, arms, seeds, failed))
        lock.close()
    if failed:
        raise SystemExit(1)


def arms_of(model: str, args: Namespace) -> tuple[Arm, ...]:
    if args.tune:
        return (BASE, *TUNING)
    if args.ablations:
        return (BASE, RL, *ABLATIONS)
    if tiny_seed(model) is None:
        return (BASE, SFT, RL)
    return (BASE, SFT, RL, *CONTROLS)


def jobs_of(model: str, seed: int, arms: Sequence[Arm], args: Namespace) -> list[Job]:
    """What the arms need from the tiny world's build, then each arm's training and evaluation."""
    tiny = tiny_seed(model) is not None
    name = f"{model}@{seed}" if tiny else model
    style = FAMILIES[model].style if tiny else None
    judge, data = recipe("rl", name)["reward_model"], recipe("sft", name)["data"]
    gpus = 0 if tiny else torch.cuda.device_count()
    launch = ("torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}",
              "-m") if gpus > 1 else ()
    jobs: list[Job] = []
    for arm in arms:
        folder = f"{folder_of(model, seed)}/{arm.slug}"
        out, measured = Path(args.out) / folder, name
        settings = {}
        if arm.script:
            flags = arm.flags.format(seed=seed, style=style).split()
            settings = dict(recipe(arm.script.removeprefix("train_"), name))
            for flag, value in zip(flags[::2], flags[1::2], strict=False):  # not --no-normalize, which stands alone
                settings[flag.removeprefix("--").replace("-", "_")] = value
        made = builds(name, judge, settings.get("reward_model", ""))  # SFT has none
        jobs += made
        needs = tuple(job.name for job in made)
        if arm.script:
            training = training_of(arm.script, model, settings)
            command = (*launch, arm.script, "--model", name, "--seed", str(seed), "--out", str(out),
                       *flags, *training.flags)
            jobs.append(Job(folder, command, "final/config.json", needs, training.seconds))
            needs, measured = (folder,), str(out / "final")
        command = (*launch, "eval", "--model", measured, "--label", arm.name, "--seed", str(seed),
                   "--out", str(out / "eval"), "--split", "validation" if args.tune else "test",
                   "--reward-model", judge)
        if not arm.script:
            command += ("--memorization", data)
        command += tuple(benchmark_flags(model, args.experiments))
        jobs.append(Job(f"{folder}/eval", command, "result.json", needs,
                        SECONDS["eval"] if tiny else None))
    return jobs


def builds(*checkpoints: str) -> list[Job]:
    """The jobs that make those of the checkpoints that are of the tiny world."""
    jobs = []
    for checkpoint in checkpoints:
        if is_tiny(checkpoint):
            seconds = SECONDS["build reward" if "reward" in checkpoint else "build policy"]
            jobs.append(Job(f"build/{checkpoint}", ("nanosafe.tiny.build", checkpoint), seconds=seconds))
    return jobs


def folder_of(model: str, seed: int) -> str:
    return f"{model.split('/')[-1]}-{seed}"


def benchmark_flags(model: str, experiments: Sequence[int]) -> list[str]:
    """eval.py's --benchmarks for these experiments; 3 looks at the tokens of 1's and 2's main benchmarks."""
    if set(experiments) == set(EXPERIMENTS):
        return []
    suite = []  # (name, what it is about, whether experiment 3 looks at it)
    if tiny_seed(model) is None:  # the paper gives entropies on AttaQ and AIME24
        for name in PAPER_SUITE:
            suite.append((name, BENCHMARKS[name].benchmark["about"], name in ("attaq", "aime24")))
    else:
        for benchmark in tiny_suite("test", FAMILIES[model].style):
            main = benchmark.about != "over-refusal" and not benchmark.variation
            suite.append((slug(benchmark.name), benchmark.about, main))
    wanted = []
    for name, about, main in suite:
        experiment = 2 if about == "reasoning" else 1
        if experiment in experiments or (main and 3 in experiments):
            wanted.append(name)
    return ["--benchmarks", ",".join(wanted)]


class Training(NamedTuple):
    """What is known beforehand of a training."""

    flags: list[str]  # that make it fit this machine; nothing else is changed
    seconds: float | None  # expected; None: not known
    about: str = ""  # memory, in words


def training_of(script: str, model: str, settings: dict) -> Training:
    """Of the tiny world by timed steps, of a real model by the plan, as far as its shape is known."""
    if tiny_seed(model) is not None:
        # Rows of tiny-star
        steps = settings.get("steps") or float(settings["epochs"]) * 500 / settings["batch_size"]
        return Training([], steps * SECONDS[f"{script} step"])
    if not is_known(model, settings):
        return Training([], None)
    name, here = script.removeprefix("train_"), find_machine("", None, False)
    args = plan.settings(name, model, **settings)
    about = f"{name.upper()} on {here}: peak {gb(plan.make(name, args, here).peak)} GB; "
    machine, change = next(plan.remedies(name, args, here), (None, {}))
    if machine is None:
        return Training([], None, f"{about}no setting tried makes it fit")
    flags = plan.as_flags(change)
    changed = Namespace(**vars(args) | change)
    hours = plan.hours(name, changed, machine, plan.make(name, changed, machine))
    fits_here = machine == here and any(change.values())
    return Training(flags.split() if fits_here else [], 3600 * hours,
                    f"{about}fits on {machine} with {flags}")


def is_known(model: str, settings: dict) -> bool:
    """Whether the shapes of a model and of its reward model are there without a download."""
    judge = settings.get("reward_model", "rule:")
    return all(name.startswith("rule:") or known_config(name) for name in (model, judge))


def overview(jobs: Sequence[Job], models: Sequence[str], workers: int) -> str:
    """What is going to run and what it needs, as far as that is known."""
    lines = []
    for job in jobs:
        hours = "?" if job.seconds is None else f"{job.seconds / 3600:.2f}"
        lines.append(f"{job.name} ({hours} h): python -m {shlex.join(job.command)}")
    hours = sum(job.seconds or 0 for job in jobs) / workers / 3600
    unknown = sum(job.seconds is None for job in jobs)
    but = f" without the {unknown} whose time is not known" if unknown else ""
    lines.append(f"{len(jobs)} jobs, {workers} at once: about {hours:.1f} h{but}")
    for model in models:
        if tiny_seed(model) is not None:
            lines.append(f"{model}: no download, about 1 GB of memory a job; hours as timed on a "
                         "2-core machine")
        elif not is_known(model, recipe("rl", model)):
            lines.append(f"{model}: memory, hours and downloads are not known without its "
                         f"config.json; train_rl.py --model {model} --plan fetches that")
        else:
            lines.append(f"{model}: hours are estimates of train_rl.py --plan, not measured; "
                         "eval.py's are not known")
            for script in ("sft", "rl"):
                lines.append(f"  {training_of(f'train_{script}', model, recipe(script, model)).about}")
            lines.append(f"  downloads: {downloads(model)}; data sets (sizes not known)")
    return "\n".join(lines)


def downloads(model: str) -> str:
    sizes = []
    for name in (model, recipe("rl", model)["reward_model"], "granite-guardian"):
        size = gb(download_bytes(name, find_config(name)[0]))
        sizes.append(f"{ALIASES.get(name, name).partition('@')[0]} {size} GB")
    return ", ".join(sizes)


if __name__ == "__main__":
    with readable_errors():
        main()
