"""REINFORCE++ with a reward model, the whole loop.

    python train_rl.py --model qwen3-0.6b --reward-model skywork-v2-qwen3-0.6b
    torchrun --nproc_per_node=8 train_rl.py --model qwen3-8b

One step: the policy answers a batch of prompts, the reward model scores the conversations, the KL to a frozen reference
model is taken off token by token, returns are normalised over the whole rollout (advantages without a critic), and a
few mini-batches of clipped policy-gradient steps follow. The formulas are in nanosafe/train/reinforce.py. Defaults are
OpenRLHF's where the paper (arXiv 2512.01848) is silent: its learning rate, KL coefficient, batch and lengths are not
known. Every rank knows the whole rollout and all its numbers; only the work is shared out (sampling, scoring, forward
and backward passes), so that any number of processes computes the same step.
"""

import os

# Responses of all lengths leave a GPU's memory in pieces otherwise. PyTorch reads this when it is imported.
os.environ.setdefault(
    "PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"))

import math
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from dataclasses import dataclass

import torch
from torch import Tensor

from nanosafe import plan
from nanosafe.evals.diagnostics import reflection_ids
from nanosafe.evals.during_training import GOOD_REWARD_MODEL, Watch, reward_accuracy
from nanosafe.evals.tiny_suite import suite_of
from nanosafe.model.decoder import Decoder
from nanosafe.model.granite import Balance
from nanosafe.names import checkpoint, load_model, load_pairs, load_reward, load_rows, load_tokenizer, recipe
from nanosafe.parallel import Ranks, gathered, visiting
from nanosafe.plan import random_weights
from nanosafe.randomness import derive_seed, permutation, shuffled_passes
from nanosafe.sampler import SamplingParams, generate_over_ranks
from nanosafe.text.data import Episode, Row, encode_prompts
from nanosafe.text.tokenizer import Tokenizer
from nanosafe.train import cli, reinforce
from nanosafe.train.optim import Optimizer, cosine_schedule
from nanosafe.train.packing import (
    Packed,
    head_logprobs,
    own_microbatches,
    pack,
    response_hidden,
    response_logprobs,
)
from nanosafe.train.rewards import UNREAD, Reward, check_rows, conversation, fill_unread
from nanosafe.train.run_folder import RunFolder

WARMUP_SHARE, FINAL_LR_SHARE = 0.03, 0.1
SAMPLES_PER_STEP = 8  # episodes written to samples.jsonl
LOSS_SUMS = ("loss_sum", "clip_count", "ppo_kl_sum", "tokens")  # of reinforce.policy_loss's sums, those reported


def flags() -> ArgumentParser:
    parser = cli.new_parser(__doc__)
    add = parser.add_argument
    add("--reward-model", help="alias, hub id or folder of a *ForSequenceClassification, or rule:math, rule:refusal")
    add("--reward-scope", choices=("response", "answer"), default="response",
        help="what is scored: thought and answer (default), or what follows </think> (nothing does: an empty answer)")
    add("--prompts", help="hub id, .json, .jsonl, .csv or .parquet; rows have question, prompt or messages")
    add("--steps", type=cli.positive_int, help="rollouts, each with its updates")
    add("--prompts-per-step", type=cli.positive_int)
    add("--samples-per-prompt", type=cli.positive_int)
    add("--minibatches", type=cli.positive_int, help="optimizer steps that a rollout is cut into")
    add("--epochs", type=cli.positive_int, help="passes over each rollout")
    add("--lr", type=cli.positive_float, help="peak learning rate; 3 %% warm-up, cosine to 10 %%")
    add("--kl-coef", type=cli.finite_float, help="weight of the KL to the reference model; 0 loads none")
    add("--kl-kind", choices=reinforce.KL_KINDS, help="estimator of the KL in the reward; only k1 is unbiased there")
    add("--estimator", choices=reinforce.ESTIMATORS, default="reinforce++",
        help="-baseline: reward minus its prompt's mean, KL as a k2 loss; needs --samples-per-prompt above 1")
    add("--gamma", type=cli.positive_float, default=1.0, help="discount per token (default: 1)")
    add("--clip-low", type=cli.positive_float, default=0.2, help="ratios below 1 - this are clipped (0.2)")
    add("--clip-high", type=cli.positive_float, default=0.2, help="and those above 1 + this (0.2)")
    add("--dual-clip", type=cli.positive_float, help="bound above 1 on the ratio where the advantage is negative")
    add("--reduction", choices=("token", "sequence"), default="token",
        help="loss: mean over tokens (default), or over responses of their token means")
    add("--reward-clip", type=cli.finite_float, nargs=2, metavar=("LOW", "HIGH"),
        help="bounds of the reward (default: none)")
    add("--no-normalize", action="store_true", help="use returns as they are for advantages")
    add("--truncated", default="keep",
        help="responses cut at the limit: keep scores them as they are (default), mask leaves them out, a NUMBER is "
        "their reward")
    add("--temperature", type=cli.positive_float, default=1.0, help="of sampling and of every log-prob (default: 1)")
    add("--top-p", type=cli.positive_float, default=1.0, help="below 1 training is no longer on-policy (default: 1)")
    add("--max-prompt-tokens", type=cli.positive_int, help="longer prompts are left out, and counted")
    add("--max-response-tokens", type=cli.positive_int)
    add("--tokens-per-microbatch", type=cli.positive_int, help="of one forward and backward, per rank")
    add("--pairs", help="labelled pairs (prompt, chosen, rejected) that the reward model is tried on before the start")
    add("--eval-every", type=cli.positive_int,
        help="steps between small evals of safety, over-refusal and reasoning, with warnings and a table at the end")
    return parser


