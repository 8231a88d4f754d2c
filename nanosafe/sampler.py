"""Sampling with a KV cache: prompts in, completions with log-probs out.

Requests wait in a queue; a free cache slot takes the next one, whole prompts are prefilled packed, then every active
slot decodes one token a step. A finished sequence leaves at once and the last active slot moves into its place, so the
active ones are always the first rows of the cache. Noise is hashed from (seed, step, token id): what a request yields
does not depend on its neighbours, their order or the rank, up to the rounding of a matrix product's rows. A request's
seed is derived from its prompt too, or one seed for many prompts would make all of them draw with the same noise.
Simplified: slots are reserved for the longest request of the call; nothing is paged or shared.
"""

import math
import operator
import os
import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from nanosafe.memory import Decode, KVCache, Prefill
from nanosafe.model import Decoder
from nanosafe.randomness import derive_seed, gumbel_noise


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


@dataclass
class Request:
    prompt: list[int]
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def finish_reason(self) -> str | None:
        if self.token_ids and self.token_ids[-1] in self.stop_ids:
            return "stop"
        return "length" if len(self.token_ids) >= self.params.max_new_tokens else None


@torch.no_grad()
def generate(model: Decoder, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams], *,
             max_batch: int = 64, cache_bytes: int | None = None, prefill_tokens: int = 8192,
             progress: bool = False) -> list[list[Completion]]:
    """Sample `params.n` completions of every prompt (token ids); the result is a list of n Completions per prompt.

    Stops at the checkpoint's EOS ids (config.json and generation_config.json; not if ignore_eos) and at stop_token_ids.
    At most `max_batch` sequences decode together, fewer if their cache would pass `cache_bytes` (default: half of the
    free memory), but at least one; a prefill packs whole prompts up to `prefill_tokens`. Raises
    ValueError where a prompt is empty, outside the vocabulary or too long, or where `params` are not one per prompt.
    """
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(each)} SamplingParams")
    requests = [_request(model, [operator.index(token) for token in prompt], one, index, sample)
                for index, (prompt, one) in enumerate(zip(prompts, each, strict=True)) for sample in range(one.n)]
    device, dtype = model.head_weight.device, model.head_weight.dtype
    capacity = max((len(r.prompt) + r.params.max_new_tokens for r in requests), default=0)
    cache_bytes = free_memory(device) // 2 if cache_bytes is None else cache_bytes
    fitting = cache_bytes // max(KVCache.bytes_per_slot(model.config, capacity, dtype), 1)
    cache = KVCache(model.config, max(1, min(max_batch, len(requests), fitting)), capacity, device, dtype)

    waiting, active = deque(requests), []
    bar = tqdm(total=len(requests), desc="sampling", unit="seq", disable=not progress, delay=2, leave=False)
    while waiting or active:
        batch = []  # prompts that enter together
        while waiting and len(active) + len(batch) < cache.keys.shape[1]:
            if batch and sum(len(r.prompt) for r in batch) + len(waiting[0].prompt) > prefill_tokens:
                break
            batch.append(waiting.popleft())
        if batch:
            _append_draws(model, _prefill(model, cache, batch, len(active)), batch)
            active += batch
        else:
            _append_draws(model, _decode(model, cache, active), active)
        bar.update(_retire(cache, active))
    bar.close()
    completions = iter(Completion(r.token_ids, r.logprobs, r.finish_reason) for r in requests)
    return [[next(completions) for _ in range(one.n)] for one in each]


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated now; on CUDA also what torch's allocator holds unused: after training, most."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # zeroed pages count only once they are written


def _request(model: Decoder, prompt: list[int], params: SamplingParams, index: int, sample: int) -> Request:
    if not prompt:
        raise ValueError(f"prompt {index} is empty: a completion needs at least one token to start from")
    if not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
        raise ValueError(f"prompt {index} has a token id outside the vocabulary of {model.config.vocab_size}")
    if len(prompt) + params.max_new_tokens > (limit := model.config.max_position_embeddings):
        raise ValueError(f"prompt {index} has {len(prompt)} tokens; with max_new_tokens={params.max_new_tokens} it "
                         f"passes the model's max_position_embeddings={limit}")
    seed = secrets.randbits(63) if params.seed is None else derive_seed(params.seed, sample, *prompt)
    eos = () if params.ignore_eos else model.config.eos_ids
    return Request(prompt, params, seed, frozenset(eos) | frozenset(params.stop_token_ids))


