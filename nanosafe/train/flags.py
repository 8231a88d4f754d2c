"""The flags of the training scripts. Nothing here needs PyTorch, so that --help and a wrong flag answer at once."""

import argparse
from argparse import ArgumentParser, ArgumentTypeError
from datetime import date

from nanosafe.recipes import RECIPES, TINY_RECIPES

LARGEST = 3.4028234663852886e38  # of float32, in which settings are used
# As in train/reinforce.py and model/recompute.py, which import PyTorch.
KL_KINDS, ESTIMATORS = ("k1", "k2", "k3"), ("reinforce++", "reinforce++-baseline")
RECOMPUTE = ("none", "some", "layer")


def iso_date(text: str) -> str:
    return date.fromisoformat(text).isoformat()


# Of every script that renders prompts.
THINKING = dict(
    choices=("on", "off"), default="on",
    help="whether the chat template asks for a thought, where it can do both: Qwen3, Granite "
    "(default: %(default)s)",
)
DATE = dict(
    type=iso_date, metavar="YYYY-MM-DD",
    help="the day that some chat templates write, as Llama 3.2's and Granite 3.3's (default: today; "
    "what was begun keeps its day)",
)


def new_parser(description: str) -> ArgumentParser:
    """A parser with the flags that mean the same in every training script."""
    raw = argparse.RawDescriptionHelpFormatter  # keeps the lines of the description
    parser = ArgumentParser(description=description, formatter_class=raw)
    add = parser.add_argument
    add("--model", default="tiny",
        help="tiny, tiny-llama or tiny-granite (the tiny world, no download; tiny@SEED grows another), "
        "alias (qwen3-8b), hub id (owner/name, owner/name@revision) or folder (default: %(default)s)")
    add("--out", help="run folder (default: runs/SCRIPT-MODEL)")
    add("--seed", type=int, default=0, help="all randomness follows from it (default: %(default)s)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--dtype", choices=("float32", "bfloat16"),
        help="compute type; masters are float32 (default: bfloat16 on cuda, float32 on cpu)")
    add("--save-dtype", choices=("float32", "bfloat16"),
        help="of final/, the model that is left in the end (default: that of the base's config.json); "
        "checkpoints are in --dtype, with exact masters")
    add("--resume", choices=("auto", "never"), default="auto",
        help="auto: go on from the run folder's newest checkpoint (default); never: refuse such a "
        "folder")
    add("--thinking", **THINKING)
    add("--date", **DATE)
    add("--save-every", type=positive_int, default=50,
        help="steps between checkpoints (default: %(default)s)")
    add("--keep", type=positive_int, default=2,
        help="how many checkpoints are kept (default: %(default)s)")
    add("--eval-every", type=positive_int,
        help="of a model of the tiny world: steps between small evals of safety, over-refusal and reasoning, and a "
        "table at the end (checkpoints of other models: eval.py --compare)")
    add("--low-memory", action="store_true",
        help="in bfloat16: masters as weight + 16-bit remainder (exact float32), moments in 8 bits; a "
        "parameter then takes 6 bytes instead of 14, or of the 12 that several GPUs share")
    add("--lora-rank", type=positive_int, metavar="R",
        help="LoRA: train two matrices of this rank beside every linear layer of attention and MLP and "
        "nothing else, at ten times the recipe's learning rate; the model without them is the reference "
        "(docs/lora.md; default: all weights train)")
    add("--lora-alpha", type=positive_float, metavar="A",
        help="what the adapters add is multiplied by A / R (default: 2 R)")
    add("--save-adapter", action="store_true",
        help="also write the adapters to OUT/adapter, as PEFT loads them; final/ has them merged in")
    add("--offload", action="store_true",
        help="keep reference and reward model in CPU memory; each comes to the GPU for its turn in a "
        "step")
    add("--rollout-shards", type=positive_int, default=1, metavar="T",
        help="groups of T ranks sample together, each with its heads, MLP columns and KV cache: for "
        "weights that one GPU cannot hold (default: 1, each rank samples alone; docs/spread.md)")
    add("--shard-frozen", action="store_true",
        help="each rank keeps its rows of reference and reward model, too; layers are gathered as they "
        "score")
    add("--recompute", choices=RECOMPUTE,
        help="what the backward pass computes anew instead of keeping it: none; some, all but "
        "products and attention, for half the memory; layer, whole layers, for the least memory and a "
        "third more FLOP (default: the fastest that fits by the plan, on a CPU none)")
    add("--plan", nargs="?", const="", metavar="NxGB",
        help="only print what the run needs (memory of each GPU, hours, disk, downloads), whether it "
        "fits and what helps; nothing is downloaded. 8x80: on 8 GPUs of 80 GB (default: the visible "
        "ones, else 1x80)")
    add("--random-weights", action="store_true",
        help="dry run without a download: the true shape (also of a folder with a config.json alone) "
        "with random weights, written once to the cache; reward model alike; tiny-star data")
    add("--tensorboard", action="store_true", help="also log to OUT/tensorboard")
    add("--wandb", action="store_true", help="also log to Weights & Biases")
    return parser


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def finite_float(text: str) -> float:
    if not abs(float(text)) <= LARGEST:
        raise ArgumentTypeError(f"must be a finite number, not {text!r}")
    return float(text)


