"""What one process and ranks that hold a model together sample; test_spread.py spawns these functions."""

from pathlib import Path

import torch
from parallel_cases import joined
from test_plan import LiveBytes

import train_rl
from nanosafe.model.attention import KVCache
from nanosafe.names import load_model
from nanosafe.parallel import Ranks
from nanosafe.sampler import SamplingParams, generate_over_ranks
from nanosafe.sampler.engine import Engine
from nanosafe.sampler.packed import forget_packed
from nanosafe.sampler.spread import sampling_model

# Eight heads and four of keys; of 600 tokens four ranks have 256, 256, 88 and none.
SHAPE = dict(num_attention_heads=8, num_key_value_heads=4, head_dim=8, intermediate_size=48, vocab_size=600)
CASES = {  # family, and what differs
    "qwen3": ("qwen3", {}),
    "qwen3 tied": ("qwen3", dict(tie_word_embeddings=True)),
    "qwen2": ("qwen2", {}),
    "llama": ("llama", {}),
    "llama with biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
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


def sample_cases(rank: int, world: int, folder: Path, shards: list[int]) -> None:
    """Write {(case, T): completions and sizes} of this rank to FOLDER/WORLD-RANK.pt."""
    ranks, results = joined(rank, world, folder / f"store-{world}"), {}
    for case in CASES:
        policy = load_model(folder / case, dtype=torch.float32, ranks=ranks)
        for T in shards:
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
    torch.save(results, folder / f"{world}-{rank}.pt")
    ranks.close()


def run_rl(rank: int, world: int, folder: Path, runs: dict[str, list[str]]) -> None:
    """train_rl.py with each list of arguments, into FOLDER/NAME."""
    for name, arguments in runs.items():
        joined(rank, world, folder / f"store-{name}")
        train_rl.main([*arguments, "--out", str(folder / name)])


def measure(rank: int, world: int, folder: Path, shards: int) -> None:
    """Write the bytes of a rank's part, of its cache, the most at a time and what is left to FOLDER/bytes-RANK.pt.

    The most is counted before the cache is made: it is what making the part takes.
    """
    ranks = joined(rank, world, folder / "store-bytes")
    policy = load_model(folder / "large", dtype=torch.float32, ranks=ranks)
    with LiveBytes(policy.parameters()) as counted, sampling_model(policy, torch.float32, ranks, shards) as model:
        part, peak = counted.live, counted.peak
        engine = Engine(model, max_tokens=64, requests=4, pack=False)
        cache = engine.cache.keys.nbytes + engine.cache.values.nbytes
        del engine
    torch.save(dict(part=part, cache=cache, peak=peak, left=counted.live), folder / f"bytes-{rank}.pt")
    ranks.close()
