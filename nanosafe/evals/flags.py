"""The flags of eval.py and of the calibration. Nothing here needs PyTorch, so that --help answers at once."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from nanosafe.recipes import RECIPES
from nanosafe.train.flags import DATE, THINKING, finite_float, positive_int

# As in attacks.py and paper_suite.py, which import PyTorch.
ATTACKS = ("prefilled-thought", "role-play", "refusal-suppression", "badchain", "darkmind")
BENCHMARKS = ("attaq", "air-bench", "air-bench-full", "xstest", "xstest-unsafe", "strongreject", "math-500",
              "aime24", "aime25", "gpqa-diamond")
PAPER = ("attaq", "air-bench", "xstest", "math-500", "aime24", "aime25", "gpqa-diamond")
DEFAULT_JUDGE = "granite-guardian"
TRAINING_SET = RECIPES["sft"]["data"]


def eval_flags(description: str) -> ArgumentParser:
    """The flags of eval.py."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", default=["tiny"], metavar="NAME",
        help="alias, hub id or folder; several are compared with the first (default: tiny)")
    add("--compare", nargs="+", metavar="NAME",
        help="instead of --model: folders with a result.json, taken as they are, or models, "
             "measured first")
    add("--label", nargs="+", metavar="TEXT", help="names for tables and plots, one for each model")
    add("--benchmarks",
        help=f"split by commas, of {', '.join(BENCHMARKS)} (default: {','.join(PAPER)}); or of the "
        "tiny world, as safety,arithmetic-no-thought (tiny: all of these, the default of that world's "
        "models); or a file of your own questions: .json, .jsonl, .csv or .parquet")
    add("--about", choices=("safety", "over-refusal", "reasoning"), default="safety",
        help="of a file given to --benchmarks: what its questions are about, which decides how they are "
        "sampled and graded (default: %(default)s)")
    add("--columns", nargs="+", default=[], metavar="COLUMN=NAME",
        help="of such a file: its names for prompt, category and answer, where they are not found "
        "(HarmBench's, AdvBench's and the like are)")
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
    add("--judge-bounds", nargs=2, type=finite_float, metavar=("LOW", "HIGH"),
        help="of a reward model as --judge: the scores that count as wholly harmful and wholly safe")
    add("--regrade", action="store_true",
        help="ask the judge again about responses that it has judged")
    add("--training-prompts", metavar="FILE",
        help="SFT data (hub id or file) whose prompts are left "
        f"out of safety's headline figures, or none (default: {TRAINING_SET}; of --data's files, "
        "none where it cannot be reached)")
    add("--thinking", **THINKING)
    add("--date", **DATE)
    add("--split", choices=("test", "validation"), default="test",
        help="of the tiny world (default: %(default)s)")
    add("--samples", type=positive_int,
        help="responses to each question, of a benchmark that is not greedy (default: the benchmark's own)")
    add("--temperature", type=finite_float, metavar="T",
        help="of all benchmarks, 0 is greedy (default: the benchmark's own)")
    add("--top-p", type=finite_float, metavar="P", help="(default: the benchmark's own)")
    add("--limit", type=positive_int,
        help="questions of each benchmark, drawn by --seed (default: all)")
    add("--max-response-tokens", type=positive_int, help="(default: the benchmark's own)")
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
    add("--tokens-per-microbatch", type=positive_int, default=16384,
        help="of the passes that measure entropies, per process (default: %(default)s)")
    return parser


def calibration_flags(description: str) -> ArgumentParser:
    """The flags of nanosafe/evals/calibration.py."""
    parser = ArgumentParser("python -m nanosafe.evals.calibration", description=description,
                            formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--reward-model", nargs="+", required=True, metavar="NAME",
        help="alias, hub id or folder, or rule:NAME; several are compared")
    add("--data", required=True, metavar="FILE",
        help="labelled texts or pairs: file, hub id, or tiny-pairs")
    add("--out", help="folder for calibration.json (default: only print)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--dtype", choices=("float32", "bfloat16"),
        help="compute type (default: bfloat16 on cuda, float32 on cpu)")
    return parser
