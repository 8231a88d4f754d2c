"""Puts a benchmark to a model and adds up what comes back; nothing here knows a benchmark by name.

Everything in a result follows from records (see results.py) and the benchmark, so that graders can change without
generating again.
"""

import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict

from tqdm import tqdm

from nanosafe.evals.benchmark import OF_THOUGHTS, Benchmark, Question
from nanosafe.evals.diagnostics import reflection_summary, response_entropies
from nanosafe.evals.results import RecordFile
from nanosafe.evals.statistics import SHARES, over_items, paired_difference, pass_at_k
from nanosafe.io.files import digest
from nanosafe.model.decoder import Decoder
from nanosafe.parallel import Ranks
from nanosafe.randomness import derive_seed
from nanosafe.sampler import Completion, SamplingParams, generate
from nanosafe.text.data import Document
from nanosafe.text.thoughts import END_THINK, THINK, split_thought
from nanosafe.text.tokenizer import Tokenizer
from nanosafe.train.rewards import Reward, conversation, known_rewards

# Responses per process between two looks at the progress bar, and between two saves of dear verdicts. A judge's weights
# come to the GPU for each chunk.
CHUNK = 256


def respond(model: Decoder, tokenizer: Tokenizer, benchmark: Benchmark, *, ranks: Ranks, seed: int,
            tokens_per_microbatch: int | None = 16384, file: RecordFile | None = None,
            regrade: bool = False,
            **engine_options) -> list[dict]:
    """The benchmark's graded records, by question and sample; every rank calls it and gets all of them.

    A response's noise is a function of (seed, benchmark, question, sample) and the prompt's tokens: two models, or one
    model before and after training, answer with the same noise. file: keeps each response as soon as it ends, and what
    it holds is not generated again. tokens_per_microbatch: of the pass that measures entropies; None measures none.
    regrade: ask even a judge whose verdicts are kept again. Raises ValueError for a prompt that leaves no room, and for
    saved records of other questions.
    """
    opened = opened_thought(tokenizer, benchmark.template_vars)
    records = {}
    for record in file.rows if file else ():
        if record["benchmark"] == benchmark.name:
            records[record["id"], record["sample"]] = record
    prompts = {}
    jobs, todo = [], []  # (question, number of its sample)
    for question in benchmark.questions:
        prompts[question.id] = _encode(model, tokenizer, benchmark, question, opened)
        for sample in range(benchmark.samples):
            jobs.append((question, sample))
            if (question.id, sample) in records:
                _check_asked(benchmark.name, question, prompts[question.id],
                             records[question.id, sample])
            else:
                todo.append((question, sample))
    for record in _generate(model, tokenizer, benchmark, todo, prompts, opened, ranks, seed, file, engine_options):
        records[record["id"], record["sample"]] = record
    wanted = [records[question.id, sample] for question, sample in jobs]
    measured = False
    if tokens_per_microbatch:
        measured = _measure_entropies(model, wanted, prompts, tokens_per_microbatch, ranks)
    if file and (todo or measured):
        file.rewrite(wanted)
    grade(benchmark, wanted, ranks, file=file, regrade=regrade)
    return wanted


def _check_asked(name: str, question: Question, prompt_ids: list[int], record: dict) -> None:
    """Raise ValueError for a saved record that answers something else than these ids."""
    if record["prompt"] != question.messages:
        what = "another question: the benchmark has changed"
    elif record["prompt_digest"] != digest(prompt_ids):
        what = "another rendering of it: the chat template, its date or the tokenizer has changed"
    else:
        return
    raise ValueError(f"the saved response to {name}, question {question.id}, answers {what}, so "
                     "set another --out")  # fmt: skip


