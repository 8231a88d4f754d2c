"""Stored episodes that one process and two gloo processes work through; test_train.py spawns `run_cases`."""

import os
from argparse import Namespace
from pathlib import Path

import torch

import train_rl
import train_sft
from nanosafe.data import Document, Episode, Row
from nanosafe.distributed import Ranks
from nanosafe.optim import Optimizer
from nanosafe.sampler import SamplingParams, generate_over_ranks
from nanosafe.weights import load_model

CASES = {  # rows of the rollout, and what differs from the defaults
    "unequal": dict(rows=5),
    "rank without a row": dict(rows=1),
    "rank without a token": dict(rows=3, truncated="mask"),  # row 1, the only one of rank 1, is truncated
    "baseline": dict(rows=6, estimator="reinforce++-baseline"),
    "sequence": dict(rows=5, reduction="sequence"),
    "sft": dict(rows=5),
}


def stored_episodes(rows: int, vocab_size: int) -> list[Episode]:
    generator = torch.Generator().manual_seed(7)

    def ids(length):
        return torch.randint(3, vocab_size, (length,), generator=generator).tolist()

    episodes = []
    for row in range(rows):
        length = 3 + 4 * row
        e = Episode(ids(4 + row), ids(length), row=row, group=row // 2, source=Row([], "stored"), truncated=row == 1,
                    sampler_logprobs=(-3 * torch.rand(length, generator=generator)).tolist(), text="")  # fmt: skip
        e.reward = float(torch.randn((), generator=generator))
        episodes.append(e)
    return episodes


def run_cases(rank: int, world_size: int, world: Path, out: Path) -> None:
    """Write {case: {"metrics", "gradients"}} of this rank to OUT/WORLD_SIZE-RANK.pt."""
    torch.set_num_threads(1)
    if world_size > 1:
        address = f"{out}/store"
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
        torch.distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=world_size)
    ranks = Ranks("cpu")
    results = {name: run_case(name, world, ranks) for name in CASES}
    results["completions"] = [completions(world, ranks, count) for count in (23, 1, 0)]
    torch.save(results, out / f"{world_size}-{rank}.pt")
    ranks.close()


def completions(world: Path, ranks: Ranks, count: int) -> list[list[tuple]]:
    """Of `count` prompts, the same on all ranks, of lengths and numbers of samples that differ much."""
    policy = load_model(world / "policy", dtype=torch.float32)
    prompts = [[5 + i] * (1 + 7 * i % 60) for i in range(count)]
    params = [SamplingParams(max_new_tokens=1 + 11 * i % 40, n=1 + i % 3, seed=i) for i in range(count)]
    outputs = generate_over_ranks(policy, prompts, params, ranks)
    return [[(c.token_ids, c.logprobs, c.finish_reason) for c in samples] for samples in outputs]


def run_case(name: str, world: Path, ranks: Ranks) -> dict:
    policy = load_model(world / "policy", dtype=torch.float32)
    reference = load_model(world / "policy", dtype=torch.float32)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.01)  # else the KL would be zero
    case = CASES[name]
    args = Namespace(
        truncated="keep", estimator="reinforce++", reduction="token", temperature=1.3, kl_coef=0.1, gamma=0.99,
        reward_clip=None, kl_kind="k1", no_normalize=False, clip_low=0.2, clip_high=0.2, dual_clip=None,
        tokens_per_microbatch=40,
    )  # fmt: skip
    vars(args).update({key: value for key, value in case.items() if key != "rows"})
    episodes = stored_episodes(case["rows"], policy.config.vocab_size)
    optimizer = Optimizer(policy, ranks)
    if name == "sft":
        documents = [Document(e.prompt_ids, e.response_ids) for e in episodes]
        metrics = train_sft.backward(policy, documents, args.tokens_per_microbatch, ranks)
    else:
        mine = [e for e in episodes if e.row in ranks.own(range(len(episodes)))]
        reflection = torch.arange(3, policy.config.vocab_size, 3)
        batch = train_rl.evaluate(policy, reference, mine, reflection, args, ranks)
        metrics = train_rl.summarize(batch, ranks) | train_rl.set_advantages(batch, args, ranks)
        batch.logprobs += 0.4 * batch.sampler_logprobs.sin()  # as if the policy had moved: some ratios are clipped
        counts = [row.loss_tokens for row in batch.rows]
        denominator = sum(counts) if args.reduction == "token" else sum(count > 0 for count in counts)
        metrics |= train_rl.backward(policy, batch, list(range(len(mine))), denominator, args, ranks)
    norm, gradients = [], {}
    for key, master in optimizer.masters.items():
        gradients[key] = ranks.sum_(torch.zeros_like(master) if master.grad is None else master.grad.clone())
        norm.append(gradients[key].norm())
    optimizer.max_grad_norm = 1e9
    metrics["grad_norm"] = optimizer.step(lr=0.0)
    assert abs(metrics["grad_norm"] - torch.stack(norm).norm().item()) <= 1e-5 * metrics["grad_norm"]
    return {"metrics": metrics, "gradients": gradients}
