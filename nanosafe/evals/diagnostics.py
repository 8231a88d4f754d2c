"""What a model's distributions say about its reasoning and its memory: entropies, reflection, forking, memorization.

The paper's reflection-token list could not be recovered. Ours is the union of the two lists that its authors use
elsewhere, matched by the text of a token with and without a leading space (a bare look-up misses the latter). Its
memorization score is not known either: ours are three, which should order models alike before one is believed.
Values come per response, in the order given, so that statistics.py can put intervals over items on them.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanosafe.model.decoder import Decoder
from nanosafe.sampler import SamplingParams, generate
from nanosafe.text.data import Document
from nanosafe.text.tokenizer import Tokenizer
from nanosafe.train.packing import Packed, microbatches, pack, response_hidden, response_logprobs

REFLECTION_WORDS = frozenset(
    "Wait wait But but Alternatively <think> Okay Hmm Albeit However Yet Still Nevertheless Though Meanwhile "
    "Whereas".split()
)
FORKING_PERCENT = 20  # of all tokens, those of the highest entropy
PROGRESS_BINS = 20
MIN_K_PERCENT = 20  # of a response's tokens that Min-K%++ averages
CHUNK_BYTES = 512 << 20  # of an array of log-probs in float64
MIN_SIGMA = 1e-12  # a distribution that is certain or uniform has 0; its own token then scores 0, not 0 / 0


def reflection_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of the vocabulary whose text, stripped of spaces, is a reflection word."""
    return [i for i, text in enumerate(tokenizer.vocabulary()) if text.strip() in REFLECTION_WORDS]


@dataclass(frozen=True)
class ReflectionSummary:
    """Entropies (nats) where reflection tokens were drawn, over responses; None where there is nothing to average.

    A short refusal lowers entropies by itself, so the mean over all tokens belongs beside those at reflection tokens.
    """

    responses: int
    tokens: int
    entropy_per_token: float | None  # mean over all reflection tokens
    entropy_per_response: float | None  # mean over responses that have reflection tokens of their means
    entropy_per_response_or_zero: float | None  # mean over all responses, those without reflection tokens counting 0
    all_token_entropy: float | None  # mean over all response tokens
    count_per_response: float | None
    count_per_1000_tokens: float | None
    # one entry per response, in order
    lengths: list[int]
    counts: list[int]  # reflection tokens
    means: list[float | None]  # entropy at the response's reflection tokens
    all_token_means: list[float | None]
    # one entry per reflection token, for histograms
    values: list[float]


def reflection_summary(
    responses: Sequence[Sequence[int]], entropies: Sequence[Sequence[float] | Tensor], reflection: Iterable[int]
) -> ReflectionSummary:
    """responses: token ids of each; entropies: for each token, that of the distribution it was drawn from, at
    temperature 1 (the convention of arXiv 2506.01939); reflection: ids from `reflection_ids`.

    Raises ValueError for a response with more or fewer entropies than tokens.
    """
    wanted, values = set(reflection), _numbers(responses, entropies)
    chosen = [[h for token, h in zip(tokens, v, strict=True) if token in wanted]
              for tokens, v in zip(responses, values, strict=True)]  # fmt: skip
    means, at_reflection = [_mean(c) for c in chosen], [h for c in chosen for h in c]
    tokens = sum(map(len, values))
    return ReflectionSummary(
        responses=len(values),
        tokens=tokens,
        entropy_per_token=_mean(at_reflection),
        entropy_per_response=_mean([mean for mean in means if mean is not None]),
        entropy_per_response_or_zero=_mean([0.0 if mean is None else mean for mean in means]),
        all_token_entropy=_mean([h for v in values for h in v]),
        count_per_response=_mean([len(c) for c in chosen]),
        count_per_1000_tokens=1000 * len(at_reflection) / tokens if tokens else None,
        lengths=[len(v) for v in values],
        counts=[len(c) for c in chosen],
        means=means,
        all_token_means=[_mean(v) for v in values],
        values=at_reflection,
    )


@dataclass(frozen=True)
class ForkingSummary:
    """Tokens where the model hesitated: arXiv 2506.01939's forking tokens. Entropies in nats; None: nothing to average.

    Two models are compared at one threshold, the base's, beside each one's own: at its own every model forks alike.
    """

    threshold: float | None  # a token forks if its entropy is above
    tokens: int
    forking: int
    entropy_of_forking: float | None  # means
    entropy_of_rest: float | None
    reflection_share: float | None  # of all tokens
    reflection_share_of_forking: float | None
    top: list[tuple[str, int, float]]  # the most frequent forking tokens: text, count, their mean entropy