def _generate(model: Decoder, tokenizer: Tokenizer, benchmark: Benchmark,
              todo: Sequence[tuple[Question, int]], prompts: dict[str, list[int]], opened: str,
              ranks: Ranks, seed: int, file: RecordFile | None,
              engine_options: dict) -> list[dict]:
    """Records of `todo` in order, without values. A rank takes neighbours, whose equal prompts meet in its engine."""
    cost = [len(prompts[question.id]) + benchmark.max_response_tokens for question, _ in todo]
    mine = [todo[i] for i in ranks.local_range(cost)]
    params = []
    for question, sample in mine:
        params.append(SamplingParams(
            temperature=benchmark.temperature, top_p=benchmark.top_p,
            max_new_tokens=benchmark.max_response_tokens, stop_token_ids=tokenizer.eos_ids,
            seed=derive_seed(seed, "eval", benchmark.name, question.id, sample)))
    records: list[dict | None] = [None] * len(mine)
    start, tokens = time.perf_counter(), 0

    def finished(i: int, completion: Completion) -> None:
        nonlocal tokens
        (question, sample), ids = mine[i], completion.token_ids
        truncated = completion.finish_reason == "length"
        text = tokenizer.decode(ids if truncated else ids[:-1], skip_special_tokens=True)
        records[i] = dict(
            benchmark=benchmark.name, id=question.id, category=question.category, sample=sample,
            prompt=question.messages, prompt_digest=digest(prompts[question.id]),
            response=opened + question.prefill.removeprefix(opened) + text,
            tokens=len(ids), truncated=truncated)
        if sample == 0:
            records[i]["token_ids"] = ids
        if file:
            file.append(records[i])
        tokens += len(ids)
        bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):.0f} tokens/s", refresh=False)
        bar.update()

    with tqdm(total=len(mine), desc=benchmark.name, delay=2, leave=False,
              disable=not ranks.main) as bar:
        asked = [prompts[question.id] for question, _ in mine]
        generate(model, asked, params, finished=finished, **engine_options)
    return ranks.gather(records)


def _measure_entropies(model: Decoder, records: Sequence[dict], prompts: dict[str, list[int]],
                       tokens_per_microbatch: int, ranks: Ranks) -> bool:
    """Give the first sample of each question the entropies that it lacks; whether any did."""
    todo = [record for record in records if "token_ids" in record and "entropies" not in record]
    for part in _chunks(todo, "entropies", ranks):
        documents = [Document(prompts[record["id"]], record["token_ids"]) for record in part]
        scores = ranks.split_work(documents, lambda some: response_entropies(model, some, tokens_per_microbatch))
        for record, (_, entropies) in zip(part, scores, strict=True):
            record["entropies"] = [round(entropy, 5) for entropy in entropies.tolist()]
    return bool(todo)


def grade(benchmark: Benchmark, records: Sequence[dict], ranks: Ranks, *,
          file: RecordFile | None = None,
          regrade: bool = False) -> None:
    """Give the records values; verdicts that the benchmark keeps are kept, unless another judge gave them."""
    questions = {question.id: question for question in benchmark.questions}
    todo = []
    for record in records:
        kept = benchmark.keeps_verdicts and "values" in record and record["judge"] == benchmark.judge
        if regrade or not kept:
            todo.append(record)

    def values(part: Sequence[dict]) -> list[dict[str, float]]:
        asked = [questions[record["id"]] for record in part]
        return benchmark.grade(asked, [record["response"] for record in part])

    for part in _chunks(todo, f"grading {benchmark.name}", ranks):
        found = ranks.split_work(part, values, cost=lambda record: len(record["response"]) + 1)
        for record, graded in zip(part, found, strict=True):
            record |= {"values": graded, "judge": benchmark.judge}
        if file and benchmark.keeps_verdicts:
            file.rewrite(records)
    if file and todo and not benchmark.keeps_verdicts:
        file.rewrite(records)


def _chunks(records: Sequence[dict], what: str, ranks: Ranks) -> Iterator[Sequence[dict]]:
    size = CHUNK * ranks.world
    with tqdm(total=len(records), desc=what, delay=2, leave=False, disable=not ranks.main) as bar:
        for start in range(0, len(records), size):
            yield records[start : start + size]
            bar.update(len(records[start : start + size]))


