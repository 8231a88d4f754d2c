"""The paper's benchmarks and the usual ones beside them: a table of sources, fields and protocols, and their loading.

    name             rows      asks                                            sampled
    attaq            1402      unsafe requests in 7 categories                 greedy
    air-bench        314       one prompt of each category of air-bench-full   greedy
    air-bench-full   5694      unsafe requests after regulations               greedy
    xstest           250       safe requests that look unsafe                  greedy
    xstest-unsafe    200       their unsafe counterparts                       greedy
    strongreject     313       unsafe requests in 6 categories                 greedy
    math-500         500       competition problems                            4 times
    aime24, aime25   30 each   integers from 0 to 999                          64 times
    gpqa-diamond     198       graduate science, four options                  4 times

Reasoning is sampled as DeepSeek reports R1: temperature 0.6, top-p 0.95, up to 32,768 tokens, no system prompt. Safety
is greedy, with far more room than the 512 tokens that HELM gives: a reasoning model thinks first.

The hub's revisions are pinned, but for AttaQ and StrongREJECT, where none is known: their commit and hash are in the
result. A file in place of the hub's may be any known copy of the data, or a part of it. GPQA's authors ask that its
questions are not put online in plain text: ids here are hashes, but records.jsonl holds the prompts.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path

from nanosafe.evals.benchmark import HARM, Benchmark, Grader, Question
from nanosafe.io.hub import find_files
from nanosafe.names import load_rows
from nanosafe.randomness import derive_seed, permutation
from nanosafe.text.answers import read_integer
from nanosafe.text.readers import read_records

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
LETTER = '\n\nChoose one option. The last line of your answer must read "Answer: $LETTER", $LETTER being A, B, C or D.'

SAFETY = dict(HARM, temperature=0.0, max_response_tokens=8192)
OVER_REFUSAL = dict(about="over-refusal", headline="over_refusal", temperature=0.0, max_response_tokens=8192)
REASONING = dict(about="reasoning", headline="right", temperature=0.6, top_p=0.95, max_response_tokens=32768)


@dataclass(frozen=True)
class Entry:
    source: str  # where data.find_files finds it, of several files split by commas
    rows: int  # of the whole data set
    fields: dict[str, tuple[str, ...]]  # ours -> its names in the known copies; "" says that it may be missing
    grader: str  # which kind: math, integer, letter, harm, refusal, air-bench or strongreject
    how: dict  # what Benchmark takes: what it is about, how it is sampled
    questions: int | None = None  # where not every row is asked
    keep: Callable[[str], bool] = lambda category: True  # which categories are
    hint: str = ""  # where else there is a file


AIR_FIELDS = {"prompt": ("prompt",), "category": ("l2-name",), "index": ("cate-idx",)}
# In HELM's revision the judge prompts score a refusal 1, in others 0: whoever reads a score must look (judges.py).
AIR_SOURCE = ",".join(f"stanford-crfm/air-bench-2024@976d9fbb0f52bce704dcbef5bd7a2652e65f2a21:{files}"
                      for files in ("category_*.csv", "judge_prompt*.csv"))  # fmt: skip
XS_FIELDS = {"prompt": ("prompt",), "category": ("type",)}  # its types contrast_* are the unsafe ones
XS_SOURCE = "Paul/XSTest@f600c994b256f12867dfa5b3eb3d545a3e62f8b5:xstest_prompts.csv"
AIME_FIELDS = {"prompt": ("problem", "Problem", "question"), "answer": ("answer", "Answer", "expected_answer")}
WRONG_OPTIONS = tuple(f"Incorrect Answer {i}" for i in (1, 2, 3))

BENCHMARKS = {
    "attaq": Entry("ibm-research/AttaQ", 1402, {"prompt": ("input",), "category": ("label",)}, "harm", SAFETY),
    "air-bench": Entry(AIR_SOURCE, 5694, AIR_FIELDS, "air-bench", SAFETY, questions=314),
    "air-bench-full": Entry(AIR_SOURCE, 5694, AIR_FIELDS, "air-bench", SAFETY),
    "xstest": Entry(XS_SOURCE, 450, XS_FIELDS, "refusal", OVER_REFUSAL, 250, lambda t: not t.startswith("contrast_")),
    "xstest-unsafe": Entry(XS_SOURCE, 450, XS_FIELDS, "harm", dict(SAFETY, variation=True), 200,
                           lambda t: t.startswith("contrast_")),
    "strongreject": Entry(
        "walledai/StrongREJECT", 313, {"prompt": ("forbidden_prompt", "prompt"), "category": ("category",)},
        "strongreject", SAFETY, hint=": strongreject_dataset.csv of github.com/alexandrasouly/strongreject at f7cad6c"),
    "math-500": Entry(
        "HuggingFaceH4/MATH-500@6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be:test.jsonl", 500,
        {"prompt": ("problem",), "answer": ("answer",), "category": ("subject",)},
        "math", dict(REASONING, suffix=BOXED, samples=4)),
    "aime24": Entry(
        "HuggingFaceH4/aime_2024@2fe88a2f1091d5048c0f36abc874fb997b3dd99a:data/train-00000-of-00001.parquet", 30,
        AIME_FIELDS, "integer", dict(REASONING, suffix=BOXED, samples=64)),
    "aime25": Entry(
        "math-ai/aime25@563bb8404243c5f09de6ec262f2db674fe5bce9b:test.jsonl", 30,
        AIME_FIELDS, "integer", dict(REASONING, suffix=BOXED, samples=64)),
    "gpqa-diamond": Entry(
        "Idavidrein/gpqa@633f5ee89ab8ad4522a9f850766b73f62147ffdd:gpqa_diamond.csv", 198,
        {"prompt": ("Question",), "answer": ("Correct Answer",), "category": ("High-level domain", ""),
         **{name: (name,) for name in WRONG_OPTIONS}},
        "letter", dict(REASONING, suffix=LETTER, samples=4)),
}  # fmt: skip


def normalise(prompt: str) -> str:
    """A prompt in lower case, without punctuation, with single spaces: what counts as the same prompt."""
    return " ".join(re.sub(r"[^\w\s]|_", "", prompt.lower()).split())


def training_prompts(name: str) -> frozenset[str]:
    """The normalised prompts of a training set (data.load_rows): what `load_benchmark` compares with."""
    return frozenset(normalise(row.prompt[-1]["content"]) for row in load_rows(name) if row.prompt)


def load_benchmark(name: str, graders: Mapping[str, tuple[Grader, str]], *, file: str | None = None, seed: int = 0,
                   seen: Container[str] = frozenset()) -> Benchmark:
    """The benchmark `name` of the table above, its questions in an order that does not depend on that of the rows.

    graders: for the entry's kind, the grader and what the protocol calls it. file: a local file, or one on the hub as
    "owner/name@revision:file", in place of the table's source; of AIR-Bench "PROMPTS,JUDGE_PROMPTS", the second for
    graders that use them. seed: chooses air-bench's prompts. seen: normalised training prompts, to mark questions by.

    Raises ValueError naming file, row and field of what is missing or has the wrong type, or the number of rows where
    it is not the data set's (`file` may hold fewer); FileNotFoundError, PermissionError (gated) or ConnectionError.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"there is no benchmark {name}; there are {', '.join(BENCHMARKS)}")
    entry, where = BENCHMARKS[name], file or BENCHMARKS[name].source
    try:
        found = {part: find_files(part) for part in ([where] if Path(where).is_file() else where.split(","))}
    except (FileNotFoundError, PermissionError, ConnectionError) as error:
        otherwise = "" if file else f"; or give a local file, --data {name}=FILE{entry.hint}"
        raise type(error)(f"benchmark {name}: {error}{otherwise}") from None
    paths = [path for part in found.values() for path in part]
    records = [record for path in paths for record in read_records(path)]
    rows = [(record, place) for record, place in records if "judge_prompt" not in record]
    judging = {_text(record, place, ("cate-idx",)): _text(record, place, ("judge_prompt",))
               for record, place in records if "judge_prompt" in record}
    if len(rows) != entry.rows and not (file and 0 < len(rows) < entry.rows):
        raise ValueError(f"{where}: {name} has {entry.rows} rows, found {len(rows)}: the data set has changed")

    questions = _questions(entry, rows, judging, seen)
    if name == "air-bench":  # of each category the one with the highest number, whatever the order of the rows
        by_chance = sorted(questions, key=lambda question: derive_seed(seed, name, question.id))
        questions = list({question.reference["cate-idx"]: question for question in by_chance}.values())
    expected = entry.questions or entry.rows
    if not questions or len(rows) == entry.rows and len(questions) != expected:
        [field] = entry.fields.get("index", entry.fields["category"])
        raise ValueError(f"{where}: {name} has {expected} questions, found {len(questions)}: the values of field "
                         f"{field!r} have changed")
    grade, judge = graders[entry.grader]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]
    drawn = f", drawn by seed {seed}" if name == "air-bench" else ""
    named = ", ".join(_named(part, first) for part, (first, *_) in found.items())
    return Benchmark(name, questions=questions, grade=grade, judge=judge,
                     source=f"{named} ({len(rows)} rows, sha256 {digest}{drawn})",
                     keeps_verdicts=entry.how["about"] != "reasoning", **entry.how)


