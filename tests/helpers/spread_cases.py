"""What one process and ranks that hold a model together sample; test_spread.py spawns these functions."""

import time
from pathlib import Path

import torch
from parallel_cases import joined
from test_plan import LiveBytes
from torch.distributed.tensor import DTensor

import train_rl
from nanosafe.evals.benchmark import Benchmark, Question
from nanosafe.evals.run import respond
from nanosafe.model.attention import KVCache
from nanosafe.model.lora import adapted, copy_whole, start_adapters
from nanosafe.names import load_model, load_reward, load_tokenizer
from nanosafe.parallel import Ranks
from nanosafe.sampler import packed
from nanosafe.sampler.engine import Engine
from nanosafe.sampler.generation import generate_over_ranks
from nanosafe.sampler.packed import SMALLEST, forget_packed
from nanosafe.sampler.params import SamplingParams
from nanosafe.sampler.spread import sampling_model

# Eight heads and four of keys; of 600 tokens four ranks have 256, 256, 88 and none.
SHAPE = dict(num_attention_heads=8, num_key_value_heads=4, head_dim=8, intermediate_size=48, vocab_size=600)
LARGE = SHAPE | dict(vocab_size=1024, num_hidden_layers=6)  # of which the bytes are counted
CASES = {  # family, and what differs
    "qwen3": ("qwen3", {}),
    "qwen3 tied": ("qwen3", dict(tie_word_embeddings=True)),
    "qwen2": ("qwen2", {}),
    "llama": ("llama", {}),
    "llama with biases and adapters": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "granite": ("granite", {}),
}
FILTERS = [{}, dict(top_p=0.7), dict(top_k=5, temperature=0.8), dict(min_p=0.1)]


def requests(filters: list[dict]) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of unlike lengths, some of them equal; with and without temperature, samples and `filters` in turn."""
    prompts = [[5 + i // 2] * (1 + 17 * (i // 2) % 60) for i in range(7)]
    params = []
    for i in range(len(prompts)):
        how = dict(temperature=[1.0, 0.0, 1.3][i % 3], n=1 + i % 3) | filters[i % len(filters)]
        params.append(SamplingParams(max_new_tokens=34 if i == 1 else 3 + 5 * i % 17, seed=i, **how))
    return prompts, params


def sampled(model, ranks: Ranks, filters: list[dict], **options) -> list:
    outputs = generate_over_ranks(model, *requests(filters), ranks, **options)
    forget_packed(model)
    return [[(c.token_ids, c.logprobs, c.finish_reason) for c in samples] for samples in outputs]


def sample_cases(rank: int, world: int, folder: Path) -> None:
    """Write {(case, T): {how: completions}}, "answers", "rewards" and "bytes" of this rank to FOLDER/WORLD-RANK.pt."""
    ranks, results = joined(rank, world, folder / f"store-{world}"), {}
    for case in CASES:
        packed.SMALLEST = 1 if "tied" in case or "biases" in case else SMALLEST  # there all products are packed ones
        lora = (3, 6.0) if "adapters" in case else None
        policy = load_model(folder / case, dtype=torch.float32, ranks=ranks, lora=lora)
        fill_adapters(policy)
        for T in [2, 4] if world == 4 and case == "qwen3" else [world]:
            with sampling_model(policy, torch.float32, ranks, T) as model:
                found = results[case, T] = {}
                found["plain"] = sampled(model, ranks, [{}])
                if case != "qwen3":
                    continue
                found["filtered"] = sampled(model, ranks, FILTERS)
                found["banned"] = sampled(model, ranks, [{}], banned_token_ids=[3, 300, 599])
                # Pages, of which there are so few that some sequences are preempted.
                position = KVCache.bytes_per_position(model.config, torch.float32)
                found["paged"] = sampled(model, ranks, [{}], block_size=16, cache_bytes=7 * 16 * position)
            assert T == 1 or all(parameter.is_meta for parameter in model.parameters())
    results["answers"] = answers(folder / "policy", ranks)
    results["rewards"] = rewards(folder / "reward", ranks)
    if world > 1:
        results["bytes"] = measured(folder / "large", ranks)
    torch.save(results, folder / f"{world}-{rank}.pt")
    ranks.close()


def fill_adapters(policy) -> None:
    start_adapters(policy, seed=0)
    for name, layer in adapted(policy).items():
        generator = torch.Generator().manual_seed(len(name))
        copy_whole(layer.lora_B, 0.1 * torch.randn(layer.lora_B.shape, generator=generator))


def answers(folder: Path, ranks: Ranks) -> list[dict]:
    """The records of a benchmark that all ranks together are asked."""
    questions = [Question(str(i), [{"role": "user", "content": "a" * (1 + 5 * i)}], "", None) for i in range(5)]
    benchmark = Benchmark("lengths", "reasoning", "right", questions, lengths, "", "", samples=2, top_p=0.9,
                          max_response_tokens=9)  # fmt: skip
    policy, tokenizer = load_model(folder, dtype=torch.float32, ranks=ranks), load_tokenizer(folder)
    with sampling_model(policy, torch.float32, ranks, ranks.world) as model:
        return respond(model, tokenizer, benchmark, ranks=ranks, seed=0, tokens_per_microbatch=None)


def lengths(questions: list[Question], responses: list[str]) -> list[dict[str, float]]:
    return [{"right": float(len(response))} for response in responses]


def rewards(folder: Path, ranks: Ranks) -> torch.Tensor:
    """Of as many conversations as the rank's number times two, and so of another number of micro-batches on each; of
    all on one process."""
    reward = load_reward(str(folder), dtype=torch.float32, ranks=ranks)
    conversations = []
    for i in range(8 if ranks.world == 1 else 2 * ranks.rank):
        conversations.append([{"role": "user", "content": "a" * i}, {"role": "assistant", "content": "b" * (9 - i)}])
    scores = reward.score(conversations, tokens_per_microbatch=20)
    assert all(isinstance(parameter, DTensor) == (ranks.world > 1) for parameter in reward.model.parameters())
    return scores


def measured(folder: Path, ranks: Ranks) -> dict[str, int]:
    """Bytes of a rank's part, of its cache, the most while the part is made, and what is left."""
    policy = load_model(folder, dtype=torch.float32, ranks=ranks)
    with LiveBytes(policy.parameters()) as counted, sampling_model(policy, torch.float32, ranks, ranks.world) as model:
        # On a busy machine Gloo's threads let go of what they have exchanged only some time after it is over.
        weights, deadline = sum(parameter.nbytes for parameter in model.parameters()), time.monotonic() + 10
        while counted.live > weights and time.monotonic() < deadline:
            time.sleep(0.01)
        part, most = counted.live, counted.peak
        engine = Engine(model, max_tokens=64, requests=4, pack=False)
        cache = engine.cache.keys.nbytes + engine.cache.values.nbytes
        del engine
    return dict(part=part, cache=cache, most=most, left=counted.live)


def run_rl(rank: int, world: int, folder: Path, runs: dict[str, list[str]]) -> None:
    """train_rl.py with each list of arguments, into FOLDER/NAME."""
    for name, arguments in runs.items():
        joined(rank, world, folder / f"store-{name}")
        train_rl.main([*arguments, "--out", str(folder / name)])
