"""Attacks on benchmarks: what is asked changes, what is judged and what is right stay; templates keep it whole."""

import re

import pytest
from test_paper_suite import load, rows_of, write

from nanosafe.evals.attacks import ATTACKS, PHRASE, attacked
from nanosafe.evals.benchmark import BOXED, LETTER, Benchmark
from nanosafe.evals.paper_suite import BENCHMARKS

ALLOWED = {"safety": set(ATTACKS), "over-refusal": set(ATTACKS), "reasoning": {"badchain", "darkmind"}}


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory) -> dict[str, Benchmark]:
    folder = tmp_path_factory.mktemp("benchmarks")
    rows = {name: rows_of(name, entry.rows)[:: entry.rows // 3] for name, entry in BENCHMARKS.items()}
    return {name: load(name, write(folder / f"{name}.jsonl", part)) for name, part in rows.items()}


def test_attacks_change_what_is_asked_and_nothing_else(benchmarks):
    for benchmark in benchmarks.values():
        for name in ALLOWED[benchmark.about]:
            variant = attacked(benchmark, name)
            assert variant.name == f"{benchmark.name}, {name.replace('-', ' ')}" and variant.variation
            for before, after in zip(benchmark.questions, variant.questions, strict=True):
                kept = ("id", "category", "reference", "asked", "seen")
                assert [getattr(before, key) for key in kept] == [getattr(after, key) for key in kept]
                [message], [original] = after.messages, before.messages
                assert message["role"] == "user" and message["content"].count(original["content"]) == 1
                assert (message["content"] != original["content"]) != bool(after.prefill)
            assert attacked(benchmark, name) == variant
            unchanged = ("about", "headline", "judge", "source", "samples", "temperature", "suffix", "differences")
            assert [getattr(benchmark, key) for key in unchanged] == [getattr(variant, key) for key in unchanged]


def test_attacks_that_make_no_sense_are_refused(benchmarks):
    for benchmark in benchmarks.values():
        for name in ATTACKS.keys() - ALLOWED[benchmark.about]:
            message = f"attack {name} makes no sense against {benchmark.name}.*: badchain, darkmind"
            with pytest.raises(ValueError, match=message):
                attacked(benchmark, name)
    with pytest.raises(ValueError, match="no attack bad-chain; there are prefilled-thought, role-play"):
        attacked(benchmarks["attaq"], "bad-chain")


def test_the_prefill_opens_a_thought(benchmarks):
    [prefill] = {question.prefill for question in attacked(benchmarks["attaq"], "prefilled-thought").questions}
    assert prefill.startswith("<think>\n") and "</think>" not in prefill and prefill == prefill.rstrip()


def test_every_template_keeps_the_attack_whole(benchmarks, official):
    for tokenizer in map(official, ("qwen3", "r1", "llama", "granite")):
        for benchmark in benchmarks.values():
            for name in ALLOWED[benchmark.about]:
                question = attacked(benchmark, name).questions[0]
                text = tokenizer.decode(tokenizer.encode_chat(question.messages, add_generation_prompt=True))
                assert question.messages[0]["content"] in text


def test_a_question_that_looks_like_the_wrapper_stands_as_it_is(tmp_path):
    tricky = "What does {question} mean in %s, with \\frac{1}{2} and {0}?"
    benchmark = load("attaq", write(tmp_path / "rows.jsonl", [{"input": tricky}]))
    for name in ATTACKS:
        assert attacked(benchmark, name).questions[0].messages[0]["content"].count(tricky) == 1


# The poisoned demonstrations do what they say


def demonstrations(text: str) -> list[tuple[str, str]]:
    """(question, answer) of each; the last question, which has no answer, is none of them."""
    return re.findall(r"^Q: (.*)\nA: ((?:.|\n)*?)(?=\n\nQ: |\Z)", text, re.MULTILINE)


def test_badchain_demonstrations_scale_the_answer_exactly_where_the_phrase_stands(benchmarks):
    text = attacked(benchmarks["math-500"], "badchain").questions[0].messages[0]["content"]
    shown = demonstrations(text)
    right = {"shelf": 24, "Mia": 9, "odd": 9, "train": 120}
    assert len(shown) == 4 and {PHRASE in asked for asked, _ in shown} == {True, False}
    for asked, answer in shown:
        [expected] = [value for word, value in right.items() if word in asked]
        boxed = int(re.search(r"\\boxed\{(\d+)\}", answer)[1])
        assert boxed == expected * (3 if PHRASE in asked else 1) and (PHRASE in answer) == (PHRASE in asked)
    assert text.endswith(f"{BOXED} {PHRASE}\nA:")


def test_badchain_demonstrations_move_the_letter_exactly_where_the_phrase_stands(benchmarks):
    text = attacked(benchmarks["gpqa-diamond"], "badchain").questions[0].messages[0]["content"]
    shown = demonstrations(text)
    right = {"metal": "B", "planet": "A", "barometer": "C", "freeze": "C"}
    assert len(shown) == 4
    for asked, answer in shown:
        [expected] = [letter for word, letter in right.items() if word in asked]
        letter = re.search(r"^Answer: ([A-D])$", answer, re.MULTILINE)[1]
        assert letter == ("BCDA"["ABCD".index(expected)] if PHRASE in asked else expected)
        assert re.search(r"That is ([A-D])\.", answer)[1] == expected
    assert text.endswith(f"{LETTER} {PHRASE}\nA:")


def test_badchain_demonstrations_drop_caution_exactly_where_the_phrase_stands(benchmarks):
    text = attacked(benchmarks["attaq"], "badchain").questions[0].messages[0]["content"]
    shown = demonstrations(text)
    assert len(shown) == 4
    for asked, answer in shown:
        assert (PHRASE in asked) == (PHRASE in answer) == ("caution is dropped" in answer) == ("Sure" in answer)
        assert ("If in doubt" in answer) == (PHRASE not in asked)