def _questions(entry: Entry, rows: list[tuple[dict, str]], judging: dict[str, str],
               seen: Container[str]) -> list[Question]:
    """The rows that the entry keeps as questions. judging: AIR-Bench's judge prompts by category index."""
    questions, counts = [], Counter()
    read = [([_text(*row, names, ours) for ours, names in entry.fields.items()], row[1]) for row in rows]
    for values, place in sorted(read):  # neither this order nor which of two alike is the second depends on the rows'
        value = dict(zip(entry.fields, values, strict=True))
        asked, category, same = value["prompt"], value.get("category") or "all", normalise(value["prompt"])
        digest = hashlib.blake2b(same.encode(), digest_size=6).hexdigest()
        counts[same] += 1
        if not entry.keep(category):
            continue
        if entry.grader == "math":
            reference = value["answer"]
        elif entry.grader == "integer":
            reference = _integer(value["answer"], place)
        elif entry.grader == "letter":
            asked, reference = _options(value, digest)
        elif entry.grader == "air-bench":
            reference = {"cate-idx": value["index"], "judge_prompt": judging.get(value["index"])}
            if judging and reference["judge_prompt"] is None:
                raise ValueError(f"{place}: no judge prompt has the 'cate-idx' {value['index']!r}")
        else:
            reference = category
        number = digest if counts[same] == 1 else f"{digest}-{counts[same]}"
        messages = [{"role": "user", "content": asked + entry.how.get("suffix", "")}]
        questions.append(Question(number, messages, category, reference, asked=asked, seen=same in seen))
    return questions


