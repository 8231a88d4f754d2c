"""REINFORCE++ with a reward model, the whole loop.

    python train_rl.py --model qwen3-0.6b --reward-model skywork-v2-qwen3-0.6b
    torchrun --nproc_per_node=8 train_rl.py --model qwen3-8b

One step: the policy answers a batch of prompts, the reward model scores the conversations, the KL to a frozen reference
model is taken off token by token, returns are normalised over the whole rollout (advantages without a critic), and a
few mini-batches of clipped policy-gradient steps follow. The formulas are in nanosafe/train/reinforce.py. The paper's
(arXiv 2512.01848) learning rate, KL coefficient, batch and lengths are not known; nanosafe/recipes.py says where the
defaults come from. Every rank knows the whole rollout and all its numbers; only the work is shared out (sampling,
scoring, forward and backward passes), so that any number of processes computes the same step.
"""

import nanosafe  # noqa: F401  First, for it sets what PyTorch reads when it is imported.
from nanosafe.train.flags import finite_float, rl_flags

if __name__ == "__main__":
    rl_flags(__doc__).parse_args()  # --help and wrong flags end here, before the seconds that PyTorch takes to load

# isort: split
import math
from argparse import ArgumentTypeError, Namespace

import torch

from nanosafe import plan
from nanosafe.evals.diagnostics import reflection_ids
from nanosafe.evals.during_training import measure_if_due, show_measurement, show_table, start_watch
from nanosafe.evals.preflight import announce_sampling, try_reward
from nanosafe.evals.tiny_suite import suite_of
from nanosafe.io.progress import progress
from nanosafe.model.config import ModelConfig
from nanosafe.model.decoder import Decoder
from nanosafe.model.granite import Balance
from nanosafe.names import checkpoint, load_policy, load_reference, load_reward, load_rows, load_tokenizer, recipe
from nanosafe.parallel import Ranks
from nanosafe.plan import random_weights
from nanosafe.plan.report import show_plan
from nanosafe.randomness import derive_seed, permutation, shuffled_passes
from nanosafe.sampler.generation import generate_over_ranks
from nanosafe.sampler.packed import forget_packed
from nanosafe.sampler.params import SamplingParams
from nanosafe.sampler.spread import check_spread, sampling_model
from nanosafe.text.data import Episode, Prompt, encode_prompts
from nanosafe.text.tokenizer import Tokenizer
from nanosafe.train import cli, reinforce
from nanosafe.train.batch import Batch, by_row, entropies_at_1, score_tokens
from nanosafe.train.metrics import console_line, policy_metrics, rollout_metrics, sample_rows
from nanosafe.train.optim import Optimizer, cosine_schedule
from nanosafe.train.packing import head_logprobs, local_microbatches, pack, response_hidden
from nanosafe.train.reward_model import check_rows
from nanosafe.train.rewards import Reward, conversation, fill_unread
from nanosafe.train.run_folder import RunFolder
from nanosafe.train.tracking import Clock, Tracker
from nanosafe.train.weighted_reward import check_rewards, metric_name, reward_specs, with_parts

WARMUP_SHARE, FINAL_LR_SHARE = 0.03, 0.1
LOSS_SUMS = ("loss_sum", "clip_count", "ppo_kl_sum", "tokens")  # sums of policy_loss that are reported


def check(args: Namespace) -> None:
    """Raise ValueError for settings that cannot work, before anything is loaded."""

    def require(holds: bool, message: str) -> None:
        if not holds:
            raise ValueError(message)

    if args.truncated not in ("keep", "mask"):
        try:
            args.truncated = finite_float(args.truncated)
        except (ValueError, ArgumentTypeError):
            raise ValueError(f"--truncated {args.truncated}: must be keep, mask or a number") from None
    args.reward_model = check_rewards(args.reward_model, args.reward_weights)
    require(args.kl_coef >= 0, f"--kl-coef {args.kl_coef}: "
            "a negative one rewards moving away from the reference model")
    require(args.estimator != "reinforce++-baseline" or args.samples_per_prompt > 1,
            f"--estimator {args.estimator} compares samples: set --samples-per-prompt above 1")
    require(args.minibatches <= args.prompts_per_step * args.samples_per_prompt,
            "--minibatches is larger than --prompts-per-step times --samples-per-prompt")
    require(args.gamma <= 1, f"--gamma {args.gamma}: a discount is at most 1")
    require(args.dual_clip is None or args.dual_clip > 1,
            f"--dual-clip {args.dual_clip}: it must be above 1")
    if args.reward_clip is not None:
        low, high = args.reward_clip
        require(low < high, f"--reward-clip {low} {high}: LOW must be below HIGH")
    # Divided by less, logits overflow float32; by more, all tokens are equally likely.
    require(1e-6 <= args.temperature <= 1e6,
            f"--temperature {args.temperature}: it must lie from 1e-6 to 1e6")
    require(args.top_p <= 1, f"--top-p {args.top_p}: a probability is at most 1")