def _encode(model: Decoder, tokenizer: Tokenizer, benchmark: Benchmark, question: Question,
            opened: str) -> list[int]:
    """Token ids of what the model goes on from; where the prefill repeats what the template opens, it stands once."""
    ids = tokenizer.encode_chat(question.messages, add_generation_prompt=True,
                                **benchmark.template_vars)
    ids += tokenizer.encode(question.prefill.removeprefix(opened))
    limit = model.config.max_position_embeddings
    if len(ids) + benchmark.max_response_tokens > limit:
        raise ValueError(f"--max-response-tokens {benchmark.max_response_tokens} after a prompt of "
                         f"{len(ids)} tokens ({benchmark.name}, question {question.id}) passes the "
                         f"model's {limit} positions: lower it")
    return ids


def opened_thought(tokenizer: Tokenizer, template_vars: dict) -> str:
    """What the generation prompt writes of the thought: nothing, "<think>\\n" (R1-Distill), or an empty thought (Qwen3
    with enable_thinking=False). It belongs to what is graded."""
    probe = [{"role": "user", "content": "?"}]
    asked = tokenizer.render(probe, **template_vars)
    header = tokenizer.render(probe, add_generation_prompt=True,
                              **template_vars).removeprefix(asked)
    return header[header.index(THINK) :] if THINK in header else ""


def add_rewards(records: Sequence[dict], reward: Reward, name: str, ranks: Ranks) -> None:
    """Score thought and answer of the records that `name`, the reward's, has not scored yet; see known_rewards."""
    todo = [record for record in records if record.get("reward_model") != name]

    def score(part: Sequence[dict]) -> list[float | None]:
        texts = []
        for record in part:
            texts.append(conversation(record["prompt"], record["response"], opened_thought=False))
        return known_rewards(reward, name, texts)

    rewards = ranks.split_work(todo, score, cost=lambda record: len(record["response"]) + 1)
    for record, value in zip(todo, rewards, strict=True):
        record |= {"reward": value, "reward_model": name}


Samples = dict[str, dict[str, list[float]]]  # metric -> question id -> a value for each sample
Means = dict[str, dict[str, float]]  # metric -> question id -> the mean of its samples


def summarize(benchmark: Benchmark, records: Sequence[dict],
              reflection: Sequence[int] = ()) -> dict:
    """What the benchmark's records come to; a JSON object (see eval.py). reflection: ids of `reflection_ids`.

    Estimates are over questions, the samples of each averaged first; questions that stand among the training prompts
    are left out, and count in `with_training_prompts` alone. A metric that was judged nowhere is missing, and so is one
    about thoughts where no response has a thought. The diagnostics `reflection_entropy` and `token_entropy` average
    over the tokens of a response first; the first leaves out responses without such tokens.
    """
    asked = [question.id for question in benchmark.questions]
    category_of = {question.id: question.category for question in benchmark.questions if not question.seen}
    unseen = [record for record in records if record["id"] in category_of]
    measured = [record for record in unseen if "entropies" in record]
    reflecting = reflection_summary([record["token_ids"] for record in measured],
                                    [record["entropies"] for record in measured], reflection)
    graded, diagnostics = _means(_graded(benchmark, records)), _means(_form(unseen))
    for record, mean, at_reflection in zip(measured, reflecting.all_token_means, reflecting.means,
                                           strict=True):
        diagnostics.setdefault("token_entropy", {})[record["id"]] = mean
        if at_reflection is not None:
            diagnostics.setdefault("reflection_entropy", {})[record["id"]] = at_reflection

    items = {}
    for metric, values in (graded | diagnostics).items():
        items[metric] = {i: value for i, value in values.items() if i in category_of}
    for name, (a, b) in benchmark.differences.items():
        if a in items and b in items:
            items[name] = {i: items[a][i] - items[b][i] for i in items[a] if i in items[b]}
    categories = {}
    for name in sorted(set(category_of.values())):
        members = [i for i, category in category_of.items() if category == name]
        categories[name] = _estimates(benchmark, graded, members)
    overlap, seen = None, len(asked) - len(category_of)
    if seen:
        overlap = {"training_prompts": seen, "metrics": _estimates(benchmark, graded, asked)}
    return {
        "about": benchmark.about,
        "headline": benchmark.headline,
        "shown": list(benchmark.shown),
        "variation": benchmark.variation,
        "source": benchmark.source,
        "judge": benchmark.judge,
        "responses": len(unseen),
        "metrics": _estimates(benchmark, graded, category_of),
        "bounds": _bounds(benchmark.headline, unseen),
        "diagnostics": {metric: over_items(values.values())._asdict() for metric, values in diagnostics.items()},
        "categories": categories,
        "reflection": asdict(reflecting),
        "category_of": category_of,
        "items": items,
        "with_training_prompts": overlap,
    }


