"""What train_rl.py measures before its first step: the reward model on labelled pairs, and what the base can do."""

from argparse import Namespace

from nanosafe.evals.during_training import GOOD_REWARD_MODEL, Watch, reward_accuracy
from nanosafe.evals.tiny_suite import suite_of
from nanosafe.model.decoder import Decoder
from nanosafe.names import load_pairs
from nanosafe.parallel import Ranks, unsharded
from nanosafe.text.tokenizer import Tokenizer
from nanosafe.train.rewards import Reward
from nanosafe.train.run_folder import RunFolder


def try_reward(reward: Reward, args: Namespace, ranks: Ranks) -> None:
    """Print how often the reward model prefers the safe response of --pairs, if there are any, with a warning."""
    if not args.pairs or args.reward_model.startswith("rule:"):
        return
    right = reward_accuracy(reward, load_pairs(args.pairs), ranks, args.reward_model)
    total = right.pop("all")
    categories = ", ".join(f"{name} {estimate.mean:.2f}" for name, estimate in right.items())
    ranks.print(f"{args.reward_model} prefers the safe response in {total} of {total.n} pairs; "
                f"{categories}")
    if total.mean < GOOD_REWARD_MODEL:
        ranks.print(f"warning: that is less than {GOOD_REWARD_MODEL}: "
                    "the policy will learn what it is wrong about")


def start_watch(policy: Decoder, reward: Reward, tokenizer: Tokenizer, run: RunFolder) -> Watch | None:
    """The evals of --eval-every: the base is measured, or, if the run is resumed, read from its folder."""
    args, ranks = run.args, run.ranks
    if not args.eval_every:
        return None
    suite = suite_of(policy.config, "validation")
    watch = Watch(suite, tokenizer, reward, args.reward_model, args.out, ranks)
    if run.resumed:
        watch.recall(run.state["step"])
        ranks.print("at the last measurement: " + watch.summary())
    else:
        with unsharded(policy, run.dtype) as model:
            watch.measure(model, 0)
        ranks.print("before training: " + watch.summary())
    return watch
