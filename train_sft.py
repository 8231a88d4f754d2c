"""Supervised fine-tuning on responses, the whole loop.

    python train_sft.py --model qwen3-0.6b
    torchrun --nproc_per_node=8 train_sft.py --model r1-qwen-7b

The loss is the negative log-likelihood of response tokens (thought, answer and the token that ends the turn), never of
the prompt, averaged over all response tokens of a step: one global denominator over micro-batches and ranks. The
default recipe is STAR-1's own: 5 epochs of its 1,000 rows in batches of 128.
"""

import nanosafe  # noqa: F401  First, for it sets what PyTorch reads when it is imported.
from nanosafe.train.flags import sft_flags

if __name__ == "__main__":
    sft_flags(__doc__).parse_args()  # --help and wrong flags end here, before the seconds that PyTorch takes to load

# isort: split
import math

import torch

from nanosafe import plan
from nanosafe.evals.during_training import measure_if_due, show_measurement, show_table, start_watch
from nanosafe.evals.tiny_suite import suite_of
from nanosafe.io.progress import progress
from nanosafe.model.config import ModelConfig
from nanosafe.model.decoder import Decoder
from nanosafe.model.granite import Balance
from nanosafe.names import checkpoint, load_policy, load_rows, load_tokenizer, recipe
from nanosafe.parallel import Ranks
from nanosafe.plan import random_weights
from nanosafe.plan.report import show_plan
from nanosafe.randomness import shuffled_passes
from nanosafe.sampler.spread import check_spread
from nanosafe.text.data import Document, sft_documents, sft_steps
from nanosafe.train import cli
from nanosafe.train.optim import Optimizer, cosine_schedule
from nanosafe.train.packing import local_microbatches, pack, response_logprobs
from nanosafe.train.run_folder import RunFolder
from nanosafe.train.tracking import Clock, Tracker

WARMUP_SHARE, FINAL_LR_SHARE, WEIGHT_DECAY = 0.05, 0.0, 1e-4


def main(argv: list[str] | None = None) -> None:
    args, origins = cli.settings(sft_flags(__doc__), argv, "sft", recipe)
    if args.plan is not None:
        return show_plan("sft", args)
    ranks = cli.start(args, origins, "sft")
    if args.rollout_shards > 1:
        check_spread(plan.find_config(args.model)[0], args.rollout_shards, args.model)
    if args.random_weights:
        random_weights.substitute(args, origins["command line"], ranks)
    run = RunFolder(args, ranks)
    if run.complete:
        show_table(run)
        return ranks.close()

    # A name is looked up by one rank of each node first, which alone downloads.
    with ranks.local_main_first():
        base = checkpoint(args.model)
        rows = load_rows(args.data)
    run.check_data(args.data, rows)
    tokenizer = load_tokenizer(base)
    tokenizer.think(args.thinking == "on")
    tokenizer.date = args.date
    config = ModelConfig.from_folder(base)
    suite = suite_of(config, "validation") if args.eval_every else []
    documents, cut = [], 0
    for row in progress(rows, "tokenising"):
        of_row, cut_of_row = sft_documents(row, tokenizer, args.max_tokens)
        documents += of_row
        cut += cut_of_row
    ranks.print(f"data: {len(documents)} responses from {len(rows)} rows of {args.data}, "
                f"{cut} cut or left out at {args.max_tokens} tokens")
    if not documents:
        raise ValueError(f"{args.data}: no prompt leaves room for a response; raise --max-tokens")
    longest, limit = max(map(len, documents)), config.max_position_embeddings
    if longest > limit:
        raise ValueError(f"{args.data}: a conversation of {longest} tokens passes {args.model}'s {limit} positions "
                         f"(max_position_embeddings): lower --max-tokens to {limit}")
    steps = args.steps or sft_steps(args.epochs, len(documents), args.batch_size)
    passes = steps * args.batch_size / len(documents)
    unseen = ", the last of which are never seen" if passes < 1 else ""
    ranks.print(f"{steps} steps of {args.batch_size}: {passes:.2f} passes over the responses{unseen}")

    model = load_policy(args, base, run.resumed, ranks)
    model.recompute(plan.choose_recompute("sft", args, ranks))
    optimizer = Optimizer(model, weight_decay=WEIGHT_DECAY, low_memory=args.low_memory)
    run.attach(model, tokenizer, optimizer)
    watch = start_watch(suite, model, tokenizer, run)

    tracker = Tracker(args, ranks)
    for step in run.steps(steps):
        clock = Clock(ranks)
        # The batch is a function of seed and step, so that a resumed run needs no generator's state.
        positions = range(step * args.batch_size, (step + 1) * args.batch_size)
        batch = [documents[i] for i in shuffled_passes(len(documents), positions, args.seed, "data")]
        metrics = backward(model, batch, args.tokens_per_microbatch, ranks)
        lr = args.lr * cosine_schedule(step, steps, WARMUP_SHARE, FINAL_LR_SHARE)
        norm = optimizer.step(lr) if math.isfinite(metrics["sft/loss"]) else optimizer.discard()
        clock.lap("update")

        epoch = (step + 1) * args.batch_size / len(documents)
        metrics |= {"sft/grad_norm": norm, "sft/lr": lr, "sft/epoch": epoch}
        metrics |= measure_if_due(watch, model, run, clock)
        metrics |= clock.metrics(update=sum(map(len, batch)))
        row = run.record(metrics, updated=math.isfinite(norm))
        tracker.log(row)
        ranks.print(console_line(row, steps))
        show_measurement(watch, run)
        run.save_if_due()
    tracker.close()
    run.finish()
    if watch is not None:
        ranks.print(watch.table())
    ranks.close()


def backward(model: Decoder, batch: list[Document], tokens_per_microbatch: int,
             ranks: Ranks) -> dict[str, float]:
    """Gradients of the mean negative log-likelihood over all response tokens of `batch`; each rank runs its share.

    Returns loss and entropy (nats per token) over all ranks, and the experts' loads where there are experts.
    """
    tokens = sum(len(document.response_ids) for document in batch)
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    balance = Balance(model.config, sum(map(len, batch)), ranks)
    for indices in local_microbatches(batch, tokens_per_microbatch, ranks):
        packed = pack([batch[i] for i in indices], ranks.device)
        logprobs, entropies = response_logprobs(model, packed)
        # Also without a document: under sharding the other ranks wait for this backward pass.
        (-logprobs.sum() / tokens + balance.add(packed.memory.hybrid.routing)).backward()
        sums += torch.stack([-logprobs.double().sum(), entropies.double().sum()]).detach()
    loss, entropy = (ranks.sum_(sums) / tokens).tolist()
    return {"sft/loss": loss, "sft/entropy": entropy, "sft/tokens": tokens} | balance.metrics()


def console_line(row: dict, steps: int) -> str:
    skipped = row["sft/grad_norm"] is None
    loss = "not finite, update skipped" if skipped else format(row["sft/loss"], ".4f")
    return (
        f"step {row['step']}/{steps} | loss {loss} | entropy {row['sft/entropy'] or 0:.3f}"
        f" | grad {row['sft/grad_norm'] or 0:.3f} | lr {row['sft/lr']:.1e} | epoch {row['sft/epoch']:.2f}"
        f" | {row['time/step']:.1f} s, {row['time/update_per_s']:.0f} tok/s"
    )


if __name__ == "__main__":
    with cli.readable_errors():
        main()
