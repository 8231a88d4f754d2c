"""Sampling: prompts in, completions with log-probs out.

`generate` is what callers see; the work is done by engine.py. Noise is hashed from (seed, step, token id): what a
request yields does not depend on its neighbours, their order or the rank, up to the rounding of a matrix product's
rows. A request's seed is derived from its prompt too, or one seed for many prompts would make all of them draw with the
same noise.

    python -m nanosafe.sampler --model qwen3-0.6b        # talk to a checkpoint
"""

import math
import operator
import secrets
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from tqdm import tqdm

from nanosafe.model.decoder import Decoder
from nanosafe.parallel import Ranks
from nanosafe.randomness import derive_seed
from nanosafe.sampler.engine import Engine
from nanosafe.sampler.scheduler import Sequence

PACKING_PAYS = 32  # new tokens from which packing the weights, on a CPU, takes less time than it saves


@dataclass(frozen=True)
class SamplingParams:
    """How to draw: temperature 0 is greedy; top_k 0, top_p 1, min_p 0 switch a filter off; seed None: a fresh one."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = 256
    n: int = 1  # completions per prompt, each with its own seed derived from `seed` and the prompt
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self):
        for name, good, meaning in (
            # logits / temperature must not overflow float32
            ("temperature", self.temperature == 0 or 1e-6 <= self.temperature < math.inf, "0 or at least 1e-6"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", isinstance(self.top_k, int) and self.top_k >= 0, "an integer of at least 0"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("max_new_tokens", isinstance(self.max_new_tokens, int) and self.max_new_tokens > 0, "a positive integer"),
            ("n", isinstance(self.n, int) and self.n > 0, "a positive integer"),
            ("seed", self.seed is None or isinstance(self.seed, int), "an integer or None"),
            ("stop_token_ids", all(isinstance(token, int) for token in self.stop_token_ids), "integers"),
        ):
            if not good:
                raise ValueError(f"SamplingParams.{name} must be {meaning}, got {getattr(self, name)!r}")


@dataclass
class Completion:
    """token_ids include the stop token; logprobs[i] is that of token i at the sampling temperature, before filters
    (greedy: at temperature 1); finish_reason is "stop" or "length"."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


def generate(model: Decoder, prompts: Many[Many[int]], params: SamplingParams | Many[SamplingParams], *,
             max_batch: int | None = None, cache_bytes: int | None = None, prefill_tokens: int | None = None,
             block_size: int | None = None, banned_token_ids: Many[int] = (), progress: bool = False,
             finished: Callable[[int, Completion], None] | None = None) -> list[list[Completion]]:
    """Sample `params.n` completions of every prompt (token ids); the result is a list of n Completions per prompt.

    Stops at the checkpoint's EOS ids (ModelConfig.eos_ids; not if ignore_eos) and at stop_token_ids.
    finished(i, completion) is called as soon as a completion of prompt number i ends, for whoever must not lose it.
    The other options are those of the engine, which see. Raises ValueError where a prompt is empty, outside the
    vocabulary or too long, where `params` are not one per prompt, or where the longest request does not fit into the KV
    cache alone; and where a token's log-prob is not finite, naming the model.
    """
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(each)} SamplingParams")
    sequences = [sequence(model, [operator.index(token) for token in prompt], one, index, sample)
                 for index, (prompt, one) in enumerate(zip(prompts, each, strict=True)) for sample in range(one.n)]
    if not sequences:
        return [[] for _ in each]
    engine = Engine(model, max_tokens=max(s.longest for s in sequences), max_batch=max_batch, cache_bytes=cache_bytes,
                    prefill_tokens=prefill_tokens, block_size=block_size, requests=len(sequences),
                    banned_token_ids=banned_token_ids,
                    pack=max(one.max_new_tokens for one in each) >= PACKING_PAYS)
    for one in sequences:
        engine.add(one)
    number = {id(one): i for i, one in enumerate(sequences)}
    prompt_of = [i for i, one in enumerate(each) for _ in range(one.n)]
    done: list[Completion | None] = [None] * len(sequences)
    with tqdm(total=len(sequences), desc="sampling", unit="seq", disable=not progress, delay=2, leave=False) as bar:
        while engine.busy:
            for i in [number[id(one)] for one in engine.step() if one.finish_reason]:
                done[i] = Completion(sequences[i].token_ids, sequences[i].logprobs, sequences[i].finish_reason)
                bar.update()
                if finished:
                    finished(prompt_of[i], done[i])
    del engine
    if model.head_weight.is_cuda:
        # What training makes next would lie in the memory of the KV cache, and keep all of it from being given back.
        torch.cuda.empty_cache()
    completions = iter(done)
    return [[next(completions) for _ in range(one.n)] for one in each]


def generate_over_ranks(model: Decoder, prompts: Many[Many[int]], params: Many[SamplingParams], ranks: Ranks,
                        **options) -> list[list[Completion]]:
    """`generate` with the prompts spread over the ranks; every rank calls it with all of them and gets all completions.

    Each rank takes a run of neighbours, so that equal prompts meet in one engine, of about the same number of tokens:
    those of the prompts, and as many new ones as may come. The ranks meet only at the end.
    """

    def sample(part: Many[tuple[Many[int], SamplingParams]]) -> list[list[Completion]]:
        return generate(model, [prompt for prompt, _ in part], [one for _, one in part], **options)

    return ranks.split_work(list(zip(prompts, params, strict=True)), sample,
                        cost=lambda request: request[1].n * (len(request[0]) + request[1].max_new_tokens))


def sequence(model: Decoder, prompt: list[int], params: SamplingParams, index: int = 0, sample: int = 0) -> Sequence:
    """Sample number `sample` of prompt number `index` as the engine wants it; raises ValueError for a bad prompt."""
    if not prompt:
        raise ValueError(f"prompt {index} is empty: a completion needs at least one token to start from")
    if not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
        raise ValueError(f"prompt {index} has a token id outside the vocabulary of {model.config.vocab_size}")
    if len(prompt) + params.max_new_tokens > (limit := model.config.max_position_embeddings):
        raise ValueError(f"prompt {index} has {len(prompt)} tokens; with max_new_tokens={params.max_new_tokens} it "
                         f"passes the model's max_position_embeddings={limit}")
    eos = () if params.ignore_eos else model.config.eos_ids
    return Sequence(
        prompt, params.max_new_tokens, stop_ids=frozenset(eos) | frozenset(params.stop_token_ids),
        seed=secrets.randbits(63) if params.seed is None else derive_seed(params.seed, sample, *prompt),
        temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p,
    )

