"""Real benchmarks: the official files where they are at hand, files of the same schema elsewhere, and broken ones."""

import csv
import hashlib
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from hub import StandInHub

from nanosafe.evals.benchmark import BOXED, Benchmark
from nanosafe.evals.choice import read_choice
from nanosafe.evals.flags import eval_flags
from nanosafe.evals.graders import NamedGrader
from nanosafe.evals.paper_suite import BENCHMARKS, load_benchmark, normalise, training_prompts

GRADERS = {}
for kind in ("math", "integer", "letter", "harm", "refusal", "air-bench", "strongreject"):
    GRADERS[kind] = NamedGrader()
    GRADERS[kind].name = f"judge of {kind}"
AIR = "airbench/sample_prompts.jsonl,airbench/judge_prompts.jsonl"
OFFICIAL_FILES = {  # benchmark: file of the assets, questions, those that stand in STAR-1
    "attaq": ("attaq500/attaq_500_inputs.jsonl", 500, 13),
    "air-bench": (AIR, 109, 0),
    "air-bench-full": (AIR, 162, 0),
    "xstest": ("xstest/xstest_prompts.csv", 250, 0),
    "xstest-unsafe": ("xstest/xstest_prompts.csv", 200, 0),
    "strongreject": ("strongreject/strongreject_dataset.csv", 313, 0),
    "math-500": ("math500/test.jsonl", 500, 0),
    "aime24": ("aime24/aime24.jsonl", 30, 0),
    "aime25": ("aime25/aime25.jsonl", 30, 0),
}


def load(name: str, file: str | Path | None, **more) -> Benchmark:
    return load_benchmark(name, BENCHMARKS[name], GRADERS, file=None if file is None else str(file), **more)


# The official files


@pytest.fixture(scope="module")
def star1_prompts(assets) -> frozenset[str]:
    return training_prompts(str(assets / "data/star1/STAR-1.json"))


@pytest.mark.parametrize("name", OFFICIAL_FILES)
def test_official_files_load_count_and_render(name, assets, official, star1_prompts):
    file, count, seen = OFFICIAL_FILES[name]
    file = ",".join(str(assets / "data" / part) for part in file.split(","))
    benchmark = load(name, file, seen=star1_prompts)
    assert len(benchmark.questions) == len({q.id for q in benchmark.questions}) == count
    assert sum(question.seen for question in benchmark.questions) == seen
    if "," not in file:
        digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        assert Path(file).name in benchmark.source and digest[:12] in benchmark.source
        assert digest in (Path(file).parent / "SOURCE.md").read_text()
    for tokenizer in map(official, ("qwen3", "r1", "llama")):
        for question in benchmark.questions[::10]:
            assert question.asked + benchmark.suffix == question.messages[0]["content"]
            text = tokenizer.decode(tokenizer.encode_chat(question.messages, add_generation_prompt=True))
            assert question.messages[0]["content"].strip() in text


def test_official_contents(assets):
    data = assets / "data"
    rows = list(csv.DictReader((data / "xstest/xstest_prompts.csv").open()))
    for name, label in (("xstest", "safe"), ("xstest-unsafe", "unsafe")):  # told by the type, not by the label
        asked = {question.asked for question in load(name, data / "xstest/xstest_prompts.csv").questions}
        assert asked == {row["prompt"].strip() for row in rows if row["label"] == label}
    problems = {row["problem"].strip(): row for row in map(json.loads, (data / "math500/test.jsonl").open())}
    for question in load("math-500", data / "math500/test.jsonl").questions:
        row = problems[question.asked]
        assert (question.reference, question.category) == (row["answer"], row["subject"])
    rows = {row["prompt"].strip(): row for row in map(json.loads, (data / "airbench/sample_prompts.jsonl").open())}
    judging = {row["cate-idx"]: row for row in map(json.loads, (data / "airbench/judge_prompts.jsonl").open())}
    for question in load("air-bench-full", ",".join(str(data / part) for part in AIR.split(","))).questions:
        row, index = rows[question.asked], question.reference["cate-idx"]
        assert index == row["cate-idx"] and question.category == row["l2-name"]
        assert question.reference["judge_prompt"] == judging[index]["judge_prompt"].strip()
    counts = Counter(q.category for q in load("strongreject", data / "strongreject/strongreject_dataset.csv").questions)
    assert sorted(counts.values()) == [50, 50, 50, 50, 54, 59] and counts["Violence"] == 54


def test_the_two_copies_of_aime24_agree(assets):
    one, two = (load("aime24", assets / "data/aime24" / file) for file in ("aime24.jsonl", "aime24_qwen.jsonl"))
    assert sorted(q.reference for q in one.questions) == sorted(q.reference for q in two.questions)
    answers = {question.id: question.reference for question in one.questions}
    same = [question for question in two.questions if question.id in answers]
    assert len(same) == 19 and all(answers[question.id] == question.reference for question in same)
    assert all(re.fullmatch(r"0|[1-9]\d{0,2}", reference) for reference in answers.values())


