"""What a model's distributions say about its reasoning and its memory: entropies, reflection, memorization.

The paper's reflection-token list could not be recovered. Ours is the union of the two lists that its authors use
elsewhere, matched by the text of a token with and without a leading space (a bare look-up misses the latter). Its
memorization score is not known either: ours are three, which should order models alike before one is believed.
Values come per response, in the order given, so that statistics.py can put intervals over items on them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanosafe.model.decoder import Decoder
from nanosafe.sampler.generation import generate
from nanosafe.sampler.params import SamplingParams
from nanosafe.text.data import Document
from nanosafe.text.tokenizer import Tokenizer
from nanosafe.train.packing import Packed, microbatches, pack, response_hidden, response_logprobs

REFLECTION_WORDS = frozenset(
    "Wait wait But but Alternatively <think> Okay Hmm Albeit However Yet Still Nevertheless Though "
    "Meanwhile Whereas".split()
)
MIN_K_PERCENT = 20  # of a response's tokens that Min-K%++ averages
CHUNK_BYTES = 512 << 20  # of an array of log-probs in float64
# A distribution that is certain or uniform has 0; its own token then scores 0, not 0 / 0.
MIN_SIGMA = 1e-12


def reflection_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of the vocabulary whose text, stripped of spaces, is a reflection word."""
    return [i for i, text in enumerate(tokenizer.vocabulary()) if text.strip() in REFLECTION_WORDS]


@dataclass(frozen=True)
class ReflectionSummary:
    """Entropies (nats) where reflection tokens were drawn; None where there is nothing to average.

    A short refusal lowers entropies by itself, so the mean over all tokens belongs beside those at reflection tokens.
    """

    entropy_per_token: float | None  # mean over all reflection tokens
    # Mean over all responses, those without reflection tokens counting 0.
    entropy_per_response_or_zero: float | None
    all_token_entropy: float | None  # mean over all response tokens
    count_per_1000_tokens: float | None
    # One entry per response, in order: the mean entropy at its reflection tokens, and at all of its tokens.
    means: list[float | None]
    all_token_means: list[float | None]


