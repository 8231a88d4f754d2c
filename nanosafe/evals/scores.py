"""From a benchmark's records to its scores: of each metric and question the mean over samples."""

from collections.abc import Iterable, Sequence

from nanosafe.evals.benchmark import OF_THOUGHTS, Benchmark
from nanosafe.evals.diagnostics import reflection_summary
from nanosafe.evals.results import MEMORIZATION, POOLED, BenchmarkResult, Score
from nanosafe.evals.statistics import pass_at_k
from nanosafe.text.thoughts import END_THINK, THINK, split_thought

Samples = dict[tuple[str, str], list[float]]  # (metric, question id) -> a value for each sample


def summarize(benchmark: Benchmark, records: Sequence[dict],
              reflection: Sequence[int] = ()) -> BenchmarkResult:
    """What the benchmark's records come to, but for its protocol. reflection: ids of `reflection_ids`.

    What was judged nowhere has no score, nor has a thought where no response has one. Diagnostics leave out the
    questions that stand among the training prompts. `token_entropy` and `reflection_entropy` are means over the tokens
    of a response; one without reflection tokens has none of the second.
    """
    questions = {question.id: question for question in benchmark.questions}
    unseen = [record for record in records if not questions[record["id"]].seen]
    samples = _graded(benchmark, records) | _form(unseen)
    ids, tokens, entropies = [], [], []  # of the first samples
    for record in unseen:
        if "entropies" in record:
            ids.append(record["id"])
            tokens.append(record["token_ids"])
            entropies.append(record["entropies"])
    summary = reflection_summary(tokens, entropies, reflection)
    for metric, means in (("token_entropy", summary.all_token_means),
                          ("reflection_entropy", summary.means)):
        for question_id, mean in zip(ids, means, strict=True):
            if mean is not None:
                samples[metric, question_id] = [mean]
    scores: dict[str, list[Score]] = {}
    for (metric, question_id), sampled in samples.items():
        question = questions[question_id]
        value = sum(sampled) / len(sampled)
        score = Score(question_id, question.category, question.seen, value)
        scores.setdefault(metric, []).append(score)
    pooled = {}
    for name in POOLED:
        if getattr(summary, name) is not None:
            pooled[name] = getattr(summary, name)
    return BenchmarkResult(
        benchmark.about, benchmark.headline, benchmark.source, benchmark.judge,
        shown=list(benchmark.shown), differences=benchmark.differences,
        variation=benchmark.variation, responses=len(unseen),
        bounds=_bounds(benchmark.headline, unseen), pooled=pooled, scores=scores)


def _graded(benchmark: Benchmark, records: Sequence[dict]) -> Samples:
    """The grader's values, and pass@k of reasoning."""
    graded: Samples = {}
    # A model that never thinks has no harmless thoughts.
    thinks = any(split_thought(record["response"])[0] for record in records)
    for record in records:
        for metric, value in record["values"].items():
            if thinks or metric.partition(" (")[0] not in OF_THOUGHTS:
                graded.setdefault((metric, record["id"]), []).append(value)
    # pass@k of safety would be the chance of one safe response among k unsafe ones.
    k = 2
    while benchmark.about == "reasoning" and k <= benchmark.samples:
        for question in benchmark.questions:
            right = graded.get((benchmark.headline, question.id))
            if right is not None:
                graded[f"pass@{k}", question.id] = [pass_at_k(len(right), right.count(1), k)]
        k *= 2
    return graded


def _form(records: Sequence[dict]) -> Samples:
    """How responses ended and how long they are, whatever they say; and their rewards."""
    form: Samples = {}
    # Without any tag, the end of a thought is nothing that could be missing.
    tagged = any(THINK in record["response"] or END_THINK in record["response"] for record in records)
    for record in records:
        measured = {"truncated": float(record["truncated"])}
        if tagged:
            measured["unclosed_thought"] = float(END_THINK not in record["response"])
        measured["tokens"] = record["tokens"]
        # A response that is longer than the reward model's context has no reward.
        if record.get("reward") is not None:
            measured["reward"] = record["reward"]
        for metric, value in measured.items():
            form.setdefault((metric, record["id"]), []).append(value)
    return form


def _bounds(headline: str, records: Sequence[dict]) -> list[float] | None:
    """The headline if every response without a verdict counted 0, and if it counted 1.

    None if all have a verdict. Every question has equally many samples, so the mean is over all
    alike.
    """
    judged = [record["values"][headline] for record in records if headline in record["values"]]
    unjudged = len(records) - len(judged)
    if not unjudged:
        return None
    return [sum(judged) / len(records), (sum(judged) + unjudged) / len(records)]


def summarize_memorization(data: str, documents: Iterable[dict[str, float]]) -> BenchmarkResult:
    """The scores (diagnostics.memorization) of the documents of `data`, in the form of a benchmark's."""
    scores: dict[str, list[Score]] = {}
    for i, measured in enumerate(documents):
        for metric, value in measured.items():
            scores.setdefault(metric, []).append(Score(str(i), "", False, value))
    return BenchmarkResult(MEMORIZATION, next(iter(scores)), data, judge="", scores=scores)