def check(args: Namespace) -> None:
    """Raise ValueError for settings that cannot work, before anything is loaded."""
    if args.truncated not in ("keep", "mask"):
        try:
            args.truncated = cli.finite_float(args.truncated)
        except (ValueError, ArgumentTypeError):
            raise ValueError(f"--truncated {args.truncated}: must be keep, mask or a number") from None
    low, high = args.reward_clip or (-math.inf, math.inf)
    rules = (
        (args.kl_coef >= 0,
         f"--kl-coef {args.kl_coef}: a negative one rewards moving away from the reference model"),
        (args.estimator != "reinforce++-baseline" or args.samples_per_prompt > 1,
         f"--estimator {args.estimator} compares samples: set --samples-per-prompt above 1"),
        (args.minibatches <= args.prompts_per_step * args.samples_per_prompt,
         "--minibatches is larger than --prompts-per-step times --samples-per-prompt"),
        (args.gamma <= 1, f"--gamma {args.gamma}: a discount is at most 1"),
        (args.dual_clip is None or args.dual_clip > 1, f"--dual-clip {args.dual_clip}: it must be above 1"),
        (low < high, f"--reward-clip {low} {high}: LOW must be below HIGH"),
        # Divided by less, logits overflow float32; by more, all tokens are equally likely.
        (1e-6 <= args.temperature <= 1e6, f"--temperature {args.temperature}: it must lie from 1e-6 to 1e6"),
        (args.top_p <= 1, f"--top-p {args.top_p}: a probability is at most 1"),
    )
    for holds, message in rules:
        if not holds:
            raise ValueError(message)