def positive_float(text: str) -> float:
    if not finite_float(text) > 0:
        raise ArgumentTypeError(f"must be greater than 0, not {text!r}")
    return float(text)


def rl_flags(description: str) -> ArgumentParser:
    """The flags of train_rl.py."""
    parser = new_parser(description)
    add = parser.add_argument
    add("--reward-model", nargs="+", metavar="REWARD",
        help="alias, hub id or folder of a *ForSequenceClassification; rule:math, rule:refusal; or "
        "FILE.py:FUNCTION, a function of your own (docs/your-own.md); of several the sum is taken")
    add("--reward-weights", type=finite_float, nargs="+", metavar="WEIGHT",
        help="of each of several rewards in that sum (default: 1)")
    add("--reward-scope", choices=("response", "answer"), default="response",
        help="what is scored: thought and answer (default), or what follows </think> (an empty "
        "answer where the thought never ends)")
    add("--prompts",
        help="hub id, .json, .jsonl, .csv or .parquet; docs/your-own.md has the forms of a row")
    add("--steps", type=positive_int, help="rollouts, each with its updates")
    add("--prompts-per-step", type=positive_int)
    add("--samples-per-prompt", type=positive_int)
    add("--minibatches", type=positive_int, help="optimizer steps that a rollout is cut into")
    add("--epochs", type=positive_int, help="passes over each rollout")
    add("--lr", type=positive_float, help="peak learning rate; 3 %% warm-up, cosine to 10 %%")
    add("--kl-coef", type=finite_float, help="weight of the KL to the reference model; 0 loads none")
    add("--kl-kind", choices=KL_KINDS,
        help="estimator of the KL in the reward; only k1 is unbiased there")
    add("--estimator", choices=ESTIMATORS, default="reinforce++",
        help="-baseline: reward minus its prompt's mean, KL as a k2 loss; needs --samples-per-prompt "
        "above 1")
    add("--gamma", type=positive_float, default=1.0, help="discount per token (default: 1)")
    add("--clip-low", type=positive_float, default=0.2, help="ratios below 1 - this are clipped (0.2)")
    add("--clip-high", type=positive_float, default=0.2, help="ratios above 1 + this are clipped (0.2)")
    add("--dual-clip", type=positive_float,
        help="bound above 1 on the ratio where the advantage is negative")
    add("--reduction", choices=("token", "sequence"), default="token",
        help="loss: mean over tokens (default), or over responses of their token means")
    add("--reward-clip", type=finite_float, nargs=2, metavar=("LOW", "HIGH"),
        help="bounds of the reward (default: none)")
    add("--no-normalize", action="store_true", help="use returns as they are for advantages")
    add("--truncated", default="keep",
        help="responses cut at the limit: keep scores them as they are (default), mask leaves them "
        "out, a NUMBER is their reward")
    add("--old-logprobs", choices=("sampler", "trainer"),
        help="whose log-probs are the policy's before the update: those of sampling, or of one more "
        "forward pass (default: the sampler's on a CPU in float32, where they agree to about 1e-5)")
    add("--temperature", type=positive_float, default=1.0,
        help="of sampling and of every log-prob (default: 1)")
    add("--top-p", type=positive_float, default=1.0,
        help="below 1 training is no longer on-policy (default: 1)")
    add("--max-prompt-tokens", type=positive_int, help="longer prompts are left out, and counted")
    add("--max-response-tokens", type=positive_int)
    add("--tokens-per-microbatch", type=positive_int, help="tokens of one forward and backward pass of a rank")
    add("--pairs",
        help="labelled pairs (prompt, chosen, rejected) to try the reward model on before the start")
    show_recipes(parser, "rl")
    return parser


def sft_flags(description: str) -> ArgumentParser:
    """The flags of train_sft.py."""
    parser = new_parser(description)
    add = parser.add_argument
    add("--data",
        help="hub id, .json, .jsonl, .csv or .parquet; docs/your-own.md has the forms of a row")
    add("--epochs", type=positive_int, help="passes over the data, each in another order")
    add("--steps", type=positive_int, help="optimizer steps (default: what --epochs makes)")
    add("--batch-size", type=positive_int, help="responses per step, over all ranks")
    add("--lr", type=positive_float, help="peak learning rate; 5 %% warm-up, cosine to 0")
    add("--max-tokens", type=positive_int, help="longer conversations lose their end, and are counted")
    add("--tokens-per-microbatch", type=positive_int, help="tokens of one forward and backward pass of a rank")
    show_recipes(parser, "sft")
    return parser


def show_recipes(parser: ArgumentParser, script: str) -> None:
    """Write the recipes' values into the flags' help."""
    for flag in parser._actions:
        for label, recipes in (("default", RECIPES), ("tiny", TINY_RECIPES)):
            if flag.dest in recipes[script]:
                flag.help = f"{flag.help or ''} ({label}: {recipes[script][flag.dest]})".lstrip()
