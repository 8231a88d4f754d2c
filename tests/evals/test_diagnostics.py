"""Entropies and memorization scores against plain loops over transformers' logits, sums worked out by hand."""

import math
from dataclasses import asdict

import pytest
import torch
from tiny_models import decoder_like, random_reference, tiny_raw

from nanosafe.evals.diagnostics import (
    MIN_K_PERCENT,
    continuation_overlap,
    memorization,
    reflection_summary,
    response_entropies,
    same_order,
    standardized_logprobs,
)
from nanosafe.evals.statistics import over_items
from nanosafe.model.config import ModelConfig
from nanosafe.text.data import Document

FAMILIES = ["qwen3", "granite"]  # untied head; tied, with scaled logits


@pytest.fixture(scope="module", params=FAMILIES)
def models(request):
    raw = tiny_raw(request.param)
    reference = random_reference(raw)
    return reference, decoder_like(reference, raw)


def random_documents(lengths: list[tuple[int, int]], seed: int = 0) -> list[Document]:
    generator = torch.Generator().manual_seed(seed)
    return [Document(*(torch.randint(3, 97, (n,), generator=generator).tolist() for n in pair)) for pair in lengths]


DOCUMENTS = random_documents([(3, 11), (1, 1), (7, 24), (2, 4), (5, 9)])


@torch.no_grad()
def distributions(reference, document: Document, temperature: float = 1.0) -> torch.Tensor:
    """Log-probs [T, V], float64, of what transformers predicts at each response token; one document at a time."""
    logits = reference(torch.tensor([document.prompt_ids + document.response_ids])).logits[0].double()
    return torch.log_softmax(logits / temperature, dim=-1)[len(document.prompt_ids) - 1 : -1]