def main(argv: list[str] | None = None) -> None:
    args, origins = cli.settings(flags(), argv, "rl", recipe)
    check(args)
    if args.plan is not None:
        return plan.show("rl", args)
    ranks = cli.join(args, origins, "rl")
    if args.random_weights:
        random_weights.substitute(args, origins["command line"], ranks)
    run = RunFolder(args, ranks)
    if run.complete:
        return ranks.close()

    # The policy goes on from the newest checkpoint; the reference stays what the policy was at the start.
    dtype = getattr(torch, args.dtype)
    with ranks.main_first():
        base = checkpoint(args.model)
        rows = load_rows(args.prompts)
        reward = load_reward(args.reward_model, scope=args.reward_scope, device=ranks.device, dtype=dtype,
                             offload=args.offload, date=args.date)
    run.check_data(args.prompts, rows)
    policy = load_model(run.resumed or base, device=ranks.device, dtype=dtype, ranks=ranks)
    policy.recompute(ranks.device.type == "cuda" and not args.no_recompute)
    home = "cpu" if args.offload else ranks.device
    reference = load_model(base, device=home, dtype=dtype).requires_grad_(False) if args.kl_coef else None
    tokenizer = load_tokenizer(base)
    tokenizer.think(args.thinking == "on")
    tokenizer.date = args.date
    optimizer = Optimizer(policy, low_memory=args.low_memory)
    run.attach(policy, tokenizer, optimizer)
    prompts, dropped = encode_prompts(rows, tokenizer, args.max_prompt_tokens)
    ranks.print(f"prompts: {len(prompts)} of {args.prompts}" + (f" ({dropped})" if dropped else ""))
    check_rows([row for row, _ in prompts], reward, args.reward_model)
    longest, limit = max(len(ids) for _, ids in prompts), policy.config.max_position_embeddings
    if longest + args.max_response_tokens > limit:
        raise ValueError(f"--max-response-tokens {args.max_response_tokens} after a prompt of {longest} tokens passes "
                         f"{args.model}'s {limit} positions (max_position_embeddings): lower it")
    announce_sampling(policy, args, ranks)
    watch = preflight(policy, reward, tokenizer, args, ranks, run)
    reflection = torch.tensor(reflection_ids(tokenizer), dtype=torch.long)

    tracker = cli.Tracker(args, ranks)
    for step in run.steps(args.steps):
        clock = cli.Clock(ranks)
        episodes = rollout(policy, tokenizer, prompts, args, ranks, step)
        clock.lap("rollout")
        score(episodes, reward, tokenizer, args, ranks)
        clock.lap("reward")
        batch = evaluate(policy, reference, episodes, reflection, args, ranks)
        metrics = summarize(batch)
        clock.lap("logprobs")
        if math.isfinite(metrics["reward/mean"]):
            metrics |= set_advantages(batch, args)
            metrics |= update(policy, optimizer, batch, args, ranks, step)
        else:  # no reward, or one that is not a number, says nothing about the policy: no rank updates
            metrics["policy/skipped"] = args.minibatches * args.epochs
        clock.lap("update")

        due = watch is not None and ((step + 1) % args.eval_every == 0 or step + 1 == args.steps)
        if due:
            with gathered(policy, dtype) as asked:
                metrics |= watch.measure(asked, step + 1)
            clock.lap("eval")

        tokens = metrics["response/tokens"]
        run.log("samples.jsonl", samples(episodes, step))
        updated = metrics["policy/skipped"] < args.minibatches * args.epochs
        row = run.record(metrics | clock.times(rollout=tokens, update=tokens), updated)
        tracker.log(row)
        ranks.print(console_line(row, args.steps))
        for warning in watch.warnings() if due else ():
            ranks.print(f"  warning: {warning}")
        run.save_if_due()
    tracker.close()
    run.finish()
    if watch is not None:
        ranks.print(watch.table())
    ranks.close()


def announce_sampling(policy: Decoder, args: Namespace, ranks: Ranks) -> None:
    """Training samples from the distribution it scores, so the checkpoint's own sampling settings are not used."""
    theirs = {k: (policy.config.generation or {}).get(k) for k in ("temperature", "top_p", "top_k")}
    theirs = ", ".join(f"{k} {v}" for k, v in theirs.items() if v is not None)
    ranks.print(f"sampling at temperature {args.temperature}, top-p {args.top_p}, top-k off"
                + (f"; generation_config.json's {theirs} are not used" if theirs else ""))
    if args.top_p < 1:
        ranks.print("warning: with --top-p below 1 the log-probs are not those of the distribution that is sampled")


def preflight(policy: Decoder, reward: Reward, tokenizer: Tokenizer, args: Namespace, ranks: Ranks,
              run: RunFolder) -> Watch | None:
    """Before the first step: is the reward model right on labelled pairs, and what can the base do?"""
    if args.pairs and not args.reward_model.startswith("rule:"):
        right = reward_accuracy(reward, load_pairs(args.pairs), ranks, args.reward_model)
        ranks.print(f"{args.reward_model} prefers the safe response in {right['all']} of {right['all'].n} pairs; "
                    + ", ".join(f"{name} {e.mean:.2f}" for name, e in right.items() if name != "all"))
        if right["all"].mean < GOOD_REWARD_MODEL:
            ranks.print(f"warning: that is less than {GOOD_REWARD_MODEL}: the policy will learn what it is wrong about")
    if not args.eval_every:
        return None
    watch = Watch(suite_of(policy.config, "validation"), tokenizer, reward, args.reward_model, args.out, ranks)
    if run.resumed:
        watch.recall(run.state["step"])
    else:
        with gathered(policy, getattr(torch, args.dtype)) as asked:
            watch.measure(asked, 0)
    ranks.print(("at the last measurement: " if run.resumed else "before training: ") + watch.summary())
    return watch