def main(argv: list[str] | None = None) -> None:
    args, origins = cli.settings(rl_flags(__doc__), argv, "rl", recipe)
    check(args)
    if args.plan is not None:
        return show_plan("rl", args)
    ranks = cli.start(args, origins, "rl")
    if args.rollout_shards > 1:
        check_spread(plan.find_config(args.model)[0], args.rollout_shards, args.model)
    if args.random_weights:
        random_weights.substitute(args, origins["command line"], ranks)
    run = RunFolder(args, ranks)
    if run.complete:
        show_table(run)
        return ranks.close()

    # Data and reward: a name is looked up by one rank of each node first, which alone downloads.
    frozen_ranks = ranks if args.shard_frozen else None
    with ranks.local_main_first():
        base = checkpoint(args.model)
        rows = load_rows(args.prompts)
        reward = load_reward(args.reward_model, weights=args.reward_weights,
                             scope=args.reward_scope, device=ranks.device, dtype=run.dtype,
                             offload=args.offload, date=args.date, ranks=frozen_ranks)
    run.check_data(args.prompts, rows)
    tokenizer = load_tokenizer(base)
    tokenizer.think(args.thinking == "on")
    tokenizer.date = args.date

    # Whatever can be known to fail is refused before the policy is loaded, and not after hours.
    config = ModelConfig.from_folder(base)
    prompts, dropped = encode_prompts(rows, tokenizer, args.max_prompt_tokens)
    ranks.print(f"prompts: {len(prompts)} of {args.prompts}" + (f" ({dropped})" if dropped else ""))
    check_rows([prompt.row for prompt in prompts], reward, args.reward_model)
    longest, limit = max(len(prompt.ids) for prompt in prompts), config.max_position_embeddings
    if longest + args.max_response_tokens > limit:
        raise ValueError(f"--max-response-tokens {args.max_response_tokens} after a prompt of {longest} "
                         f"tokens passes {args.model}'s {limit} positions (max_position_embeddings): lower it")
    suite = suite_of(config, "validation") if args.eval_every else []
    announce_sampling(config, args, ranks)
    try_reward(reward, args, ranks)

    # The policy goes on from the newest checkpoint. The reference stays what the policy was at the start.
    policy = load_policy(args, base, run.resumed, ranks)
    policy.recompute(plan.choose_recompute("rl", args, ranks))
    reference = load_reference(args, base, policy, ranks)
    optimizer = Optimizer(policy, low_memory=args.low_memory)
    run.attach(policy, tokenizer, optimizer)
    watch = start_watch(suite, policy, tokenizer, run, reward)
    reflection = torch.tensor(reflection_ids(tokenizer), dtype=torch.long)

    tracker = Tracker(args, ranks)
    for step in run.steps(args.steps):
        clock = Clock(ranks)
        episodes = rollout(policy, tokenizer, prompts, args, ranks, step)
        clock.lap("rollout")
        score(episodes, reward, tokenizer, args, ranks)
        clock.lap("reward")
        batch = score_tokens(policy, reference, episodes, args, ranks)
        metrics = rollout_metrics(batch, reflection)
        clock.lap("logprobs")

        updates = args.minibatches * args.epochs
        if math.isfinite(metrics["reward/mean"]):
            metrics |= set_advantages(batch, args)
            metrics |= update(policy, optimizer, batch, args, ranks, step)
        else:
            # No reward, or one that is not a number, says nothing about the policy: no rank updates.
            metrics["policy/skipped"] = updates
        metrics |= policy_metrics(batch, reflection)
        clock.lap("update")

        metrics |= measure_if_due(watch, policy, run, clock)

        # The row of metrics is on disk before the checkpoint that covers it.
        run.log("samples.jsonl", sample_rows(episodes, step))
        tokens = metrics["response/tokens"]
        metrics |= clock.metrics(rollout=tokens, update=tokens)
        row = run.record(metrics, updated=metrics["policy/skipped"] < updates)
        tracker.log(row)
        ranks.print(console_line(row, args.steps))
        show_measurement(watch, run)
        run.save_if_due()
    tracker.close()
    run.finish()
    if watch is not None:
        ranks.print(watch.table())
    ranks.close()