def forking_summary(
    responses: Sequence[Sequence[int]], entropies: Sequence[Sequence[float] | Tensor], vocabulary: Sequence[str],
    reflection: Iterable[int], *, threshold: float | None = None, top: int = 20,
) -> ForkingSummary:  # fmt: skip
    """Arguments as of `reflection_summary`; vocabulary: the text of each id, `Tokenizer.vocabulary()`.

    threshold: None takes the 80th percentile of all tokens together, in that at most a fifth of them is above. It is a
    fifth but for ties, such as the zeros of a model that is certain of more than four tokens in five.
    """
    values = [h for v in _numbers(responses, entropies) for h in v]
    ids, wanted = [token for tokens in responses for token in tokens], set(reflection)
    if threshold is None and values:
        threshold = sorted(values, reverse=True)[len(values) * FORKING_PERCENT // 100]
    forks, rest, by_id = [], [], defaultdict(list)
    for token, h in zip(ids, values, strict=True):
        (forks if h > threshold else rest).append(h)
        if h > threshold:
            by_id[token].append(h)
    most = sorted(by_id, key=lambda token: (-len(by_id[token]), token))[:top]
    return ForkingSummary(
        threshold=threshold,
        tokens=len(values),
        forking=len(forks),
        entropy_of_forking=_mean(forks),
        entropy_of_rest=_mean(rest),
        reflection_share=_mean([token in wanted for token in ids]),
        reflection_share_of_forking=_mean([token in wanted for token, at in by_id.items() for _ in at]),
        top=[(vocabulary[token], len(by_id[token]), _mean(by_id[token])) for token in most],
    )


@dataclass(frozen=True)
class EntropyCurve:
    """Mean entropy (nats, over tokens) along the responses, by the token's number and by the share that is written.

    Far out only the long responses are left, so a curve by number may rise without any response's doing so.
    """

    starts: list[int]  # 1, 2, 4, ...: a bin has the tokens of these numbers up to the next one's; the first is 1
    by_number: list[float]
    still_going: list[int]  # responses that reach the bin
    by_progress: list[float | None]  # in each twentieth of a response; None where only shorter ones are


def entropy_curve(entropies: Sequence[Sequence[float] | Tensor]) -> EntropyCurve:
    numbered, progress, lengths = defaultdict(list), defaultdict(list), [len(given) for given in entropies]
    for given, length in zip(entropies, lengths, strict=True):
        for i, h in enumerate(torch.as_tensor(given, dtype=torch.float64).tolist()):
            numbered[(i + 1).bit_length() - 1].append(h)
            progress[i * PROGRESS_BINS // length].append(h)
    starts = [2**power for power in sorted(numbered)]
    return EntropyCurve(
        starts=starts,
        by_number=[_mean(numbered[power]) for power in sorted(numbered)],
        still_going=[sum(length >= start for length in lengths) for start in starts],
        by_progress=[_mean(progress[i]) for i in range(PROGRESS_BINS)],
    )


def _numbers(responses: Sequence[Sequence[int]], entropies: Sequence[Sequence[float] | Tensor]) -> list[list[float]]:
    """The entropies as lists, one for each token."""
    values = [torch.as_tensor(given, dtype=torch.float64).tolist() for given in entropies]
    for i, (tokens, given) in enumerate(zip(responses, values, strict=True)):
        if len(tokens) != len(given):
            raise ValueError(f"response {i} has {len(tokens)} tokens but {len(given)} entropies")
    return values


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


@torch.no_grad()
def response_entropies(
    model: Decoder, documents: Sequence[Document], tokens_per_microbatch: int, temperature: float = 1.0
) -> list[tuple[Tensor, Tensor]]:
    """For each document its response's log-probs [T] and entropies [T], nats, float32, on the CPU."""
    scores = []
    for packed in _packs(model, documents, tokens_per_microbatch):
        logprobs, entropies = (x.cpu().split(packed.lengths) for x in response_logprobs(model, packed, temperature))
        scores += zip(logprobs, entropies, strict=True)
    return scores


@torch.no_grad()
def memorization(
    model: Decoder, documents: Sequence[Document], tokens_per_microbatch: int, **engine_options
) -> dict[str, list[float]]:
    """How well `model` knows responses, one value per document: the higher, the more they look memorized.

    log_likelihood: mean log-prob per response token. min_k_plus_plus: mean of the lowest 20 % (at least one token) of
    the `standardized_logprobs` (arXiv 2404.02936). continuation_overlap: see there. Raises ValueError for an empty
    response.
    """
    scores = {"log_likelihood": [], "min_k_plus_plus": [], "continuation_overlap": []}
    scores["continuation_overlap"] = continuation_overlap(model, documents, **engine_options)
    for packed in _packs(model, documents, tokens_per_microbatch):
        flat = standardized_logprobs(model, response_hidden(model, packed), packed.targets)
        for logprobs, standardized in zip(*(x.split(packed.lengths) for x in flat), strict=True):
            lowest = standardized.sort().values[: max(1, len(standardized) * MIN_K_PERCENT // 100)]
            scores["log_likelihood"].append(logprobs.mean().item())
            scores["min_k_plus_plus"].append(lowest.mean().item())
    return scores


def standardized_logprobs(
    model: Decoder, hidden: Tensor, targets: Tensor, *, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
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
        sigma = p.mul_((logp - mu).square_()).sum(dim=-1, keepdim=True).sqrt_().clamp_(min=MIN_SIGMA)
        own = logp.gather(1, targets[start : start + rows, None])
        parts.append(torch.cat((own, (own - mu) / sigma), dim=1))
    return torch.cat(parts).unbind(dim=1)


def continuation_overlap(model: Decoder, documents: Sequence[Document], **engine_options) -> list[float]:
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
    return [
        sum(a == b for a, b in zip(completion.token_ids, rest, strict=False)) / len(rest)
        for [completion], rest in zip(outputs, rests, strict=True)
    ]


def same_order(scores: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether all metrics rank the models alike, ties included; scores: metric -> model -> value.

    Raises ValueError where a metric lacks a model that another has.
    """
    if len({frozenset(values) for values in scores.values()}) > 1:
        raise ValueError(f"the metrics {', '.join(scores)} are not about the same models")
    ranks = [
        {model: sum(other < value for other in values.values()) for model, value in values.items()}
        for values in scores.values()
    ]
    return all(rank == ranks[0] for rank in ranks)


def _packs(model: Decoder, documents: Sequence[Document], tokens_per_microbatch: int) -> Iterator[Packed]:
    for indices in microbatches(documents, tokens_per_microbatch):
        yield pack([documents[i] for i in indices], model.head_weight.device)
