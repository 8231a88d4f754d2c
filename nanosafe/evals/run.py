"""Puts a benchmark to a model and grades what comes back; nothing here knows a benchmark by name.

Everything in a result follows from records (see records.py) and the benchmark, so that graders can change without
generating again.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nanosafe.evals.benchmark import Benchmark, Question
from nanosafe.evals.diagnostics import response_entropies
from nanosafe.evals.records import RecordFile, key
from nanosafe.io.files import digest
from nanosafe.io.progress import progress_bar
from nanosafe.model.decoder import Decoder
from nanosafe.parallel import Ranks
from nanosafe.randomness import derive_seed
from nanosafe.sampler.generation import generate
from nanosafe.sampler.params import Completion, SamplingParams
from nanosafe.sampler.spread import sharing
from nanosafe.text.data import Document
from nanosafe.text.thoughts import THINK
from nanosafe.text.tokenizer import Tokenizer
from nanosafe.train.rewards import Reward, conversation, known_rewards

# Responses per process between two looks at the progress bar, and between two saves of dear verdicts. A judge's weights
# come to the GPU for each chunk.
CHUNK = 256


@dataclass(frozen=True)
class Request:
    """A response that a model is asked for."""

    benchmark: str
    question: Question
    sample: int
    prompt_ids: list[int]
    opening: str  # what the template and the prefill write of the response
    params: SamplingParams

    @property
    def key(self) -> tuple[str, str, int]:  # that of its record
        return self.benchmark, self.question.id, self.sample

    def record(self, completion: Completion, tokenizer: Tokenizer) -> dict:
        question, ids = self.question, completion.token_ids
        truncated = completion.finish_reason == "length"
        text = tokenizer.decode(ids if truncated else ids[:-1], skip_special_tokens=True)
        record = dict(
            benchmark=self.benchmark, id=question.id, category=question.category,
            sample=self.sample, prompt=question.messages, prompt_digest=digest(self.prompt_ids),
            response=self.opening + text, tokens=len(ids), truncated=truncated)
        if self.sample == 0:
            record["token_ids"] = ids
        return record


def respond(model: Decoder, tokenizer: Tokenizer, benchmark: Benchmark, *, ranks: Ranks, seed: int,
            tokens_per_microbatch: int | None = 16384, file: RecordFile | None = None,
            regrade: bool = False, **engine_options) -> list[dict]:
    """The benchmark's graded records, by question and sample; every rank calls it and gets all of them.

    A response's noise is a function of (seed, benchmark, question, sample) and the prompt's tokens: two models, or one
    model before and after training, answer with the same noise. file: keeps each response as soon as it ends, and what
    it holds is not generated again. tokens_per_microbatch: of the pass that measures entropies; None measures none.
    regrade: ask even a judge whose verdicts are kept again. Raises ValueError for a prompt that leaves no room, and for
    saved records of other questions.
    """
    requests = _requests(model, tokenizer, benchmark, seed)
    records, missing = {}, []
    for record in file.rows if file else ():
        records[key(record)] = record
    for request in requests:
        if request.key in records:
            _check_asked(request, records[request.key])
        else:
            missing.append(request)
    new = _generate(model, tokenizer, missing, file, ranks, **engine_options)
    for record in new:
        records[key(record)] = record
    asked = [records[request.key] for request in requests]
    measured = False
    if tokens_per_microbatch:
        measured = _measure_entropies(model, requests, asked, tokens_per_microbatch, ranks)
    if file and (new or measured):
        file.rewrite(asked)
    grade(benchmark, asked, ranks, file=file, regrade=regrade)
    return asked


def _requests(model: Decoder, tokenizer: Tokenizer, benchmark: Benchmark, seed: int) -> list[Request]:
    """All of the benchmark's, by question and sample."""
    requests, limit = [], model.config.max_position_embeddings
    opened = opened_thought(tokenizer, benchmark.template_vars)
    for question in benchmark.questions:
        # Where the prefill repeats what the template opens, it stands once.
        prefill = question.prefill.removeprefix(opened)
        ids = tokenizer.encode_chat(question.messages, add_generation_prompt=True,
                                    **benchmark.template_vars) + tokenizer.encode(prefill)
        if len(ids) + benchmark.max_response_tokens > limit:
            raise ValueError(f"--max-response-tokens {benchmark.max_response_tokens} after a prompt of "
                             f"{len(ids)} tokens ({benchmark.name}, question {question.id}) passes the "
                             f"model's {limit} positions: lower it")
        for sample in range(benchmark.samples):
            params = SamplingParams(
                temperature=benchmark.temperature, top_p=benchmark.top_p,
                max_new_tokens=benchmark.max_response_tokens, stop_token_ids=tokenizer.eos_ids,
                seed=derive_seed(seed, "eval", benchmark.name, question.id, sample))
            request = Request(benchmark.name, question, sample, ids, opened + prefill, params)
            requests.append(request)
    return requests


def _check_asked(request: Request, record: dict) -> None:
    """Raise ValueError for a saved record that answers something else."""
    what = None
    if record["prompt"] != request.question.messages:
        what = "another question: the benchmark has changed"
    elif record["prompt_digest"] != digest(request.prompt_ids):
        what = "another rendering of it: the chat template, its date or the tokenizer has changed"
    if what:
        raise ValueError(f"the saved response to {request.benchmark}, question {request.question.id}, "
                         f"answers {what}, so set another --out")


