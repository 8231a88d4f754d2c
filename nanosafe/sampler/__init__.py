"""Sampling: prompts in, completions with log-probs out.

`generate` is what callers see. It makes a `Sequence` (scheduler.py) of each requested completion and runs an `Engine`
(engine.py) until all are finished. Noise is hashed from (seed, step, token id): what a request yields does not depend
on its neighbours, their order or the rank, up to the rounding of a matrix product's rows. A request's seed is derived
from its prompt too, or one seed for many prompts would make all of them draw with the same noise.

    python -m nanosafe.sampler --model qwen3-0.6b        # talk to a checkpoint
"""

import math
import operator
import secrets
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch

from nanosafe.io.progress import progress_bar
from nanosafe.model.decoder import Decoder
from nanosafe.parallel import Ranks
from nanosafe.randomness import derive_seed
from nanosafe.sampler.engine import Engine
from nanosafe.sampler.scheduler import Sequence

PACKING_PAYS = 32  # new tokens; to pack a CPU's weights for fewer takes longer than it saves
Prompts = Many[Many[int]]  # token ids


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
        # logits / temperature must not overflow float32.
        temperature_valid = self.temperature == 0 or 1e-6 <= self.temperature < math.inf
        self._check("temperature", temperature_valid, "0 or at least 1e-6")
        self._check("top_p", 0 < self.top_p <= 1, "in (0, 1]")
        top_k_valid = isinstance(self.top_k, int) and self.top_k >= 0
        self._check("top_k", top_k_valid, "an integer of at least 0")
        self._check("min_p", 0 <= self.min_p <= 1, "in [0, 1]")
        for name in ("max_new_tokens", "n"):
            value = getattr(self, name)
            self._check(name, isinstance(value, int) and value > 0, "a positive integer")
        self._check("seed", isinstance(self.seed, int | None), "an integer or None")
        all_integers = all(isinstance(token, int) for token in self.stop_token_ids)
        self._check("stop_token_ids", all_integers, "integers")

    def _check(self, name: str, valid: bool, meaning: str) -> None:
        if not valid:
            value = getattr(self, name)
            raise ValueError(f"SamplingParams.{name} must be {meaning}, got {value!r}")


@dataclass
class Completion:
    """token_ids include the stop token; logprobs[i] is that of token i at the sampling temperature, before filters
    (greedy: at temperature 1); finish_reason is "stop" or "length"."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


def generate(
    model: Decoder, prompts: Prompts, params: SamplingParams | Many[SamplingParams], *,
    progress: bool = False, finished: Callable[[int, Completion], None] | None = None, **engine_options,
) -> list[list[Completion]]:  # fmt: skip
    """Sample `params.n` completions of every prompt (token ids); the result is a list of n Completions per prompt.

    Stops at the checkpoint's EOS ids (ModelConfig.eos_ids; not if ignore_eos) and at stop_token_ids.
    finished(i, completion) is called as soon as a completion of prompt number i ends, for whoever must not lose it.
    The other options are those of EngineOptions. Raises ValueError where a prompt is empty, outside the vocabulary or
    too long, where `params` are not one per prompt, or where the longest request does not fit into the KV cache alone;
    and where a token's log-prob is not finite, naming the model.
    """
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(each)} SamplingParams")
    places: dict[Sequence, tuple[int, int]] = {}  # number of the prompt, and of its sample
    for index, (prompt, one) in enumerate(zip(prompts, each, strict=True)):
        prompt = [operator.index(token) for token in prompt]
        for sample in range(one.n):
            places[sequence(model, prompt, one, index, sample)] = index, sample
    completions: list[list[Completion | None]] = [[None] * one.n for one in each]
    if not places:
        return completions
    pack = max(one.max_new_tokens for one in each) >= PACKING_PAYS
    longest = max(request.longest for request in places)
    engine = Engine(model, max_tokens=longest, requests=len(places), pack=pack, **engine_options)
    for request in places:
        engine.add(request)
    with progress_bar(len(places), "sampling", "seq", shown=progress) as bar:
        while engine.busy:
            for request in engine.step():
                reason = request.finish_reason
                if not reason:
                    continue
                index, sample = places[request]
                completion = Completion(request.token_ids, request.logprobs, reason)
                completions[index][sample] = completion
                bar.update()
                if finished:
                    finished(index, completion)
    del engine
    if model.head_weight.is_cuda:
        # What training makes next would lie in the memory of the KV cache, and keep all of it from being given back.
        torch.cuda.empty_cache()
    return completions


def generate_over_ranks(
    model: Decoder, prompts: Prompts, params: Many[SamplingParams], ranks: Ranks, **options
) -> list[list[Completion]]:
    """`generate` with the prompts spread over the ranks; every rank calls it with all of them and gets all completions.

    Each rank takes a run of neighbours, so that equal prompts meet in one engine, of about the same number of tokens:
    those of the prompts, and as many new ones as may come. The ranks meet only at the end.
    """

    def work(requests: Many[tuple[Many[int], SamplingParams]]) -> list[list[Completion]]:
        prompts = [prompt for prompt, _ in requests]
        return generate(model, prompts, [one for _, one in requests], **options)

    def cost(request: tuple[Many[int], SamplingParams]) -> int:
        prompt, one = request
        return one.n * (len(prompt) + one.max_new_tokens)

    return ranks.split_work(list(zip(prompts, params, strict=True)), work, cost=cost)


def sequence(model: Decoder, prompt: list[int], params: SamplingParams, index: int = 0, sample: int = 0) -> Sequence:
    """Sample number `sample` of prompt number `index` as the engine wants it; raises ValueError for a bad prompt."""
    config = model.config
    if not prompt:
        raise ValueError(f"prompt {index} is empty: a completion needs at least one token")
    if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
        raise ValueError(f"prompt {index} has a token id outside the vocabulary of {config.vocab_size}")
    if len(prompt) + params.max_new_tokens > config.max_position_embeddings:
        raise ValueError(
            f"prompt {index} has {len(prompt)} tokens; with max_new_tokens={params.max_new_tokens} "
            f"it passes the model's max_position_embeddings={config.max_position_embeddings}"
        )
    eos_ids = () if params.ignore_eos else config.eos_ids
    seed = secrets.randbits(63) if params.seed is None else derive_seed(params.seed, sample, *prompt)
    return Sequence(
        prompt, params.max_new_tokens, frozenset(eos_ids) | frozenset(params.stop_token_ids), seed,
        params.temperature, params.top_k, params.top_p, params.min_p,
    )  # fmt: skip