def rollout(policy: Decoder, tokenizer: Tokenizer, prompts: list[tuple[Row, list[int]]], args: Namespace, ranks: Ranks,
            step: int) -> list[Episode]:
    """Sample the step's rollout. Row r is sample r % n of the step's prompt r // n."""
    P, n = args.prompts_per_step, args.samples_per_prompt
    drawn = shuffled_passes(len(prompts), range(step * P, (step + 1) * P), args.seed, "prompts")
    rows = range(P * n)
    params = [SamplingParams(temperature=args.temperature, top_p=args.top_p, max_new_tokens=args.max_response_tokens,
                             seed=derive_seed(args.seed, "rollout", step, row)) for row in rows]
    prompt_of = [prompts[drawn[row // n]] for row in rows]
    with gathered(policy, getattr(torch, args.dtype)) as sampler:
        outputs = generate_over_ranks(sampler, [ids for _, ids in prompt_of], params, ranks, progress=ranks.main)
    episodes = []
    for row, ((source, prompt_ids), [completion]) in enumerate(zip(prompt_of, outputs, strict=True)):
        truncated = completion.finish_reason == "length"
        content = completion.token_ids if truncated else completion.token_ids[:-1]
        episodes.append(Episode(
            prompt_ids, completion.token_ids, row=row, group=row // n, source=source, truncated=truncated,
            sampler_logprobs=completion.logprobs, text=tokenizer.decode(content, skip_special_tokens=True),
        ))
    return episodes


def score(episodes: list[Episode], reward: Reward, tokenizer: Tokenizer, args: Namespace, ranks: Ranks) -> None:
    """Set each episode's reward: the reward model reads the text of the conversation, never the policy's ids."""

    def values(part: list[Episode]) -> list[float]:
        conversations = [
            conversation(e.source.prompt, e.text, opened_thought=tokenizer.opens_thought(e.prompt_ids),
                         scope=args.reward_scope)
            for e in part
        ]
        return reward(conversations, [e.source.answer for e in part]).tolist()

    for episode, value in zip(episodes, ranks.spread(episodes, values), strict=True):
        fixed = episode.truncated and isinstance(args.truncated, float)
        episode.reward = args.truncated if fixed else value


@dataclass
class Batch:
    """A rollout, whole on every rank; tensors are [B, T], right-padded."""

    episodes: list[Episode]
    mask: Tensor  # response tokens that count in the loss
    written: Tensor  # all response tokens
    sampler_logprobs: Tensor
    logprobs: Tensor  # the policy's before the update, at the sampling temperature
    entropies: Tensor  # its entropies, at the sampling temperature
    reflecting: Tensor  # which response tokens are reflection tokens
    reflection_entropies: Tensor  # entropies at temperature 1, the convention of that metric
    ref_logprobs: Tensor | None = None
    advantages: Tensor | None = None


@torch.no_grad()
def evaluate(policy: Decoder, reference: Decoder | None, episodes: list[Episode], reflection: Tensor, args: Namespace,
             ranks: Ranks) -> Batch:
    """The trainer's and the reference's log-probs of every response token, each rank having run its share."""
    mine = own_microbatches(episodes, args.tokens_per_microbatch, policy.config, ranks)
    found: list[dict[str, Tensor]] = [{} for _ in episodes]  # name -> [length], of the rows that this rank runs

    def keep(indices: list[int], packed: Packed, **columns: Tensor) -> None:
        for name, flat in columns.items():
            for i, part in zip(indices, flat.cpu().split(packed.lengths), strict=True):
                found[i][name] = part.clone()  # sent to another rank, a part would take the whole micro-batch along

    packs = [(indices, pack([episodes[i] for i in indices], ranks.device)) for indices in mine]
    for indices, packed in cli.progress(packs, "log-probs", ranks):
        hidden = response_hidden(policy, packed)
        logprobs, entropies = head_logprobs(policy, hidden, packed, args.temperature)
        at_one = entropies if args.temperature == 1 else head_logprobs(policy, hidden, packed, 1.0)[1]
        keep(indices, packed, logprobs=logprobs, entropies=entropies, reflection_entropies=at_one)
    if reference is not None:
        with visiting(reference, ranks.device):
            for indices, packed in cli.progress(packs, "reference", ranks):
                keep(indices, packed, ref_logprobs=response_logprobs(reference, packed, args.temperature)[0])
    of_row = dict(ranks.gather([(i, columns) for i, columns in enumerate(found) if columns]))
    rows = [
        of_row[i] | {
            "sampler_logprobs": torch.tensor(e.sampler_logprobs),
            "reflecting": torch.isin(torch.tensor(e.response_ids), reflection),
            "written": torch.ones(len(e.response_ids), dtype=torch.bool),
            "mask": torch.full((len(e.response_ids),), e.reward != UNREAD and not (
                e.truncated and args.truncated == "mask")),
        }
        for i, e in enumerate(episodes)
    ]  # fmt: skip
    return Batch(episodes, **{
        name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True).to(ranks.device)
        for name in rows[0]})


def set_advantages(batch: Batch, args: Namespace) -> dict[str, float]:
    """Rewards to advantages, normalised over the whole rollout. Returns their moments before that."""
    device = batch.mask.device
    rewards = torch.tensor(fill_unread(batch.episodes), dtype=torch.float64, device=device)
    group = torch.tensor([e.group for e in batch.episodes], dtype=torch.long, device=device)
    returns = reinforce.advantages(
        rewards, batch.logprobs, batch.ref_logprobs, batch.mask, kl_coef=args.kl_coef, gamma=args.gamma, group=group,
        estimator=args.estimator, reward_clip=args.reward_clip, kl_kind=args.kl_kind, normalize=False,
    )
    mean, variance = reinforce.global_moments(returns, batch.mask)
    batch.advantages = returns if args.no_normalize else reinforce.standardize(returns, batch.mask, mean, variance)
    return {"advantage/mean": mean.item(), "advantage/std": variance.sqrt().item()}


def update(policy: Decoder, optimizer: Optimizer, batch: Batch, args: Namespace, ranks: Ranks,
           step: int) -> dict[str, float]:
    """The clipped policy-gradient steps of one rollout: `epochs` passes over its rows in `minibatches` parts each."""
    lr = args.lr * cosine_schedule(step, args.steps, WARMUP_SHARE, FINAL_LR_SHARE)
    totals, losses, norms, M, sums = dict.fromkeys(LOSS_SUMS, 0.0), [], [], args.minibatches, {}
    loss_tokens = batch.mask.sum(1).tolist()
    for epoch in range(args.epochs):
        order = permutation(len(batch.episodes), args.seed, "minibatches", step, epoch)
        for part in cli.progress(range(M), "updates", ranks):
            rows = order[part * len(order) // M : (part + 1) * len(order) // M]
            counts = [loss_tokens[row] for row in rows]
            denominator = sum(counts) if args.reduction == "token" else sum(count > 0 for count in counts)
            sums = backward(policy, batch, rows, denominator, args, ranks)
            loss = sums["loss_sum"] / max(denominator, 1)
            norm = optimizer.step(lr) if denominator and math.isfinite(loss) else optimizer.discard()
            if math.isfinite(norm):
                totals = {name: totals[name] + sums[name] for name in LOSS_SUMS}
                losses.append(loss)
                norms.append(norm)
    updates, tokens = max(len(norms), 1), max(totals["tokens"], 1)
    return {
        "policy/loss": sum(losses) / updates,
        "policy/grad_norm": sum(norms) / updates,
        "policy/clip_fraction": totals["clip_count"] / tokens,
        "policy/ppo_kl": totals["ppo_kl_sum"] / tokens,
        "policy/lr": lr,
        "policy/skipped": args.epochs * M - len(norms),
    } | {name: value for name, value in sums.items() if name not in LOSS_SUMS}  # experts' loads in the last mini-batch


def backward(policy: Decoder, batch: Batch, minibatch: list[int], denominator: int, args: Namespace,
             ranks: Ranks) -> dict[str, float]:
    """Gradients of one mini-batch (rows of the batch), each rank having run its share; the sums are over all ranks."""
    sums = torch.zeros(len(LOSS_SUMS), dtype=torch.float64, device=ranks.device)
    episodes = [batch.episodes[row] for row in minibatch]
    balance = Balance(policy.config, sum(map(len, episodes)), ranks)
    for indices in own_microbatches(episodes, args.tokens_per_microbatch, policy.config, ranks):
        rows = [minibatch[i] for i in indices]
        packed = pack([episodes[i] for i in indices], ranks.device)
        logprobs = packed.pad(response_logprobs(policy, packed, args.temperature)[0])  # [b, T']
        T = logprobs.shape[1]
        mask = batch.mask[rows, :T]
        loss, stats = reinforce.policy_loss(
            logprobs, batch.logprobs[rows, :T], batch.advantages[rows, :T], mask, clip_low=args.clip_low,
            clip_high=args.clip_high, dual_clip=args.dual_clip, reduction=args.reduction, denominator=denominator,
        )
        if args.estimator == "reinforce++-baseline" and args.kl_coef:
            loss = loss + args.kl_coef * reinforce.kl_loss(
                logprobs, batch.ref_logprobs[rows, :T], mask, reduction=args.reduction, denominator=denominator)
        (loss + balance.add(packed.memory.hybrid.routing)).backward()
        sums += torch.stack([stats[name] for name in LOSS_SUMS])
    return dict(zip(LOSS_SUMS, ranks.sum_(sums).tolist(), strict=True)) | balance.metrics()


def summarize(batch: Batch) -> dict[str, float]:
    """What the rollout looks like; the README's glossary explains each name."""
    scored = [e.reward for e in batch.episodes if e.reward != UNREAD]
    rewards = torch.tensor(scored or [math.nan], dtype=torch.float64)
    lengths = [len(e.response_ids) for e in batch.episodes]
    tokens, truncated = sum(lengths), sum(e.truncated for e in batch.episodes) / len(batch.episodes)
    mismatch = reinforce.gap_stats(batch.sampler_logprobs, batch.logprobs, batch.written)
    metrics = {
        "reward/mean": rewards.mean(),
        "reward/std": rewards.std(correction=0),
        "reward/min": rewards.min(),
        "reward/max": rewards.max(),
        "reward/unread": torch.tensor(len(batch.episodes) - len(scored)),
        "policy/entropy": batch.entropies[batch.written].double().mean(),
        "reflection/entropy": batch.reflection_entropies[batch.reflecting].double().mean(),  # NaN without such tokens
        "reflection/per_1000": 1000 * batch.reflecting.double().sum() / tokens,
        "mismatch/mean": mismatch["abs_sum"] / tokens,
        "mismatch/k3": mismatch["k3_sum"] / tokens,
        "mismatch/max": mismatch["abs_max"],
    }
    if batch.ref_logprobs is not None:
        kl = reinforce.gap_stats(batch.logprobs, batch.ref_logprobs, batch.written)
        metrics |= {"kl/k1": kl["k1_sum"] / tokens, "kl/k3": kl["k3_sum"] / tokens}
    return {name: value.item() for name, value in metrics.items()} | {
        "response/tokens": tokens,
        "response/length_mean": tokens / len(lengths),
        "response/length_max": max(lengths),
        "response/truncated": truncated,
        "response/eos": 1 - truncated,
    }


def samples(episodes: list[Episode], step: int) -> list[dict]:
    """The step's first episodes as rows of samples.jsonl."""
    return [
        {"step": step + 1, "row": e.row, "prompt": e.source.prompt, "response": e.text,
         "reward": e.reward if math.isfinite(e.reward) else None,
         "tokens": len(e.response_ids), "truncated": e.truncated}
        for e in episodes[:SAMPLES_PER_STEP]
    ]


def console_line(row: dict, steps: int) -> str:
    def show(name: str, form: str) -> str:
        return "-" if row.get(name) is None else format(row[name], form)

    parts = [
        f"step {row['step']}/{steps}",
        f"reward {show('reward/mean', '.3f')} ± {show('reward/std', '.3f')}",
        f"kl {show('kl/k1', '.4f')}",
        f"entropy {show('policy/entropy', '.3f')}",
        f"clip {show('policy/clip_fraction', '.3f')}",
        f"grad {show('policy/grad_norm', '.3f')}",
        f"length {show('response/length_mean', '.0f')} ({show('response/truncated', '.0%')} cut)",
        f"lr {show('policy/lr', '.1e')}",
        f"{row['time/step']:.1f} s, {row['time/rollout_per_s']:.0f} tok/s",
    ]
    signs = {
        f"{row['policy/skipped']} updates skipped": row["policy/skipped"],
        f"{row['reward/unread']} too long for the reward model": row["reward/unread"],
        "all rewards equal": row["reward/min"] is not None and row["reward/min"] == row["reward/max"],
        "all responses cut: raise --max-response-tokens": row["response/truncated"] == 1,
        "gradient exactly 0": row.get("policy/grad_norm") == 0 and not row["policy/skipped"],
    }
    return " | ".join(parts + [sign for sign, shows in signs.items() if shows])


if __name__ == "__main__":
    with cli.readable_errors():
        main()
