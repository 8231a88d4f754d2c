"""What train_rl.py measures before its first step: the reward model on labelled pairs, and what the base can do."""

from argparse import Namespace

import torch

from nanosafe.evals.during_training import GOOD_REWARD_MODEL, Watch, reward_accuracy
from nanosafe.evals.tiny_suite import suite_of
from nanosafe.model.decoder import Decoder
from nanosafe.names import load_pairs
from nanosafe.parallel import Ranks, unsharded
from nanosafe.text.tokenizer import Tokenizer
from nanosafe.train.rewards import Reward


def try_reward(reward: Reward, args: Namespace, ranks: Ranks) -> None:
    """Print how often the reward model prefers the safe response of --pairs, if there are any, with a warning."""
    if not args.pairs or args.reward_model.startswith("rule:"):
        return
    right = reward_accuracy(reward, load_pairs(args.pairs), ranks, args.reward_model)
    total = right.pop("all")
    categories = ", ".join(f"{name} {estimate.mean:.2f}" for name, estimate in right.items())
    ranks.print(f"{args.reward_model} prefers the safe response in {total} of {total.n} pairs; {categories}")
    if total.mean < GOOD_REWARD_MODEL:
        ranks.print(f"warning: that is less than {GOOD_REWARD_MODEL}: "
                    "the policy will learn what it is wrong about")


def start_watch(policy: Decoder, reward: Reward, tokenizer: Tokenizer, args: Namespace, ranks: Ranks,
                resumed_step: int | None) -> Watch | None:
    """The evals of --eval-every, with the base measured, or read from the run that is resumed after `resumed_step`."""
    if not args.eval_every:
        return None
    watch = Watch(suite_of(policy.config, "validation"), tokenizer, reward, args.reward_model, args.out, ranks)
    if resumed_step is None:
        with unsharded(policy, getattr(torch, args.dtype)) as model:
            watch.measure(model, 0)
        ranks.print("before training: " + watch.summary())
    else:
        watch.recall(resumed_step)
        ranks.print("at the last measurement: " + watch.summary())
    return watch