def _generate(model: Decoder, tokenizer: Tokenizer, requests: Sequence[Request],
              file: RecordFile | None, ranks: Ranks, **engine_options) -> list[dict]:
    """Records of the requests in order, without values."""
    # A rank takes neighbours, so that equal prompts meet in its engine.
    costs = [len(request.prompt_ids) + request.params.max_new_tokens for request in requests]
    sharers = sharing(model, ranks)
    local = sharers.local_range(costs)
    requests = requests[local.start : local.stop]
    prompts, params = [], []
    for request in requests:
        prompts.append(request.prompt_ids)
        params.append(request.params)
    records: list[dict | None] = [None] * len(requests)
    start, tokens = time.perf_counter(), 0

    def finished(i: int, completion: Completion) -> None:
        nonlocal tokens
        records[i] = requests[i].record(completion, tokenizer)
        if file:
            file.append(records[i])
        tokens += len(completion.token_ids)
        bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):.0f} tokens/s", refresh=False)
        bar.update()

    name = requests[0].benchmark if requests else ""
    with progress_bar(len(requests), name) as bar:
        generate(model, prompts, params, finished=finished, **engine_options)
    return sharers.gather(records)


def _measure_entropies(model: Decoder, requests: Sequence[Request], records: Sequence[dict],
                       tokens_per_microbatch: int, ranks: Ranks) -> bool:
    """Give the first sample of each question the entropies that it lacks; whether any did."""
    missing = []
    for request, record in zip(requests, records, strict=True):
        if "token_ids" in record and "entropies" not in record:
            missing.append((record, Document(request.prompt_ids, record["token_ids"])))

    def measure(part: Sequence[tuple[dict, Document]]) -> list[list[float]]:
        scores = response_entropies(model, [document for _, document in part], tokens_per_microbatch)
        return [entropies.tolist() for _, entropies in scores]

    for chunk in _chunks(missing, "entropies", ranks):
        measured = ranks.split_work(chunk, measure, cost=lambda item: len(item[1]))
        for (record, _), entropies in zip(chunk, measured, strict=True):
            record["entropies"] = [round(entropy, 5) for entropy in entropies]
    return bool(missing)


def grade(benchmark: Benchmark, records: Sequence[dict], ranks: Ranks, *,
          file: RecordFile | None = None, regrade: bool = False) -> None:
    """Give the records values; verdicts that the benchmark keeps are kept, unless another judge gave them."""
    questions = {question.id: question for question in benchmark.questions}
    ungraded = []
    for record in records:
        is_graded = "values" in record and record["judge"] == benchmark.judge
        if regrade or not (benchmark.keeps_verdicts and is_graded):
            ungraded.append(record)

    def grade_part(part: Sequence[dict]) -> list[dict[str, float]]:
        asked = [questions[record["id"]] for record in part]
        return benchmark.grade(asked, [record["response"] for record in part])

    for chunk in _chunks(ungraded, f"grading {benchmark.name}", ranks):
        graded = ranks.split_work(chunk, grade_part, cost=_length)
        for record, record_values in zip(chunk, graded, strict=True):
            record |= {"values": record_values, "judge": benchmark.judge}
        if file and benchmark.keeps_verdicts:
            file.rewrite(records)
    if file and ungraded and not benchmark.keeps_verdicts:
        file.rewrite(records)


def _length(record: dict) -> int:
    return len(record["response"]) + 1


def _chunks(records: Sequence[dict], what: str, ranks: Ranks) -> Iterator[Sequence[dict]]:
    size = CHUNK * ranks.world
    with progress_bar(len(records), what) as bar:
        for start in range(0, len(records), size):
            yield records[start : start + size]
            bar.update(len(records[start : start + size]))


def opened_thought(tokenizer: Tokenizer, template_vars: dict) -> str:
    """What the generation prompt writes of the thought: nothing, "<think>\\n" (R1-Distill), or an empty thought (Qwen3
    with enable_thinking=False). It belongs to what is graded."""
    probe = [{"role": "user", "content": "?"}]
    asked = tokenizer.render(probe, **template_vars)
    prompt = tokenizer.render(probe, add_generation_prompt=True, **template_vars)
    header = prompt.removeprefix(asked)
    return header[header.index(THINK) :] if THINK in header else ""


def add_rewards(records: Sequence[dict], reward: Reward, name: str, ranks: Ranks) -> None:
    """Score thought and answer of the records that `name`, the reward's, has not scored yet; see known_rewards."""
    missing = [record for record in records if record.get("reward_model") != name]

    def score(part: Sequence[dict]) -> list[float | None]:
        texts = []
        for record in part:
            texts.append(conversation(record["prompt"], record["response"], opened_thought=False))
        return known_rewards(reward, name, texts)

    for record, value in zip(missing, ranks.split_work(missing, score, cost=_length), strict=True):
        record |= {"reward": value, "reward_model": name}


def protocol(benchmark: Benchmark, tokenizer: Tokenizer, total: int) -> dict:
    """How the benchmark was put to a model; total: its questions before --limit."""
    return {
        "questions": len(benchmark.questions), "of": total, "samples": benchmark.samples,
        "temperature": benchmark.temperature, "top_p": benchmark.top_p,
        "max_response_tokens": benchmark.max_response_tokens, "suffix": benchmark.suffix,
        "template_vars": benchmark.template_vars,
        "thinking": tokenizer.template_vars.get("thinking", True),
        "thought_opened_by_template": opened_thought(tokenizer, benchmark.template_vars),
    }  # fmt: skip
