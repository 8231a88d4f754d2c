"""Stored episodes that one process and two gloo processes work through; test_train.py spawns `run_cases`."""

import os
from argparse import Namespace
from pathlib import Path

import torch
from tiny_models import tiny_config

import train_rl
import train_sft
from nanosafe.io.files import staged
from nanosafe.kernels import split_adam
from nanosafe.model.attention import KVCache, PagedDecode
from nanosafe.model.decode import decode_hidden, join_projections
from nanosafe.model.decode import joined as joined_tensors
from nanosafe.model.decoder import Decoder
from nanosafe.model.granite import make_decoder
from nanosafe.model.weights import StoredTensors, save_model, save_tensors
from nanosafe.names import load_model
from nanosafe.parallel import Ranks, full_tensor, local_part, shard, unsharded
from nanosafe.sampler.generation import generate_over_ranks
from nanosafe.sampler.params import SamplingParams
from nanosafe.text.data import Document, Episode, Row
from nanosafe.train.batch import score_tokens
from nanosafe.train.metrics import policy_metrics, rollout_metrics
from nanosafe.train.optim import Optimizer

STEPS, LR = 3, 1e-3
KINDS = {"float32": (torch.float32, False), "bfloat16": (torch.bfloat16, False), "low-memory": (torch.bfloat16, True)}
CASES = {  # rows of the rollout, and what differs from the defaults
    "unequal": dict(rows=5),
    "rank without a row": dict(rows=1),
    "rank without a token": dict(rows=3, truncated="mask"),  # row 1, the only one of rank 1, is truncated
    "baseline": dict(rows=6, estimator="reinforce++-baseline"),
    "sequence": dict(rows=5, reduction="sequence"),
    "sampler": dict(rows=5, old_logprobs="sampler"),  # whose scores the update itself makes
    "sft": dict(rows=5),
    "recomputed": dict(rows=5, recompute="layer"),
    "products kept": dict(rows=5, recompute="some"),
    "one by one": dict(rows=5, recompute="layer", tokens_per_microbatch=1),  # then a balance loss is of each text alone
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
    ranks = joined(rank, world_size, out / "first")
    results = {name: run_case(name, world, ranks) for name in CASES}
    results["completions"] = [completions(world, ranks, count) for count in (23, 1, 0)]
    for kind in KINDS:
        results[kind] = train_on_stored(world, ranks, kind, out / f"saved-{world_size}-{kind}", None)
    torch.save(results, out / f"{world_size}-{rank}.pt")
    ranks.close()


def run_named(rank: int, world_size: int, world: Path, out: Path, worlds: dict[str, Path]) -> None:
    """`run_cases` of a few, each in a world of its own; in `world` several steps, saved, and completions."""
    ranks = joined(rank, world_size, out / "third")
    results = {name: run_case(name, place, ranks) for name, place in worlds.items()}
    results["trained"] = train_on_stored(world, ranks, "float32", out / f"saved-{world_size}", None)
    results["completions"] = completions(world, ranks, 5)
    torch.save(results, out / f"{world_size}-{rank}.pt")
    ranks.close()


def run_resumed(rank: int, world_size: int, world: Path, out: Path) -> None:
    """Go on from what each number of processes has saved; writes {(saved by, kind): ...} to OUT/resumed-*.pt."""
    ranks = joined(rank, world_size, out / "second")
    results = {(by, kind): train_on_stored(world, ranks, kind, out, out / f"saved-{by}-{kind}")
               for by in (1, 2) for kind in KINDS}  # fmt: skip
    torch.save(results, out / f"resumed-{world_size}-{rank}.pt")
    ranks.close()


def run_decoded(rank: int, world_size: int, folder: Path) -> None:
    """Write what `decoded` makes of a sharded model's gathered copy, its projections joined, to FOLDER."""
    ranks = joined(rank, world_size, folder / "fourth")
    model = load_model(folder, dtype=torch.float32, ranks=ranks)
    with unsharded(model, torch.float32) as copy:
        join_projections(copy)
        attention = copy.model.layers[0].self_attn
        for name in ("weight", "bias"):
            projections = attention.q_proj, attention.k_proj, attention.v_proj
            assert joined_tensors([getattr(projection, name) for projection in projections]) is not None
        logprobs = decoded(copy, torch.tensor([[3, 14, 15, 9], [2, 6, 5, 3]]))
    torch.save(logprobs, folder / f"decoded-{world_size}-{rank}.pt")
    ranks.close()


@torch.no_grad()
def decoded(model: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """Log-probs [B, T, V] after each token of ids [B, T], decoded one after the other into pages of four."""
    (B, T), pages = ids.shape, -(-ids.shape[1] // 4)
    cache = KVCache(model.config, B * pages, 4, ids.device, torch.float32)
    tables = torch.arange(B * pages, dtype=torch.int32).flip(0).view(B, pages)
    steps = []
    for position in range(T):
        backend = PagedDecode(cache, tables, torch.full((B,), position))
        steps.append(model.logits(decode_hidden(model, ids[:, position], backend)).log_softmax(-1))
    return torch.stack(steps, dim=1)


def joined(rank: int, world_size: int, store: Path) -> Ranks:
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    return Ranks("cpu")


def completions(world: Path, ranks: Ranks, count: int) -> list[list[tuple]]:
    """Of `count` prompts, the same on all ranks, of lengths and numbers of samples that differ much."""
    policy = load_model(world / "policy", dtype=torch.float32)
    prompts = [[5 + i] * (1 + 7 * i % 60) for i in range(count)]
    params = [SamplingParams(max_new_tokens=1 + 11 * i % 40, n=1 + i % 3, seed=i) for i in range(count)]
    outputs = generate_over_ranks(policy, prompts, params, ranks)
    return [[(c.token_ids, c.logprobs, c.finish_reason) for c in samples] for samples in outputs]


def run_case(name: str, world: Path, ranks: Ranks) -> dict:
    policy = load_model(world / "policy", dtype=torch.float32, ranks=ranks)
    policy.recompute(CASES[name].get("recompute", "none"))
    reference = load_model(world / "policy", dtype=torch.float32)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.01)  # else the KL would be zero
    args = arguments(CASES[name])
    episodes = stored_episodes(CASES[name]["rows"], policy.config.vocab_size)
    optimizer = Optimizer(policy, max_grad_norm=1e9)
    if name == "sft":
        documents = [Document(e.prompt_ids, e.response_ids) for e in episodes]
        metrics = train_sft.backward(policy, documents, args.tokens_per_microbatch, ranks)
    else:
        batch, metrics = prepared(policy, reference, episodes, args, ranks)
        sums, experts = train_rl.backward(policy, batch, list(range(len(episodes))), args, ranks)
        metrics |= sums | experts
        metrics |= policy_metrics(batch, torch.arange(3, policy.config.vocab_size, 3))
    gradients = {name: full_tensor(p.grad).clone() for name, p in policy.named_parameters()}
    metrics["grad_norm"] = optimizer.step(lr=0.0)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    assert abs(metrics["grad_norm"] - norm) <= 1e-5 * norm
    return {"metrics": metrics, "gradients": gradients}


def arguments(case: dict) -> Namespace:
    return Namespace(**dict(
        truncated="keep", estimator="reinforce++", reduction="token", temperature=1.3, kl_coef=0.1, gamma=0.99,
        reward_clip=None, kl_kind="k1", no_normalize=False, clip_low=0.2, clip_high=0.2, dual_clip=None,
        tokens_per_microbatch=40, old_logprobs="trainer", minibatches=2, epochs=1, seed=0, lr=LR, steps=STEPS,
        low_memory=False,
    ) | {key: value for key, value in case.items() if key != "rows"})  # fmt: skip


def prepared(policy, reference, episodes: list[Episode], args: Namespace, ranks: Ranks):
    """The batch as it goes into the update, and its metrics."""
    reflection = torch.arange(3, policy.config.vocab_size, 3)
    batch = score_tokens(policy, reference, episodes, args, ranks)
    metrics = rollout_metrics(batch, reflection) | train_rl.set_advantages(batch, args)
    # As if the policy had moved: some ratios are clipped.
    batch.old_logprobs = batch.old_logprobs + 0.4 * batch.sampler_logprobs.sin()
    return batch, metrics


def train_on_stored(world: Path, ranks: Ranks, kind: str, out: Path, resumed: Path | None) -> dict:
    """STEPS whole updates on the same episodes, or, from what a run saved in `resumed` after two, the last of them."""
    dtype, low_memory = KINDS[kind]
    policy = load_model(resumed or world / "policy", dtype=dtype, ranks=ranks, keep_dtype=low_memory)
    reference = load_model(world / "policy", dtype=dtype)
    optimizer, rows = Optimizer(policy, low_memory=low_memory), []
    if resumed:
        optimizer.load_state(StoredTensors(resumed, "optimizer"))
    for step in range(2 if resumed else 0, STEPS):
        if step == 2 and not resumed:
            save_model(policy, out, dtype=dtype, writes=ranks.main, max_shard_bytes=20_000)
            with staged(out, ranks.main) as new:
                save_tensors(optimizer.state(), new, "optimizer", max_shard_bytes=20_000)
            ranks.wait()
        episodes = stored_episodes(7, policy.config.vocab_size)
        batch, metrics = prepared(policy, reference, episodes, args := arguments({}), ranks)
        rows.append(metrics | train_rl.update(policy, optimizer, batch, args, ranks, step))
    state, held = optimizer.state(), sum(local_part(weight).nbytes for weight in policy.parameters())
    for path, tensor in state.items():
        if not path.startswith("step/"):  # a number
            held += local_part(tensor).nbytes
    weights = {name: full_tensor(p).detach().clone() for name, p in optimizer.masters.items()}
    if low_memory:
        for name, weight in weights.items():
            weights[name] = split_adam.join(weight, full_tensor(state[f"remainder/{name}"]))
    return {"rows": rows, "weights": weights, "bytes": held}


def shard_in_turn(rank: int, folder: Path) -> None:
    """Shard a model where one rank of the node goes first, on gloo beside GPUs that PyTorch sees."""
    ranks = joined(rank, 2, folder / "meeting")
    torch.cuda.is_available = lambda: True
    with ranks.local_main_first():
        shard(make_decoder(tiny_config("qwen3")), ranks, torch.float32)
    ranks.close()