def _prefill(model: Decoder, cache: KVCache, batch: list[Request], first_slot: int) -> Tensor:
    """Run whole prompts into slots first_slot, ...; -> hidden state of each prompt's last token [B, D]."""
    lengths = [len(r.prompt) for r in batch]
    memory = Prefill(cache, list(range(first_slot, first_slot + len(batch))), lengths)
    tokens = torch.tensor([token for r in batch for token in r.prompt], device=cache.keys.device)
    last = torch.tensor(lengths).cumsum(0).to(tokens.device) - 1
    return model.hidden(tokens, memory.positions, memory)[last]


def _decode(model: Decoder, cache: KVCache, active: list[Request]) -> Tensor:
    """One step of every active sequence -> hidden states [B, D]."""
    tokens = torch.tensor([r.token_ids[-1] for r in active], device=cache.keys.device)
    positions = torch.tensor([len(r.prompt) + len(r.token_ids) - 1 for r in active], device=cache.keys.device)
    return model.hidden(tokens, positions, Decode(cache, positions))


def _append_draws(model: Decoder, hidden: Tensor, rows: list[Request]) -> None:
    params, seeds, steps = zip(*((r.params, r.seed, len(r.token_ids)) for r in rows), strict=True)
    tokens, logprobs = draw(model.logits(hidden), params, seeds, steps)
    for request, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
        request.token_ids.append(token)
        request.logprobs.append(logprob)


def _retire(cache: KVCache, active: list[Request]) -> int:
    """Drop finished sequences; the last active slot fills each hole. Returns how many finished."""
    before = len(active)
    for slot in range(before - 1, -1, -1):  # from the back: the slot that moves is never itself finished
        if active[slot].finish_reason:
            last = active.pop()
            if slot < len(active):
                cache.move(len(active), slot, len(last.prompt) + len(last.token_ids))
                active[slot] = last
    return before - len(active)


def draw(logits: Tensor, params: Sequence[SamplingParams], seeds: Sequence[int],
         steps: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Draw one token per row: float32 logits [B, V] -> token ids [B], log-probs [B] (float32, before the filters)."""

    def column(values, dtype=torch.float32):
        return torch.tensor(values, dtype=dtype, device=logits.device)

    temperature = column([p.temperature for p in params])[:, None]
    scores = logits / torch.where(temperature > 0, temperature, 1.0)
    perturbed = scores
    if any(p.temperature for p in params):
        if any(p.top_k or p.top_p < 1 or p.min_p for p in params):
            top_k = column([p.top_k or logits.shape[1] for p in params], torch.int64)
            top_p, min_p = column([p.top_p for p in params], torch.float64), column([p.min_p for p in params])
            perturbed = filter_scores(scores, top_k, top_p, min_p)
        noise = gumbel_noise(column(seeds, torch.int64), column(steps, torch.int64), logits.shape[1])
        perturbed = torch.where(temperature > 0, perturbed + noise, scores)
    tokens = perturbed.argmax(dim=-1)
    return tokens, scores.gather(1, tokens[:, None])[:, 0] - scores.logsumexp(dim=-1)


def filter_scores(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Set to -inf what top-k, then top-p (the smallest set reaching p), then min-p (relative to the largest) exclude.

    scores [B, V]; top_k [B] int64 (V: off), top_p [B] float64 (1: off), min_p [B] (0: off) -> [B, V]. Top-k keeps
    every score equal to the k-th best; top-p counts the probability left after top-k. The best score always stays.
    """
    # Ascending, so that the sum of the small tail stays exact; among equals the lower id counts as better.
    ordered, index = (x.flip(-1) for x in scores.sort(dim=-1, descending=True, stable=True))
    kth = ordered.gather(1, (scores.shape[1] - top_k).clamp(min=0)[:, None])
    probs = ordered.masked_fill(ordered < kth, -torch.inf).softmax(dim=-1)
    excluded = probs.cumsum(dim=-1) <= (1 - top_p).float()[:, None]
    excluded |= probs < min_p[:, None] * probs[:, -1:]
    excluded[:, -1] = False
    return scores.masked_fill(torch.empty_like(excluded).scatter_(1, index, excluded), -torch.inf)
