"""Which benchmarks a model is asked: the tiny world's if it lives there, else the paper's, or those that are named."""

import re
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version

import torch

from nanosafe.evals.attacks import attacked, fits
from nanosafe.evals.benchmark import Benchmark, Grader, Question, Values
from nanosafe.evals.graders import air_bench_polarity, answer_grader, judge_graders, refusal_grader
from nanosafe.evals.judges import load_judge
from nanosafe.evals.paper_suite import BENCHMARKS, load_benchmark, training_prompts
from nanosafe.evals.tiny_suite import tiny_suite
from nanosafe.model.config import ModelConfig
from nanosafe.recipes import RECIPES

PAPER = ("attaq", "air-bench", "xstest", "math-500", "aime24", "aime25", "gpqa-diamond")  # xstest: never safety alone
DEFAULT_JUDGE = "granite-guardian"
TRAINING_SET = RECIPES["sft"]["data"]


def slug(name: str) -> str:
    """A benchmark's name as --benchmarks takes it: hyphens for spaces and commas."""
    return re.sub(r"[ ,]+", "-", name)


def tiny_part(config: ModelConfig, chosen: Sequence[str], split: str) -> list[Benchmark]:
    """The benchmarks of the tiny world among `chosen`; "tiny" or nothing at all chooses every one.

    A model of another world is asked them only where "tiny" is chosen.
    """
    style = config.raw.get("nanosafe_world") or ("okay" if "tiny" in chosen else None)
    if style is None:
        return []
    suite = {slug(benchmark.name): benchmark for benchmark in tiny_suite(split, style)}
    named = [name for name in chosen if name in suite]
    return [suite[name] for name in (named or (suite if "tiny" in chosen or not chosen else ()))]


def paper_part(names: Sequence[str], *, judges: Sequence[str] | None, attacks: Sequence[str], files: Mapping[str, str],
               training: str | None, seed: int, device: torch.device, dtype: torch.dtype,
               bounds: tuple[float, float] | None = None) -> list[Benchmark]:
    """The benchmarks `names` of the table in benchmarks.py, each followed by its forms under the attacks that fit it.

    judges: specs of judges.load_judge, the first for the headline figures (None: Granite Guardian, where a benchmark
    cannot do without); on `device` only while they judge. files: in place of the table's sources. training: SFT data
    whose prompts are left out of the headline figures, or "none" (None: TRAINING_SET). Raises what load_benchmark,
    load_judge and attacked raise.
    """
    kinds = {BENCHMARKS[name].grader for name in names}
    specs = judges or [DEFAULT_JUDGE] * bool(kinds & {"harm", "air-bench", "strongreject"})
    graders: dict[str, tuple[Grader, str]] = {
        "math": (answer_grader("math"), f"math-verify {version('math-verify')}"),
        "integer": (answer_grader("integer"), "integer of the answer"),
        "letter": (answer_grader("letter"), "letter of the answer"),
        "refusal": (refusal_grader(None), "rule of refusal phrases"),
    }
    loaded = [load_judge(spec, device=device, dtype=dtype, bounds=bounds, offload=True) for spec in specs]
    if loaded:
        made = [judge_graders(judge) for judge in loaded]
        graders |= {kind: _side_by_side([of[kind] for of in made]) for kind in made[0]}
    seen = _seen([name for name in names if _is_harmful(name)], files, training)
    plain = [load_benchmark(name, graders, file=files.get(name), seed=seed, seen=seen) for name in names]
    for benchmark in plain:  # what would only show after hours of generating
        if BENCHMARKS[benchmark.name].grader == "air-bench" and any(hasattr(judge, "ask") for judge in loaded):
            air_bench_polarity(benchmark.questions)
    for attack in attacks:
        if not any(fits(attack, benchmark) for benchmark in plain):
            attacked(plain[0], attack)  # raises
    return [form for benchmark in plain for form in (
        benchmark, *(attacked(benchmark, attack) for attack in attacks if fits(attack, benchmark)))]


def _seen(harmful: Sequence[str], files: Mapping[str, str], training: str | None) -> frozenset[str]:
    """The normalised prompts of the training set. The default one, if the hub is out of reach, is
    done without where the data are the user's own."""
    try:
        wanted = harmful and training != "none"
        return training_prompts(training or TRAINING_SET) if wanted else frozenset()
    except ConnectionError as error:
        if training or set(harmful) - files.keys():
            raise
        print("warning: no question is left out for being a training prompt:", error, file=sys.stderr)
        return frozenset()


def _is_harmful(name: str) -> bool:
    return BENCHMARKS[name].how["about"] != "reasoning"


def _side_by_side(graders: Sequence[tuple[Grader, str]]) -> tuple[Grader, str]:
    """The first grader's values, with the others' behind them under their own names; equal names are one grader."""
    (name, first), *others = {name: grader for grader, name in graders}.items()
    if not others:
        return first, name

    def grade(questions: Sequence[Question], responses: Sequence[str]) -> list[Values]:
        values = first(questions, responses)
        for its_name, grader in others:
            short = re.split(r" \(|@", its_name)[0].split("/")[-1]  # model, of owner/model@commit (how it judges)
            for row, more in zip(values, grader(questions, responses), strict=True):
                row |= {f"{metric} ({short})": value for metric, value in more.items()}
        return values

    return grade, "; ".join([name, *(its_name for its_name, _ in others)])