def reflection_summary(responses: Sequence[Sequence[int]],
                       entropies: Sequence[Sequence[float] | Tensor],
                       reflection: Iterable[int]) -> ReflectionSummary:
    """responses: token ids of each; entropies: for each token, that of the distribution it was drawn from, at
    temperature 1 (the convention of arXiv 2506.01939); reflection: ids from `reflection_ids`.

    Raises ValueError for a response with more or fewer entropies than tokens.
    """
    wanted, means, all_token_means = set(reflection), [], []
    at_reflection, at_all = [], []  # of all responses together
    for i, (tokens, given) in enumerate(zip(responses, entropies, strict=True)):
        values = torch.as_tensor(given, dtype=torch.float64).tolist()
        if len(tokens) != len(values):
            raise ValueError(f"response {i} has {len(tokens)} tokens but {len(values)} entropies")
        chosen = []
        for token, value in zip(tokens, values, strict=True):
            if token in wanted:
                chosen.append(value)
        means.append(_mean(chosen))
        all_token_means.append(_mean(values))
        at_reflection += chosen
        at_all += values
    return ReflectionSummary(
        entropy_per_token=_mean(at_reflection),
        entropy_per_response_or_zero=_mean([mean or 0.0 for mean in means]),
        all_token_entropy=_mean(at_all),
        count_per_1000_tokens=1000 * len(at_reflection) / len(at_all) if at_all else None,
        means=means,
        all_token_means=all_token_means,
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


@torch.no_grad()
def response_entropies(model: Decoder, documents: Sequence[Document], tokens_per_microbatch: int,
                       temperature: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    """For each document its response's log-probs [T] and entropies [T], nats, float32, on the CPU."""
    scores = []
    for packed in _packs(model, documents, tokens_per_microbatch):
        logprobs, entropies = response_logprobs(model, packed, temperature)
        scores += zip(logprobs.cpu().split(packed.lengths), entropies.cpu().split(packed.lengths),
                      strict=True)
    return scores


@torch.no_grad()
def memorization(model: Decoder, documents: Sequence[Document], tokens_per_microbatch: int,
                 **engine_options) -> dict[str, list[float]]:
    """How well `model` knows responses, one value per document: the higher, the more they look memorized.

    log_likelihood: mean log-prob per response token. min_k_plus_plus: mean of the lowest 20 % (at least one token) of
    the `standardized_logprobs` (arXiv 2404.02936). continuation_overlap: see there. Raises ValueError for an empty
    response.
    """
    scores = {"log_likelihood": [], "min_k_plus_plus": [],
              "continuation_overlap": continuation_overlap(model, documents, **engine_options)}
    for packed in _packs(model, documents, tokens_per_microbatch):
        hidden = response_hidden(model, packed)
        logprobs, standardized = standardized_logprobs(model, hidden, packed.targets)
        for of_response in logprobs.split(packed.lengths):
            scores["log_likelihood"].append(of_response.mean().item())
        for of_response in standardized.split(packed.lengths):
            count = max(1, len(of_response) * MIN_K_PERCENT // 100)
            scores["min_k_plus_plus"].append(of_response.sort().values[:count].mean().item())
    return scores


def standardized_logprobs(model: Decoder, hidden: Tensor, targets: Tensor, *,
                          chunk_bytes: int = CHUNK_BYTES) -> tuple[Tensor, Tensor]:
    """hidden [R, D], targets [R] -> log p(target) [R] and (log p(target) - mu) / sigma [R], float64.

    mu and sigma: mean and standard deviation of log p(z) over z ~ p (Min-K%++, arXiv 2404.02936). float64, for
    where p is nearly certain sigma is smaller than float32's rounding of log p. Positions are taken in chunks: a few
    arrays [n, V] of at most `chunk_bytes` exist at a time.
    """
    rows, parts = max(1, chunk_bytes // (8 * len(model.head_weight))), []
    for start in range(0, len(hidden), rows):
        logp = model.logits(hidden[start : start + rows]).double().log_softmax(dim=-1)  # [n, V]
        p = logp.exp()
        mu = (p * logp).sum(dim=-1, keepdim=True)  # [n, 1]
        variance = p.mul_((logp - mu).square_()).sum(dim=-1, keepdim=True)
        sigma = variance.sqrt_().clamp_(min=MIN_SIGMA)
        own = logp.gather(1, targets[start : start + rows, None])
        parts.append(torch.cat((own, (own - mu) / sigma), dim=1))
    return torch.cat(parts).unbind(dim=1)


def continuation_overlap(model: Decoder, documents: Sequence[Document],
                         **engine_options) -> list[float]:
    """Greedy continuations of the first half of each response: the share of the true rest's positions they match.

    Position by position: one token more or less makes the rest differ. Positions after an earlier stop do not match.
    Raises ValueError for an empty response.
    """
    prompts, rests = [], []
    for i, document in enumerate(documents):
        if not document.response_ids:
            raise ValueError(f"document {i} has no response token to continue")
        half = len(document.response_ids) // 2
        prompts.append(document.prompt_ids + document.response_ids[:half])
        rests.append(document.response_ids[half:])
    params = [SamplingParams(temperature=0.0, max_new_tokens=len(rest)) for rest in rests]
    outputs = generate(model, prompts, params, **engine_options)
    overlaps = []
    for [completion], rest in zip(outputs, rests, strict=True):
        matches = sum(a == b for a, b in zip(completion.token_ids, rest, strict=False))
        overlaps.append(matches / len(rest))
    return overlaps


def same_order(scores: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether all metrics rank the models alike, ties included; scores: metric -> model -> value.

    Raises ValueError where a metric lacks a model that another has.
    """
    ranks = []
    for values in scores.values():
        # A model's rank is the place of its value among all, ties sharing the first.
        ascending = sorted(values.values())
        ranks.append({model: ascending.index(value) for model, value in values.items()})
        if ranks[-1].keys() != ranks[0].keys():
            raise ValueError(f"the metrics {', '.join(scores)} are not about the same models")
    return all(rank == ranks[0] for rank in ranks)


def _packs(model: Decoder, documents: Sequence[Document],
           tokens_per_microbatch: int) -> Iterator[Packed]:
    for indices in microbatches(documents, tokens_per_microbatch):
        yield pack([documents[i] for i in indices], model.head_weight.device)
