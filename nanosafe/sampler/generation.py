"""Sampling: prompts in, completions with log-probs out.

`generate` is what callers see. It makes a `Sequence` (scheduler.py) of each requested completion and runs an `Engine`
(engine.py) until all are finished. Noise is hashed from (seed, step, token id): what a request yields does not depend
on its neighbours, their order or the rank, up to the rounding of a matrix product's rows. A request's seed is derived
from its prompt too, or one seed for many prompts would make all of them draw with the same noise.

    python -m nanosafe.sampler --model qwen3-0.6b        # talk to a checkpoint
"""

import operator
import secrets
from collections.abc import Callable
from collections.abc import Sequence as Many

import torch

from nanosafe.io.progress import progress_bar
from nanosafe.model.decoder import Decoder
from nanosafe.parallel import Ranks
from nanosafe.randomness import derive_seed
from nanosafe.sampler.engine import Engine
from nanosafe.sampler.params import Completion, SamplingParams
from nanosafe.sampler.scheduler import Sequence
from nanosafe.sampler.spread import TensorParallelDecoder, sharing
from nanosafe.text.tokenizer import Tokenizer

PACKING_PAYS = 32  # new tokens; to pack a CPU's weights for fewer takes longer than it saves
Prompts = Many[Many[int] | str]  # token ids, or texts


def generate(
    model: Decoder, prompts: Prompts, params: SamplingParams | Many[SamplingParams], *,
    tokenizer: Tokenizer | None = None, progress: bool = False,
    finished: Callable[[int, Completion], None] | None = None, **engine_options,
) -> list[list[Completion]]:  # fmt: skip
    """Sample `params.n` completions of every prompt; the result is a list of n Completions per prompt.

    A prompt is a list of token ids or, given a tokenizer, a text, which is encoded as it stands (for a chat see
    Tokenizer.encode_chat). With a tokenizer completions have their text too.
    Stops at the checkpoint's EOS ids (ModelConfig.eos_ids; not if ignore_eos) and at stop_token_ids.
    finished(i, completion) is called as soon as a completion of prompt number i ends, for whoever must not lose it.
    The other options are those of EngineOptions. Raises ValueError where a prompt is empty, outside the vocabulary or
    too long, where `params` are not one per prompt, or where the longest request does not fit into the KV cache alone;
    and where a token's log-prob is not finite, naming the model.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list: pass a single prompt as [prompt]")
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(each)} SamplingParams")
    places: dict[Sequence, tuple[int, int]] = {}  # number of the prompt, and of its sample
    for index, (prompt, one) in enumerate(zip(prompts, each, strict=True)):
        ids = token_ids(prompt, index, tokenizer)
        for sample in range(one.n):
            places[sequence(model, ids, one, index, sample)] = index, sample
    completions: list[list[Completion | None]] = [[None] * one.n for one in each]
    if not places:
        return completions
    pack = max(one.max_new_tokens for one in each) >= PACKING_PAYS
    longest = max(request.longest for request in places)
    filters = any(one.filters for one in each)
    engine = Engine(model, max_tokens=longest, requests=len(places), pack=pack, filters=filters, **engine_options)
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
                if tokenizer is not None:
                    completion.text = tokenizer.decode(request.token_ids, skip_special_tokens=True)
                completions[index][sample] = completion
                bar.update()
                if finished:
                    finished(index, completion)
    del engine
    if model.head_weight.is_cuda:
        # What training makes next would lie in the memory of the KV cache, and keep all of it from being given back.
        torch.cuda.empty_cache()
    return completions


def token_ids(prompt: Many[int] | str, index: int, tokenizer: Tokenizer | None) -> list[int]:
    """Prompt number `index` as token ids; raises ValueError for what is neither these nor a text with a tokenizer."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"prompt {index} is a text: give generate a tokenizer, or token ids")
        return tokenizer.encode(prompt)
    try:
        return [operator.index(token) for token in prompt]
    except TypeError:
        raise ValueError(f"prompt {index} must be a text or a list of token ids, not {prompt!r:.60}") from None


def generate_over_ranks(
    model: Decoder, prompts: Prompts, params: Many[SamplingParams], ranks: Ranks, **options
) -> list[list[Completion]]:
    """`generate` with the prompts spread over the ranks; every rank calls it with all of them and gets all completions.

    Each rank (of a spread model each group) takes a run of neighbours, so that equal prompts meet in one engine, of
    about the same number of tokens: those of the prompts, and as many new ones as may come. They meet only at the end.
    """

    def work(requests: Many[tuple[Many[int], SamplingParams]]) -> list[list[Completion]]:
        prompts = [prompt for prompt, _ in requests]
        return generate(model, prompts, [one for _, one in requests], **options)

    def cost(request: tuple[Many[int], SamplingParams]) -> int:
        prompt, one = request
        return one.n * (len(prompt) + one.max_new_tokens)

    return sharing(model, ranks).split_work(list(zip(prompts, params, strict=True)), work, cost=cost)


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
    if params.seed is None and isinstance(model, TensorParallelDecoder):
        raise ValueError(f"prompt {index} has no seed: without one, the ranks of a spread model draw differently")
    eos_ids = () if params.ignore_eos else config.eos_ids
    seed = secrets.randbits(63) if params.seed is None else derive_seed(params.seed, sample, *prompt)
    return Sequence(
        prompt, params.max_new_tokens, frozenset(eos_ids) | frozenset(params.stop_token_ids), seed,
        params.temperature, params.top_k, params.top_p, params.min_p,
    )  # fmt: skip