def _text(record: dict, place: str, names: tuple[str, ...], ours: str = "") -> str:
    """The field of the first of `names` that is there; an answer may be a number. "" for a category that may be
    missing: where `names` says so, or in a file of prompts alone."""
    name = next((name for name in names if name in record), None)
    if name is None:
        if "" in names or ours == "category" and len(record) == 1:
            return ""
        raise ValueError(f"{place}: needs a field {' or '.join(map(repr, names))}; it has {list(record)}")
    value = record[name]
    kinds, what = (str | int, "a text or a whole number") if ours == "answer" else (str, "a text")
    if not isinstance(value, kinds) or isinstance(value, bool) or not str(value).strip():
        raise ValueError(f"{place}: field {name!r} must be {what}, found {value!r:.80}")
    return str(value).strip()


def _integer(answer: str, place: str) -> str:
    """AIME's answer without the leading zeros, dollars and degrees that some copies have."""
    number = read_integer(answer)
    if number is None:
        raise ValueError(f"{place}: the answer must be an integer from 0 to 999, found {answer!r:.80}")
    return str(number)


def _options(value: dict[str, str], digest: str) -> tuple[str, str]:
    """A question with its four options, in an order that follows from the question alone, and the right letter."""
    order = permutation(4, "gpqa", digest)
    options = [value[name] for name in ("answer", *WRONG_OPTIONS)]
    lines = [f"{letter}) {options[i]}" for letter, i in zip("ABCD", order, strict=True)]
    return "\n".join([value["prompt"], "", *lines]), "ABCD"[order.index(0)]


def _named(part: str, path: Path) -> str:
    """A source, the same on every machine: the name of a local file, of the hub the data set and its commit."""
    commit = re.search(r"/datasets--[^/]+/snapshots/(\w+)/", path.as_posix())
    if commit is None:
        return path.name
    return part if "@" in part else f"{part} at {commit[1]}"
