"""Puts a benchmark to a model and adds up what comes back; nothing here knows a benchmark by name.

Everything in a result follows from records (see records.py) and the benchmark, so that graders can change without
generating again.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict

from tqdm import tqdm

from nanosafe.data import END_THINK, THINK, Document
from nanosafe.distributed import Ranks
from nanosafe.evals.diagnostics import reflection_summary, response_entropies
from nanosafe.evals.statistics import over_items, paired_difference, pass_at_k
from nanosafe.evals.tasks import Benchmark, Question
from nanosafe.model import Decoder
from nanosafe.randomness import derive_seed
from nanosafe.rewards import Reward, conversation
from nanosafe.sampler import SamplingParams, generate_over_ranks
from nanosafe.tokenizer import Tokenizer

CHUNK = 256  # responses per process between two saves


def respond(model: Decoder, tokenizer: Tokenizer, benchmark: Benchmark, *, ranks: Ranks, seed: int,
            tokens_per_microbatch: int | None = 16384, saved: Sequence[dict] = (),
            save: Callable[[list[dict]], None] = lambda records: None, **engine_options) -> list[dict]:
    """The benchmark's records, by question and sample; every rank calls it and gets all of them.

    A response's noise is a function of (seed, benchmark, question, sample) and the prompt's tokens: two models, or one
    model before and after training, answer with the same noise. saved: records of earlier calls, which are graded again
    but not generated again; save: gets new records, a chunk at a time. tokens_per_microbatch: of the pass that measures
    entropies; None measures none. Raises ValueError for a prompt that leaves no room, and for saved records of other
    questions.
    """
    opened = opened_thought(tokenizer, benchmark.template_vars)
    records = {(r["id"], r["sample"]): r for r in saved if r["benchmark"] == benchmark.name}
    jobs, todo, prompts = [(q, sample) for q in benchmark.questions for sample in range(benchmark.samples)], [], {}
    for question, sample in jobs:
        record = records.get((question.id, sample))
        if record is None:
            todo.append((question, sample))
            if question.id not in prompts:
                prompts[question.id] = _encode(model, tokenizer, benchmark, question, opened)
        elif record["prompt"] == question.messages:
            record["values"] = benchmark.grade(question, record["response"])
        else:
            raise ValueError(f"the saved response to {benchmark.name}, question {question.id}, answers another "
                             "question: the benchmark has changed, so set another --out")

    def answer(chunk: list[tuple[Question, int]]) -> list[dict]:
        params = [SamplingParams(
            temperature=benchmark.temperature, top_p=benchmark.top_p, stop_token_ids=tokenizer.eos_ids,
            max_new_tokens=benchmark.max_response_tokens,
            seed=derive_seed(seed, "eval", benchmark.name, question.id, sample)) for question, sample in chunk]
        outputs = generate_over_ranks(model, [prompts[question.id] for question, _ in chunk], params, ranks,
                                      progress=ranks.main, **engine_options)
        new = []
        for (question, sample), [completion] in zip(chunk, outputs, strict=True):
            truncated, ids = completion.finish_reason == "length", completion.token_ids
            text = tokenizer.decode(ids if truncated else ids[:-1], skip_special_tokens=True)
            text = opened + question.prefill.removeprefix(opened) + text
            new.append(dict(
                benchmark=benchmark.name, id=question.id, category=question.category, sample=sample,
                prompt=question.messages, response=text, tokens=len(ids), truncated=truncated,
                values=benchmark.grade(question, text)) | ({"token_ids": ids} if sample == 0 else {}))
        first = [record for record in new if "token_ids" in record and tokens_per_microbatch]
        documents = [Document(prompts[record["id"]], record["token_ids"]) for record in first]
        scores = ranks.spread(documents, lambda part: response_entropies(model, part, tokens_per_microbatch))
        for record, (_, entropies) in zip(first, scores, strict=True):
            record["entropies"] = [round(entropy, 5) for entropy in entropies.tolist()]
        return new

    with tqdm(total=len(todo), desc=benchmark.name, delay=2, leave=False, disable=not ranks.main) as bar:
        for start in range(0, len(todo), CHUNK * ranks.world):
            new = answer(todo[start : start + CHUNK * ranks.world])
            save(new)
            records |= {(record["id"], record["sample"]): record for record in new}
            bar.update(len(new))
    return [records[question.id, sample] for question, sample in jobs]


def _encode(model: Decoder, tokenizer: Tokenizer, benchmark: Benchmark, question: Question, opened: str) -> list[int]:
    """Token ids of what the model goes on from; where the prefill repeats what the template opens, it stands once."""
    ids = tokenizer.encode_chat(question.messages, add_generation_prompt=True, **benchmark.template_vars)
    ids += tokenizer.encode(question.prefill.removeprefix(opened))
    if len(ids) + benchmark.max_response_tokens > (limit := model.config.max_position_embeddings):
        raise ValueError(f"--max-response-tokens {benchmark.max_response_tokens} after a prompt of {len(ids)} tokens "
                         f"({benchmark.name}, question {question.id}) passes the model's {limit} positions: lower it")
    return ids


def opened_thought(tokenizer: Tokenizer, template_vars: dict) -> str:
    """What the generation prompt writes of the thought: nothing, "<think>\\n" (R1-Distill), or an empty thought (Qwen3
    with enable_thinking=False). It belongs to what is graded."""
    probe = [{"role": "user", "content": "?"}]
    asked = tokenizer.render(probe, **template_vars)
    header = tokenizer.render(probe, add_generation_prompt=True, **template_vars).removeprefix(asked)
    return header[header.index(THINK) :] if THINK in header else ""


def add_rewards(records: Sequence[dict], reward: Reward, name: str, ranks: Ranks) -> None:
    """Score thought and answer of the records that `name`, the reward's, has not scored yet."""
    todo = [record for record in records if record.get("reward_model") != name]

    def score(part: Sequence[dict]) -> list[float]:
        texts = [conversation(record["prompt"], record["response"], opened_thought=False) for record in part]
        return reward(texts, [None] * len(part)).tolist()

    for record, value in zip(todo, ranks.spread(todo, score, cost=lambda r: len(r["response"]) + 1), strict=True):
        record |= {"reward": value, "reward_model": name}


