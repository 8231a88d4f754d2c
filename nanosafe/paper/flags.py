"""The flags of `python -m nanosafe.paper`. Nothing here needs PyTorch, so that --help answers at once."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from nanosafe.train.flags import positive_int

EXPERIMENTS = {1: "safety", 2: "reasoning", 3: "token entropy"}  # the paper's list
TUNING_SEED = 100  # outside the seeds that are reported


def paper_flags(description: str) -> ArgumentParser:
    parser = ArgumentParser("python -m nanosafe.paper", description=description,
                            formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", default=["tiny", "tiny-llama"],
        help="tiny, tiny-llama, tiny-granite, alias or hub id "
        "(default: %(default)s)")
    add("--seeds", type=positive_int, default=3,
        help="how many, from 0; a seed of the tiny world covers base, reward "
        "model, SFT and RL (default: %(default)s)")
    add("--out", default="runs/paper", help="(default: %(default)s)")
    add("--jobs", type=positive_int,
        help="processes side by side (default: one per core for the tiny world, else 1)")
    add("--experiments", type=int, nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS),
        help=", ".join(f"{number} {name}" for number, name in EXPERIMENTS.items()) + " (default: all)")
    add("--plan", action="store_true",
        help="only print the jobs and what they need; downloads nothing")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--ablations", action="store_true",
                       help="RL without one of its parts, or with a biased reward")
    other.add_argument("--tune", action="store_true",
                       help=f"settings on the validation split, seed {TUNING_SEED}")
    return parser
