"""What train_rl.py says and measures before its first step: how it samples, and how good its reward is."""

from argparse import Namespace

from nanosafe.evals.during_training import GOOD_REWARD_MODEL, reward_accuracy
from nanosafe.model.config import ModelConfig
from nanosafe.names import load_pairs
from nanosafe.parallel import Ranks
from nanosafe.train.own_reward import is_function
from nanosafe.train.rewards import Reward
from nanosafe.train.weighted_reward import WeightedReward


def announce_sampling(config: ModelConfig, args: Namespace, ranks: Ranks) -> None:
    """Training samples from the distribution it scores, so the checkpoint's own sampling settings are not used."""
    text = f"sampling at temperature {args.temperature}, top-p {args.top_p}, top-k off"
    generation = config.generation or {}
    names = [name for name in ("temperature", "top_p", "top_k") if generation.get(name) is not None]
    if names:
        unused = ", ".join(f"{name} {generation[name]}" for name in names)
        text += f"; generation_config.json's {unused} are not used"
    if args.rollout_shards > 1:
        text += f"; {ranks.world // args.rollout_shards} groups of {args.rollout_shards} ranks hold a policy each"
    ranks.print(text)
    if args.top_p < 1:
        ranks.print("warning: with --top-p below 1 the log-probs are not those of the distribution "
                    "that is sampled")


def try_reward(reward: Reward, args: Namespace, ranks: Ranks) -> None:
    """Print how often each reward model prefers the safe response of --pairs, if there are any, with a warning."""
    parts = reward.parts if isinstance(reward, WeightedReward) else {args.reward_model: reward}
    for name, part in parts.items():
        if not args.pairs or name.startswith("rule:") or is_function(name):
            continue
        right = reward_accuracy(part, load_pairs(args.pairs), ranks, name)
        total = right.pop("all")
        categories = ", ".join(f"{category} {share.mean:.2f}" for category, share in right.items())
        ranks.print(f"{name} prefers the safe response in {total} of {total.n} pairs; {categories}")
        if total.mean < GOOD_REWARD_MODEL:
            ranks.print(f"warning: that is less than {GOOD_REWARD_MODEL}: "
                        "the policy will learn what it is wrong about")