def summarize(benchmark: Benchmark, records: Sequence[dict], reflection: Sequence[int] = ()) -> dict:
    """What the benchmark's records come to; a JSON object (see eval.py). reflection: ids of `reflection_ids`.

    Estimates are over questions, the samples of each averaged first. The diagnostics `reflection_entropy` and
    `token_entropy` average over the tokens of a response first; the first leaves out responses without such tokens.
    """
    graded, measured = (defaultdict(lambda: defaultdict(list)) for _ in range(2))  # metric -> question id -> samples
    for record in records:
        for metric, value in record["values"].items():
            graded[metric][record["id"]].append(value)
        form = {"truncated": float(record["truncated"]), "unclosed_thought": float(END_THINK not in record["response"]),
                "tokens": record["tokens"], "reward": record.get("reward")}
        for metric, value in form.items():
            measured[metric][record["id"]] += [] if value is None else [value]
    if benchmark.about == "reasoning":  # pass@k of safety would be the chance of one safe response among k unsafe ones
        k = 2
        while k <= benchmark.samples:
            graded[f"pass@{k}"] = {i: [pass_at_k(len(v), v.count(1), k)] for i, v in graded[benchmark.headline].items()}
            k *= 2
    first = [record for record in records if "entropies" in record]
    summary = reflection_summary([r["token_ids"] for r in first], [r["entropies"] for r in first], reflection)
    for record, at_reflection, everywhere in zip(first, summary.means, summary.all_token_means, strict=True):
        measured["token_entropy"][record["id"]].append(everywhere)
        measured["reflection_entropy"][record["id"]] += [] if at_reflection is None else [at_reflection]
    category_of = {question.id: question.category for question in benchmark.questions}
    members = {name: [i for i, of in category_of.items() if of == name] for name in sorted(set(category_of.values()))}
    items = {metric: {i: sum(v) / len(v) for i, v in by_question.items() if v}
             for metric, by_question in {**graded, **measured}.items()}
    items |= {name: {i: items[a][i] - items[b][i] for i in items[a]} for name, (a, b) in benchmark.differences.items()}

    def estimates(ids: Collection[str]) -> dict[str, dict]:
        part = {metric: {i: items[metric][i] for i in ids} for metric in graded}
        found = {metric: over_items(values.values()) for metric, values in part.items()}
        found |= {name: paired_difference(part[b], part[a]) for name, (a, b) in benchmark.differences.items()}
        return {metric: value._asdict() for metric, value in found.items()}

    return {
        "about": benchmark.about, "headline": benchmark.headline, "shown": list(benchmark.shown),
        "variation": benchmark.variation, "responses": len(records), "metrics": estimates(category_of),
        "diagnostics": {metric: over_items(items[metric].values())._asdict() for metric in measured if items[metric]},
        "categories": {name: estimates(ids) for name, ids in members.items()},
        "reflection": asdict(summary), "category_of": category_of, "items": items,
    }  # fmt: skip


def protocol(benchmark: Benchmark, tokenizer: Tokenizer, total: int) -> dict:
    """How the benchmark was put to a model; total: its questions before --limit."""
    names = ("samples", "temperature", "top_p", "max_response_tokens", "template_vars", "judge")
    return {"questions": len(benchmark.questions), "of": total, **{name: getattr(benchmark, name) for name in names},
            "thought_opened_by_template": opened_thought(tokenizer, benchmark.template_vars)}