def rollout(policy: Decoder, tokenizer: Tokenizer, prompts: list[Prompt], args: Namespace, ranks: Ranks,
            step: int) -> list[Episode]:
    """Sample the step's rollout. Row r is sample r % n of the step's prompt r // n."""
    P, n = args.prompts_per_step, args.samples_per_prompt
    drawn = shuffled_passes(len(prompts), range(step * P, (step + 1) * P), args.seed, "prompts")
    # All samples of a prompt are neighbours: the sampler computes their prompt once.
    asked = [prompts[drawn[row // n]] for row in range(P * n)]
    prompt_ids = [prompt.ids for prompt in asked]
    params = []
    for row in range(len(asked)):
        params.append(SamplingParams(
            temperature=args.temperature,
            top_p=args.top_p,
            max_new_tokens=args.max_response_tokens,
            # Of its own, so that a response depends on neither batch nor rank.
            seed=derive_seed(args.seed, "rollout", step, row),
        ))
    with sampling_model(policy, getattr(torch, args.dtype), ranks, args.rollout_shards) as model:
        outputs = generate_over_ranks(model, prompt_ids, params, ranks, progress=ranks.main)
        forget_packed(model)  # Training needs the memory.
    episodes = []
    for row, (prompt, [completion]) in enumerate(zip(asked, outputs, strict=True)):
        truncated = completion.finish_reason == "length"
        # The token that ended the response is learnt, but no part of its text.
        content = completion.token_ids if truncated else completion.token_ids[:-1]
        episodes.append(Episode(
            prompt.ids,
            completion.token_ids,
            row=row,
            group=row // n,
            source=prompt.row,
            sampler_logprobs=completion.logprobs,
            truncated=truncated,
            text=tokenizer.decode(content, skip_special_tokens=True),
        ))
    return episodes


def score(episodes: list[Episode], reward: Reward, tokenizer: Tokenizer, args: Namespace,
          ranks: Ranks) -> None:
    """Set each episode's reward: the reward model reads the text of the conversation, never the policy's ids."""

    def rewards_of(some: list[Episode]) -> list[list[float]]:
        conversations = []
        for episode in some:
            conversations.append(conversation(
                episode.source.prompt,
                episode.text,
                opened_thought=tokenizer.opens_thought(episode.prompt_ids),
                scope=args.reward_scope,
            ))
        return with_parts(reward, conversations, [episode.source for episode in some]).tolist()

    names = [metric_name(spec) for spec in reward_specs(args.reward_model)]
    rewards = ranks.split_work(episodes, rewards_of)
    for episode, (value, *parts) in zip(episodes, rewards, strict=True):
        episode.reward_parts = dict(zip(names, parts, strict=False))  # none of a single reward
        # --truncated NUMBER overrules what the reward says of half a response.
        fixed = episode.truncated and isinstance(args.truncated, float)
        episode.reward = args.truncated if fixed else value


def set_advantages(batch: Batch, args: Namespace) -> dict[str, float]:
    """Rewards to advantages, normalised over the whole rollout. Returns their moments before that."""
    device = batch.loss_mask.device
    rewards = torch.tensor(fill_unread(batch.episodes), dtype=torch.float64, device=device)
    group = torch.tensor([episode.group for episode in batch.episodes], device=device)
    returns = reinforce.advantages(
        rewards, batch.old_logprobs, batch.ref_logprobs, batch.loss_mask, group=group,
        kl_coef=args.kl_coef, kl_kind=args.kl_kind, gamma=args.gamma, estimator=args.estimator,
        reward_clip=args.reward_clip, normalize=False,
    )
    # Normalised here, so that the moments can be logged.
    mean, variance = reinforce.global_moments(returns, batch.loss_mask)
    batch.advantages = returns
    if not args.no_normalize:
        batch.advantages = reinforce.standardize(returns, batch.loss_mask, mean, variance)
    return {"advantage/mean": mean.item(), "advantage/std": variance.sqrt().item()}


def update(policy: Decoder, optimizer: Optimizer, batch: Batch, args: Namespace, ranks: Ranks,
           step: int) -> dict[str, float]:
    """The clipped policy-gradient steps of one rollout: `epochs` passes over its rows in `minibatches` each."""
    lr = args.lr * cosine_schedule(step, args.steps, WARMUP_SHARE, FINAL_LR_SHARE)
    count = args.minibatches
    totals, losses, norms = dict.fromkeys(LOSS_SUMS, 0.0), [], []
    for epoch in range(args.epochs):
        order = permutation(len(batch.episodes), args.seed, "minibatches", step, epoch)
        for i in progress(range(count), "updates"):
            rows = list(order[i * len(order) // count : (i + 1) * len(order) // count])
            sums, experts = backward(policy, batch, rows, args, ranks)
            loss = sums["loss_sum"] / max(sums["denominator"], 1)
            # Every rank has the same sums, so all step or none does.
            usable = sums["denominator"] > 0 and math.isfinite(loss)
            norm = optimizer.step(lr) if usable else optimizer.discard()
            if math.isfinite(norm):
                losses.append(loss)
                norms.append(norm)
                for name in LOSS_SUMS:
                    totals[name] += sums[name]
    updates, tokens = max(len(norms), 1), max(totals["tokens"], 1)
    metrics = {
        "policy/loss": sum(losses) / updates,
        "policy/grad_norm": sum(norms) / updates,
        "policy/clip_fraction": totals["clip_count"] / tokens,
        "policy/ppo_kl": totals["ppo_kl_sum"] / tokens,
        "policy/lr": lr,
        "policy/skipped": args.epochs * count - len(norms),
    }
    return metrics | experts  # of the last mini-batch


def backward(policy: Decoder, batch: Batch, minibatch: list[int], args: Namespace,
             ranks: Ranks) -> tuple[dict[str, float], dict[str, float]]:
    """Gradients of one mini-batch (rows of the batch), each rank having run its share.

    Returns LOSS_SUMS over all ranks with their denominator, and the metrics of the experts' loads.
    """
    sums = torch.zeros(len(LOSS_SUMS), dtype=torch.float64, device=ranks.device)
    # One denominator for the whole mini-batch: micro-batches and ranks simply add up.
    tokens = batch.loss_mask[minibatch].sum(1)  # of each response
    denominator = int(tokens.sum() if args.reduction == "token" else (tokens > 0).sum())
    episodes = [batch.episodes[row] for row in minibatch]
    balance = Balance(policy.config, sum(map(len, episodes)), ranks)
    # --old-logprobs sampler: the trainer scores the first mini-batch, before any update of the policy.
    unscored, scores = batch.scores is None, {}
    for indices in local_microbatches(episodes, args.tokens_per_microbatch, ranks):
        rows = [minibatch[i] for i in indices]
        packed = pack([episodes[i] for i in indices], ranks.device)
        hidden = response_hidden(policy, packed)
        token_logprobs, entropies = head_logprobs(policy, hidden, packed, args.temperature)
        if unscored:
            at_1 = entropies_at_1(policy, hidden, packed, entropies, args.temperature)
            scores |= by_row(torch.stack([token_logprobs, entropies, at_1]), packed, rows)
        logprobs = packed.pad(token_logprobs)  # [b, T']
        T = logprobs.shape[1]  # at most that of the batch: its longest response may be in another pack
        mask = batch.loss_mask[rows, :T]
        mean_of = dict(reduction=args.reduction, denominator=denominator)
        loss, stats = reinforce.policy_loss(
            logprobs, batch.old_logprobs[rows, :T], batch.advantages[rows, :T], mask,
            clip_low=args.clip_low, clip_high=args.clip_high, dual_clip=args.dual_clip, **mean_of,
        )
        if args.estimator == "reinforce++-baseline" and args.kl_coef:
            kl = reinforce.kl_loss(logprobs, batch.ref_logprobs[rows, :T], mask, **mean_of)
            loss = loss + args.kl_coef * kl
        # Also without a row: under sharding the other ranks wait for this backward pass.
        (loss + balance.add(packed.memory.hybrid.routing)).backward()
        sums += torch.stack([stats[name] for name in LOSS_SUMS])
    if unscored:
        batch.set_policy_scores(scores, ranks)
    named = dict(zip(LOSS_SUMS, ranks.sum_(sums).tolist(), strict=True))
    return named | {"denominator": denominator}, balance.metrics()


if __name__ == "__main__":
    with cli.readable_errors():
        main()