def _graded(benchmark: Benchmark, records: Sequence[dict]) -> Samples:
    """The grader's values, and pass@k of reasoning."""
    graded: Samples = defaultdict(lambda: defaultdict(list))
    thinks = any(split_thought(record["response"])[0] for record in records)
    for record in records:
        for metric, value in record["values"].items():
            if thinks or metric.partition(" (")[0] not in OF_THOUGHTS:
                graded[metric][record["id"]].append(value)
    # pass@k of safety would be the chance of one safe response among k unsafe ones.
    if benchmark.about == "reasoning":
        k = 2
        while k <= benchmark.samples:
            for i, right in graded[benchmark.headline].items():
                graded[f"pass@{k}"][i] = [pass_at_k(len(right), right.count(1), k)]
            k *= 2
    return graded


def _form(records: Sequence[dict]) -> Samples:
    """How responses ended and how long they are, whatever they say; and their rewards."""
    form: Samples = defaultdict(lambda: defaultdict(list))
    texts = [record["response"] for record in records]
    tagged = any(THINK in text or END_THINK in text for text in texts)
    for record in records:
        values = {"truncated": float(record["truncated"])}
        if tagged:
            values["unclosed_thought"] = float(END_THINK not in record["response"])
        values["tokens"] = record["tokens"]
        if record.get("reward") is not None:  # nor is one longer than the reward model's context
            values["reward"] = record["reward"]
        for metric, value in values.items():
            form[metric][record["id"]].append(value)
    return form


def _means(samples: Samples) -> Means:
    means = {}
    for metric, by_question in samples.items():
        means[metric] = {i: sum(values) / len(values) for i, values in by_question.items()}
    return means


def _estimates(benchmark: Benchmark, graded: Means, ids: Collection[str]) -> dict[str, dict]:
    """{metric: estimate} over the questions `ids`."""
    chosen, estimates = {}, {}
    for metric, values in graded.items():
        chosen[metric] = {i: values[i] for i in ids if i in values}
        if chosen[metric]:
            estimates[metric] = over_items(chosen[metric].values(), bounds=SHARES)._asdict()
    for name, (a, b) in benchmark.differences.items():
        if chosen.get(a, {}).keys() & chosen.get(b, {}).keys():
            estimates[name] = paired_difference(chosen[b], chosen[a])._asdict()
    return estimates


def _bounds(headline: str, records: Sequence[dict]) -> list[float] | None:
    """The headline if every response without a verdict counted 0, and if it counted 1.

    None if all have a verdict. Every question has equally many samples, so the mean is over all alike.
    """
    judged = [record["values"][headline] for record in records if headline in record["values"]]
    unjudged = len(records) - len(judged)
    if not unjudged:
        return None
    return [sum(judged) / len(records), (sum(judged) + unjudged) / len(records)]


def protocol(benchmark: Benchmark, tokenizer: Tokenizer, total: int) -> dict:
    """How the benchmark was put to a model; total: its questions before --limit."""
    return {
        "questions": len(benchmark.questions),
        "of": total,
        "samples": benchmark.samples,
        "temperature": benchmark.temperature,
        "top_p": benchmark.top_p,
        "max_response_tokens": benchmark.max_response_tokens,
        "suffix": benchmark.suffix,
        "template_vars": benchmark.template_vars,
        "thinking": tokenizer.template_vars.get("thinking", True),
        "thought_opened_by_template": opened_thought(tokenizer, benchmark.template_vars),
    }