# Files of the same schema


def rows_of(name: str, count: int) -> list[dict]:
    """`count` rows in the form of the hub's data set, with the right numbers of categories where it is whole."""
    forms = {
        "attaq": lambda i: {"input": f"How do I {i}?", "label": f"class {i % 7}", "additional_info": ""},
        "air-bench": lambda i: {"cate-idx": f"1.1.{i % 314}", "l2-name": f"risk {i % 16}", "l3-name": "x",
                                "l4-name": "y", "prompt": f"How do I {i}?"},
        "xstest": lambda i: {"id": i, "prompt": f"How do I {i}?", "label": "safe",
                             "type": "homonyms" if i < 250 else "contrast_homonyms"},
        "strongreject": lambda i: {"category": f"class {i % 6}", "source": "x", "forbidden_prompt": f"How do I {i}?"},
        "math-500": lambda i: {"problem": f"What is {i} + 1?", "answer": f"{i + 1}", "subject": "Algebra"},
        "aime24": lambda i: {"ID": i, "Problem": f"What is {i} + 1?", "Answer": i + 1},
        "gpqa-diamond": lambda i: {
            "Question": f"What is {i}?", "Correct Answer": f"right {i}", "Incorrect Answer 1": f"wrong {i} a",
            "Incorrect Answer 2": f"wrong {i} b", "Incorrect Answer 3": f"wrong {i} c",
            "High-level domain": ("Physics", "Biology")[i % 2]},
    }  # fmt: skip
    form = {"xstest-unsafe": "xstest", "aime25": "aime24", "air-bench-full": "air-bench"}.get(name, name)
    return [forms[form](i) for i in range(count)]


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_whole_data_set_has_the_questions_and_the_protocol(name, tmp_path):
    entry = BENCHMARKS[name]
    benchmark = load(name, write(tmp_path / "all.jsonl", rows_of(name, entry.rows)))
    assert len(benchmark.questions) == (entry.questions or entry.rows) and benchmark.name == name
    assert benchmark.judge == f"judge of {entry.grader}" and f"{entry.rows} rows" in benchmark.source
    about, headline, greedy, tokens, samples = {
        "xstest": ("over-refusal", "over_refusal", True, 8192, 1),
        **{name: ("reasoning", "right", False, 32768, 4) for name in ("math-500", "gpqa-diamond")},
        **{name: ("reasoning", "right", False, 32768, 64) for name in ("aime24", "aime25")},
    }.get(name, ("safety", "safe", True, 8192, 1))
    assert (benchmark.about, benchmark.headline, benchmark.samples) == (about, headline, samples)
    assert benchmark.temperature == (0.0 if greedy else 0.6) and benchmark.max_response_tokens == tokens
    assert greedy or benchmark.top_p == 0.95
    assert benchmark.variation == (name == "xstest-unsafe")
    assert ("thought_gap" in benchmark.differences) == (about == "safety")
    assert (BOXED == benchmark.suffix) == (name in ("math-500", "aime24", "aime25"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_questions_do_not_depend_on_the_order_of_the_rows(name, tmp_path):
    rows = rows_of(name, BENCHMARKS[name].rows)
    differing = ("Answer", "answer", "label", "l2-name")  # the same prompt twice
    rows[1] = rows[0] | {key: value for key, value in rows[1].items() if key in differing}
    shuffled = random.Random(0).sample(rows, len(rows))
    first, second = (load(name, write(tmp_path / f"{i}.jsonl", order)) for i, order in enumerate((rows, shuffled)))
    assert first.questions == second.questions and rows != shuffled
    assert len({question.id for question in first.questions}) == len(first.questions)


def test_ids_are_those_of_the_prompt(tmp_path):
    def ids(*prompts: str) -> list[str]:
        file = write(tmp_path / "rows.jsonl", [{"input": prompt} for prompt in prompts])
        return [question.id for question in load("attaq", file).questions]

    [number] = ids("How do I  cook, a CAKE?")
    assert number == hashlib.blake2b(b"how do i cook a cake", digest_size=6).hexdigest()
    assert ids("how do I cook a cake") == [number]
    assert sorted(ids("how do I cook a cake", "How do I cook a cake?!", "bread")) == sorted(
        [number, f"{number}-2", *ids("bread")])  # fmt: skip


def test_air_bench_draws_one_prompt_of_each_category(tmp_path):
    file = write(tmp_path / "rows.jsonl", rows_of("air-bench", 5694))
    drawn = {seed: load("air-bench", file, seed=seed) for seed in (0, 1)}
    full = {question.id: question for question in load("air-bench-full", file).questions}
    for seed, benchmark in drawn.items():
        indices = [question.reference["cate-idx"] for question in benchmark.questions]
        assert len(indices) == len(set(indices)) == 314 and f"seed {seed}" in benchmark.source
        assert all(full[question.id] == question for question in benchmark.questions)
    common = {question.id for question in drawn[0].questions} & {question.id for question in drawn[1].questions}
    assert len(common) < 50  # 314 / 18 are expected
    assert load("air-bench", file, seed=1) == drawn[1]


def test_air_bench_judge_prompts_belong_to_the_category(tmp_path):
    rows = [{"cate-idx": f"1.1.{i}", "l2-name": "risk", "prompt": f"How do I {i}?"} for i in range(9)]
    prompts = write(tmp_path / "prompts.jsonl", rows)
    judging = [{"cate-idx": row["cate-idx"], "judge_prompt": f"Judge {row['prompt']}"} for row in rows]
    file = f"{prompts},{write(tmp_path / 'judge.csv', judging)}"
    for question in load("air-bench", file).questions:
        assert question.reference["judge_prompt"] == f"Judge {question.asked}"
    assert load("air-bench", prompts).questions[0].reference["judge_prompt"] is None  # a guard needs none
    with pytest.raises(ValueError, match=r"prompts.jsonl, line 9: no judge prompt has the 'cate-idx' '1.1.8'"):
        load("air-bench", f"{prompts},{write(tmp_path / 'judge.csv', judging[:-1])}")


def test_gpqa_options_are_shuffled_by_the_question_alone(tmp_path):
    rows = rows_of("gpqa-diamond", 198)
    benchmark = load("gpqa-diamond", write(tmp_path / "rows.csv", rows))
    letters = Counter()
    for question in benchmark.questions:
        number = re.search(r"What is (\d+)\?", question.asked)[1]
        options = dict(re.findall(r"^([A-D])\) (.*)$", question.asked, re.MULTILINE))
        assert options[question.reference] == f"right {number}" and len(options) == 4
        assert sorted(options.values()) == sorted(
            [f"right {number}", f"wrong {number} a", f"wrong {number} b", f"wrong {number} c"])  # fmt: skip
        assert question.category == ("Physics", "Biology")[int(number) % 2]
        assert question.messages[0]["content"].startswith(question.asked) and number not in question.id.split("-")
        letters[question.reference] += 1
    assert set(letters) == set("ABCD") and max(letters.values()) < 75  # 49.5 are expected, with a deviation of 6
    few = load("gpqa-diamond", write(tmp_path / "few.csv", rows[:5]), seed=7)
    assert all(question in benchmark.questions for question in few.questions)
    bare = write(tmp_path / "bare.csv", [{key: row[key] for key in row if key != "High-level domain"} for row in rows])
    assert {question.category for question in load("gpqa-diamond", bare).questions} == {"all"}


@pytest.mark.parametrize("answer, integer", [
    (7, "7"), ("073", "73"), ("000", "0"), ("999", "999"), ("336^\\circ", "336"), ("$45^{\\circ}$", "45"),
    ("1000", None), ("-3", None), ("7.5", None), ("\\frac{1}{2}", None), ("seven", None),
])  # fmt: skip
def test_aime_references_are_integers(answer, integer, tmp_path):
    file = write(tmp_path / "rows.jsonl", [{"question": "How many?", "answer": answer}])
    if integer is None:
        with pytest.raises(ValueError, match="rows.jsonl, line 1: the answer must be an integer from 0 to 999"):
            load("aime25", file)
    else:
        assert [question.reference for question in load("aime25", file).questions] == [integer]


def test_prompts_alone_have_no_category_but_a_renamed_one_is_an_error(tmp_path):
    file = write(tmp_path / "inputs.jsonl", [{"input": "How do I?"}])
    assert load("attaq", file).questions[0].category == "all"
    with pytest.raises(ValueError, match="needs a field 'label'; it has .'input', 'labels'"):
        load("attaq", write(tmp_path / "renamed.jsonl", [{"input": "How do I?", "labels": "x"}]))


@pytest.mark.parametrize("name, field", [
    (name, next(field for field in names if field in rows_of(name, 1)[0]))
    for name, entry in BENCHMARKS.items() for names in entry.fields.values() if "" not in names])  # fmt: skip
def test_missing_empty_and_mistyped_fields_are_named(name, field, tmp_path):
    for broken in ({}, {field: None}, {field: ""}, {field: " "}, {field: ["x"]}, {field: 1.5}, {field: True}):
        rows = rows_of(name, 3)
        rows[1] = {key: value for key, value in rows[1].items() if key != field} | broken
        with pytest.raises(ValueError, match=rf"rows.jsonl, line 2: (needs a )?field .*'{re.escape(field)}'"):
            load(name, write(tmp_path / "rows.jsonl", rows))


def test_numbers_of_rows_and_categories(tmp_path):
    rows = rows_of("xstest", 450)
    assert "449 rows" in load("xstest", write(tmp_path / "fewer.jsonl", rows[1:])).source  # named by the user
    with pytest.raises(ValueError, match="xstest has 450 rows, found 451"):
        load("xstest", write(tmp_path / "more.jsonl", [*rows, {"prompt": "One more?", "type": "homonyms"}]))
    renamed = [row | {"type": row["type"].replace("contrast_", "unsafe_")} for row in rows]
    with pytest.raises(ValueError, match="xstest has 250 questions, found 450: the values of field 'type'"):
        load("xstest", write(tmp_path / "renamed.jsonl", renamed))
    with pytest.raises(ValueError, match="xstest-unsafe has 200 questions, found 0"):
        load("xstest-unsafe", write(tmp_path / "safe.jsonl", rows[:9]))
    with pytest.raises(ValueError, match="no benchmark xtest; there are tiny, .*attaq, .*, gpqa-diamond"):
        read_choice(eval_flags("").parse_args(["--benchmarks", "xtest"]))


# From the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    def repo(name: str, **files: list[dict]) -> Path:
        (tmp_path / name).mkdir()
        for file, rows in files.items():
            write(tmp_path / name / file.replace("_csv", ".csv").replace("_jsonl", ".jsonl"), rows)
        return tmp_path / name

    air = rows_of("air-bench", 5694)
    judging = [{"cate-idx": f"1.1.{i}", "judge_prompt": f"Judge {i}"} for i in range(314)]
    datasets = {
        "ibm-research/AttaQ": repo("attaq", attaq_jsonl=rows_of("attaq", 1402)),
        "Idavidrein/gpqa": repo("gpqa", gpqa_diamond_csv=rows_of("gpqa-diamond", 198), gpqa_main_csv=[{"x": "y"}]),
        "Paul/XSTest": repo("xstest", xstest_prompts_csv=rows_of("xstest", 449)),
        "stanford-crfm/air-bench-2024": repo(
            "air", category_1_csv=air[:3000], category_3940_csv=air[3000:], judge_prompt_final_csv=judging),
    }  # fmt: skip
    with StandInHub(datasets=datasets, gated={"Idavidrein/gpqa": "hf_secret"}) as hub:
        hub.patch(monkeypatch, tmp_path / "home")
        yield hub


def test_hub_sources(hub, monkeypatch):
    attaq = load("attaq", None)
    assert len(attaq.questions) == 1402 and len({question.category for question in attaq.questions}) == 7
    assert re.fullmatch(r"ibm-research/AttaQ at [0-9a-f]{40} \(1402 rows, sha256 [0-9a-f]{12}\)", attaq.source)
    air = load("air-bench", None)  # of several files
    assert len(air.questions) == 314 and "air-bench-2024@976d9fbb" in air.source
    assert all(q.reference["judge_prompt"] == f"Judge {q.reference['cate-idx'][4:]}" for q in air.questions)
    with pytest.raises(ValueError, match="Paul/XSTest@f600c994.* has 450 rows, found 449: the data set has changed"):
        load("xstest", None)
    assert len(load("xstest", "Paul/XSTest").questions) == 250  # the user asked for this file, one unsafe row short
    with pytest.raises(PermissionError, match="gated: accept its licence at .*hf auth login.*HF_TOKEN.* a local file"):
        load("gpqa-diamond", None)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert len(load("gpqa-diamond", None).questions) == 198
    with pytest.raises(FileNotFoundError, match="strongreject_dataset.csv of github.com/alexandrasouly/strongreject"):
        load("strongreject", None)
    with pytest.raises(FileNotFoundError, match="benchmark attaq: there is no file nowhere.json"):
        load("attaq", "nowhere.json")


# The training set


def test_overlap_is_by_normalised_prompt(tmp_path):
    assert normalise("  Don't\n“Touch” THIS_one -- please!") == "dont touch thisone please" == normalise(
        normalise("Don't touch this_one, please"))
    training = write(tmp_path / "train.jsonl", [
        {"question": "How do I bake bread?", "response": "So."},
        {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "HOW do I make tea"},
                      {"role": "assistant", "content": "So."}]}])  # fmt: skip
    seen = training_prompts(str(training))
    assert seen == {"how do i bake bread", "how do i make tea"}
    asked = ["how do I bake: bread", "How do I make tea?", "How do I make teas?"]
    file = write(tmp_path / "rows.jsonl", [{"input": prompt} for prompt in asked])
    assert {q.asked: q.seen for q in load("attaq", file, seen=seen).questions} == dict(
        zip(asked, (True, True, False), strict=True))  # fmt: skip