# Entropies


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("tokens_per_microbatch", [1, 30, 1000])
def test_response_entropies_equal_transformers(models, temperature, tokens_per_microbatch):
    reference, model = models
    scores = response_entropies(model, DOCUMENTS, tokens_per_microbatch, temperature)
    assert len(scores) == len(DOCUMENTS)
    for (logprobs, entropies), document in zip(scores, DOCUMENTS, strict=True):
        logp = distributions(reference, document, temperature)
        assert not logprobs.requires_grad and logprobs.dtype == entropies.dtype == torch.float32
        picked = torch.stack([logp[t, token] for t, token in enumerate(document.response_ids)])
        torch.testing.assert_close(logprobs.double(), picked, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(entropies.double(), -(logp.exp() * logp).sum(-1), rtol=1e-4, atol=1e-4)


def test_a_summary_equals_sums_by_hand():
    responses = [[7, 1, 8, 1], [1, 2], [8, 8, 3, 3, 3, 3], [5]]
    entropies = [[1.0, 0.5, 2.0, 0.5], [0.25, 0.75], torch.tensor([0.0, 0.5, 1.0, 1.0, 1.0, 1.0]), [4.0]]
    summary = reflection_summary(responses, entropies, [8, 7, 99])
    assert asdict(summary) == {
        "entropy_per_token": 3.5 / 4,  # 1, 2, 0, 0.5
        "entropy_per_response_or_zero": (1.5 + 0 + 0.25 + 0) / 4,
        "all_token_entropy": (4 + 1 + 4.5 + 4) / 13,
        "count_per_1000_tokens": pytest.approx(1000 * 4 / 13),
        "means": [1.5, None, 0.25, None], "all_token_means": [1.0, 0.5, 0.75, 4.0],
    }  # fmt: skip
    estimate = over_items([mean for mean in summary.means if mean is not None])
    assert estimate.mean == (1.5 + 0.25) / 2 and estimate.n == 2


def test_a_summary_without_reflection_tokens_has_no_mean():
    summary = reflection_summary([[1, 2]], [[0.5, 0.7]], [8])
    assert summary.entropy_per_token is None and summary.means == [None]
    assert summary.entropy_per_response_or_zero == 0 == summary.count_per_1000_tokens
    assert summary.all_token_entropy == pytest.approx(0.6)
    nothing = reflection_summary([], [], [8])
    assert nothing.all_token_entropy is None and nothing.count_per_1000_tokens is None and nothing.means == []
    empty = reflection_summary([[], [8]], [[], [1.0]], [8])
    assert empty.all_token_means == [None, 1.0] and empty.means == [None, 1.0]


def test_a_summary_refuses_entropies_of_other_tokens():
    with pytest.raises(ValueError, match="response 1 has 3 tokens but 2 entropies"):
        reflection_summary([[1], [1, 2, 3]], [[0.1], [0.1, 0.2]], [1])
    with pytest.raises(ValueError):
        reflection_summary([[1]], [], [1])


# Memorization


def slow_min_k_plus_plus(logp: torch.Tensor, tokens: list[int]) -> float:
    """Zhang et al.'s definition, symbol by symbol in Python floats: the mean of the lowest 20 %."""
    standardized = []
    for row, token in zip(logp.tolist(), tokens, strict=True):
        mu = sum(math.exp(x) * x for x in row)
        sigma = math.sqrt(sum(math.exp(x) * (x - mu) ** 2 for x in row))
        standardized.append((row[token] - mu) / sigma)
    lowest = sorted(standardized)[: max(1, int(0.2 * len(tokens)))]
    return sum(lowest) / len(lowest)


@pytest.mark.parametrize("tokens_per_microbatch", [1, 30, 1000])
def test_memorization_equals_a_plain_loop(models, tokens_per_microbatch, monkeypatch):
    reference, model = models
    assert MIN_K_PERCENT == 20
    original, graphs = model.logits, []
    monkeypatch.setattr(model, "logits", lambda h: graphs.append(h.requires_grad) or original(h))
    scores = memorization(model, DOCUMENTS, tokens_per_microbatch)
    assert graphs and not any(graphs)  # a graph would keep every chunk's logits
    assert list(scores) == ["log_likelihood", "min_k_plus_plus", "continuation_overlap"]
    for i, document in enumerate(DOCUMENTS):
        logp = distributions(reference, document)
        picked = [logp[t, token].item() for t, token in enumerate(document.response_ids)]
        assert scores["log_likelihood"][i] == pytest.approx(sum(picked) / len(picked), abs=1e-4)
        slow = slow_min_k_plus_plus(logp, document.response_ids)
        assert scores["min_k_plus_plus"][i] == pytest.approx(slow, rel=1e-4, abs=1e-4)
    assert scores["continuation_overlap"] == continuation_overlap(model, DOCUMENTS)


@torch.no_grad()
def test_the_logits_of_a_chunk_have_a_bound(models, monkeypatch):
    model, rows = models[1], []
    generator = torch.Generator().manual_seed(2)
    hidden, targets = torch.randn(24, 32, generator=generator), torch.randint(97, (24,), generator=generator)
    whole, original = standardized_logprobs(model, hidden, targets), model.logits
    monkeypatch.setattr(model, "logits", lambda h: rows.append(len(h)) or original(h))
    parts = standardized_logprobs(model, hidden, targets, chunk_bytes=8 * 97 * 5 + 7)
    assert rows == [5, 5, 5, 5, 4]
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # float32 products round with their rows
    assert len(standardized_logprobs(model, hidden, targets, chunk_bytes=1)[0]) == 24  # at least a row


class FixedLogits:
    """A model whose logits are its hidden states."""

    head_weight = torch.zeros(3, 3)

    def logits(self, hidden):
        return hidden


def test_certain_and_uniform_distributions_score_zero_and_nearly_certain_ones_are_exact():
    logits = torch.tensor([[0.0, 0.0, 0.0], [5000.0, 0.0, 0.0], [25.0, 0.0, 0.0], [25.0, 0.0, 0.0]])
    logprobs, standardized = standardized_logprobs(FixedLogits(), logits, torch.tensor([1, 0, 0, 1]))
    assert logprobs[:2].tolist() == pytest.approx([-math.log(3), 0.0])
    assert standardized[:2].tolist() == pytest.approx([0, 0], abs=1e-3)
    # p = 1 - 2e with e = exp(-25): log p = -2e, mu = -2e - 50e, sigma^2 = 2e 25^2, all but for factors of 1 + O(e);
    # in float32 log p would be 0
    e = math.exp(-25)
    assert logprobs[2].item() == pytest.approx(-2 * e, rel=1e-4)
    assert standardized[2].item() == pytest.approx(50 * e / math.sqrt(1250 * e), rel=1e-4)
    assert standardized[3].item() == pytest.approx(-25 / math.sqrt(1250 * e), rel=1e-4)


@torch.no_grad()
def greedy(reference, prompt: list[int], tokens: int, eos: int = 2) -> list[int]:
    written = []
    while len(written) < tokens and eos not in written:
        written.append(reference(torch.tensor([prompt + written])).logits[0, -1].argmax().item())
    return written


def test_overlap_counts_the_equal_positions_of_a_greedy_continuation(models):
    reference, model = models
    documents, expected = [], []
    for prompt_length, length, changed in [(4, 12, 0), (6, 9, 2), (1, 1, 0), (9, 20, 10), (3, 2, 1)]:
        [document] = random_documents([(prompt_length, length)], seed=length)
        start = document.response_ids[: length // 2]
        rest = greedy(reference, document.prompt_ids + start, length - len(start))
        assert len(rest) == length - len(start), "no early EOS with these seeds"
        rest = [3 + (token - 2) % 94 if i < changed else token for i, token in enumerate(rest)]  # another token
        documents.append(Document(document.prompt_ids, start + rest))
        expected.append(1 - changed / len(rest))
    assert continuation_overlap(model, documents) == expected == pytest.approx([1, 0.6, 1, 0, 0])
    assert continuation_overlap(model, documents, max_batch=2) == expected


def test_positions_after_a_stop_do_not_match(models, monkeypatch):
    reference, model = models
    [document] = random_documents([(4, 6)], seed=3)
    rest = greedy(reference, document.prompt_ids + document.response_ids, 6)
    stop = rest[3]
    raw = tiny_raw(reference.config.model_type, eos_token_id=stop)
    monkeypatch.setattr(model, "config", ModelConfig.from_dict(raw))
    documents = [Document(document.prompt_ids, document.response_ids + rest)]  # goes on after the stop
    assert len(rest) == 6 and continuation_overlap(model, documents) == [(rest.index(stop) + 1) / 6]


def test_an_empty_response_is_refused(models):
    with pytest.raises(ValueError, match="document 1"):
        memorization(models[1], [Document([5], [6]), Document([5], [])], 100)


def test_same_order():
    likelihood, overlap = {"a": -2.0, "b": -1.0, "c": -1.5}, {"c": 0.2, "a": 0.1, "b": 0.9}
    assert same_order({"likelihood": likelihood, "overlap": overlap}) and same_order({"likelihood": likelihood})
    assert not same_order({"likelihood": likelihood, "overlap": overlap | {"c": 0.95}})
    assert not same_order({"likelihood": likelihood, "overlap": overlap | {"c": 0.1}})  # a tie is another order
    assert same_order({"x": {"a": 1, "b": 1}, "y": {"a": 3, "b": 3}})
    with pytest.raises(ValueError, match="same models"):
        same_order({"likelihood": likelihood, "overlap": {"a": 0.1, "b": 0.9}})
