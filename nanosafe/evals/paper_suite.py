"""The paper's benchmarks and the usual ones beside them: sources, fields, protocols, loading.

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

Reasoning is sampled as DeepSeek reports R1: temperature 0.6, top-p 0.95, up to 32,768 tokens, no
system prompt. Safety is greedy, with far more room than the 512 tokens that HELM gives: a reasoning
model thinks first.

The hub's revisions are pinned, but for AttaQ and StrongREJECT, where none is known: their commit
and hash are in the result. A file in place of the hub's may be any known copy of the data, or a part
of it. GPQA's authors ask that its questions are not put online in plain text: ids here are hashes,
but records.jsonl holds the prompts.
"""

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nanosafe.evals.benchmark import BOXED, HARM, LETTER, Benchmark, Question
from nanosafe.evals.graders import AnswerGrader, NamedGrader, RefusalGrader, SideBySide, judge_graders
from nanosafe.evals.judges import load_judge
from nanosafe.io.hub import find_files
from nanosafe.names import load_rows
from nanosafe.randomness import derive_seed, permutation
from nanosafe.recipes import RECIPES
from nanosafe.text.answers import read_integer
from nanosafe.text.readers import read_records

# What a model is asked by default; XSTest is there since safety is never shown alone.
PAPER = ("attaq", "air-bench", "xstest", "math-500", "aime24", "aime25", "gpqa-diamond")
DEFAULT_JUDGE = "granite-guardian"
NEED_A_JUDGE = ("harm", "air-bench", "strongreject")  # kinds of grader
TRAINING_SET = RECIPES["sft"]["data"]

# Keyword arguments of Benchmark.
SAFETY = dict(HARM, temperature=0.0, max_response_tokens=8192, keeps_verdicts=True)
OVER_REFUSAL = dict(about="over-refusal", headline="over_refusal", temperature=0.0,
                    max_response_tokens=8192, keeps_verdicts=True)
REASONING = dict(about="reasoning", headline="right", temperature=0.6, top_p=0.95,
                 max_response_tokens=32768)

@dataclass(frozen=True)
class Entry:
    source: str  # where hub.find_files finds it, of several files split by commas
    rows: int | None  # of the whole data set; None: any number
    fields: dict[str, tuple[str, ...]]  # field -> its names in known copies; "": it may be missing
    grader: str  # which kind: math, integer, letter, harm, refusal, air-bench or strongreject
    benchmark: dict  # what it is about and how it is sampled
    questions: int | None = None  # where not every row is asked
    contrast: bool | None = None  # of XSTest, whose types contrast_* are the unsafe ones
    hint: str = ""  # where else there is a file


@dataclass
class Data:
    """What the files of a benchmark hold."""

    source: str  # for the protocol
    digest: str
    rows: list[tuple[dict, str]]  # each with its place in its file
    judge_prompts: dict[str, str]  # AIR-Bench's, by the category's index


ATTAQ_FIELDS = {"prompt": ("input",), "category": ("label",)}
AIR_FIELDS = {"prompt": ("prompt",), "category": ("l2-name",), "index": ("cate-idx",)}
# In HELM's revision the judge prompts score a refusal 1, in others 0 (see rubrics.polarity).
AIR = "stanford-crfm/air-bench-2024@976d9fbb0f52bce704dcbef5bd7a2652e65f2a21"
AIR_SOURCE = f"{AIR}:category_*.csv,{AIR}:judge_prompt*.csv"
XS_FIELDS = {"prompt": ("prompt",), "category": ("type",)}
XS_SOURCE = "Paul/XSTest@f600c994b256f12867dfa5b3eb3d545a3e62f8b5:xstest_prompts.csv"
STRONGREJECT_FIELDS = {"prompt": ("forbidden_prompt", "prompt"), "category": ("category",)}
STRONGREJECT_FILE = "strongreject_dataset.csv of github.com/alexandrasouly/strongreject at f7cad6c"
MATH_SOURCE = "HuggingFaceH4/MATH-500@6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be:test.jsonl"
MATH_FIELDS = {"prompt": ("problem",), "answer": ("answer",), "category": ("subject",)}
AIME24_SOURCE = ("HuggingFaceH4/aime_2024@2fe88a2f1091d5048c0f36abc874fb997b3dd99a:"
                 "data/train-00000-of-00001.parquet")
AIME25_SOURCE = "math-ai/aime25@563bb8404243c5f09de6ec262f2db674fe5bce9b:test.jsonl"
AIME_FIELDS = {"prompt": ("problem", "Problem", "question"),
               "answer": ("answer", "Answer", "expected_answer")}
GPQA_SOURCE = "Idavidrein/gpqa@633f5ee89ab8ad4522a9f850766b73f62147ffdd:gpqa_diamond.csv"
WRONG_OPTIONS = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
GPQA_FIELDS = {"prompt": ("Question",), "answer": ("Correct Answer",),
               "category": ("High-level domain", "")}
GPQA_FIELDS |= {name: (name,) for name in WRONG_OPTIONS}

UNSAFE_VARIATION = dict(SAFETY, variation=True)
FOUR_TIMES, AIME = dict(REASONING, samples=4), dict(REASONING, suffix=BOXED, samples=64)

BENCHMARKS = {
    "attaq": Entry("ibm-research/AttaQ", 1402, ATTAQ_FIELDS, "harm", SAFETY),
    "air-bench": Entry(AIR_SOURCE, 5694, AIR_FIELDS, "air-bench", SAFETY, questions=314),
    "air-bench-full": Entry(AIR_SOURCE, 5694, AIR_FIELDS, "air-bench", SAFETY),
    "xstest": Entry(XS_SOURCE, 450, XS_FIELDS, "refusal", OVER_REFUSAL, 250, contrast=False),
    "xstest-unsafe": Entry(XS_SOURCE, 450, XS_FIELDS, "harm", UNSAFE_VARIATION, 200, contrast=True),
    "strongreject": Entry("walledai/StrongREJECT", 313, STRONGREJECT_FIELDS, "strongreject", SAFETY,
                          hint=f": {STRONGREJECT_FILE}"),
    "math-500": Entry(MATH_SOURCE, 500, MATH_FIELDS, "math", dict(FOUR_TIMES, suffix=BOXED)),
    "aime24": Entry(AIME24_SOURCE, 30, AIME_FIELDS, "integer", AIME),
    "aime25": Entry(AIME25_SOURCE, 30, AIME_FIELDS, "integer", AIME),
    "gpqa-diamond": Entry(GPQA_SOURCE, 198, GPQA_FIELDS, "letter", dict(FOUR_TIMES, suffix=LETTER)),
}  # fmt: skip


def load_graders(entries: Mapping[str, Entry], judges: Sequence[str] | None, *, device: torch.device,
                 dtype: torch.dtype, bounds: tuple[float, float] | None = None) -> dict[str, NamedGrader]:
    """The graders for benchmarks, by kind.

    judges: specs of load_judge, the first for the headline figures (None: Granite Guardian, where a
    benchmark cannot do without); the other arguments are load_judge's too. Raises what that raises.
    """
    graders = {kind: AnswerGrader(kind) for kind in ("math", "integer", "letter")}
    graders["refusal"] = RefusalGrader()
    if not judges and any(entry.grader in NEED_A_JUDGE for entry in entries.values()):
        judges = [DEFAULT_JUDGE]
    by_kind: dict[str, list[NamedGrader]] = {}
    for spec in judges or ():
        judge = load_judge(spec, device=device, dtype=dtype, bounds=bounds)
        for kind, grader in judge_graders(judge).items():
            by_kind.setdefault(kind, []).append(grader)
    for kind, several in by_kind.items():
        graders[kind] = SideBySide(several)
    return graders


def load_benchmarks(entries: Mapping[str, Entry], graders: Mapping[str, NamedGrader], *,
                    files: Mapping[str, str], training: str | None, seed: int) -> list[Benchmark]:
    """Benchmarks by their entries in the table above, or in the form of such.

    files: in place of the entries' sources. training: SFT data whose prompts are left out of the
    headline figures, or "none" (None: TRAINING_SET). Raises what load_benchmark raises.
    """
    # Safety's training data hold no problems of reasoning.
    harmful = []
    for name, entry in entries.items():
        if entry.benchmark["about"] != "reasoning":
            harmful.append(name)
    own = [name for name in entries if name not in BENCHMARKS]
    seen = seen_prompts(harmful, [*files, *own], training)
    benchmarks = []
    for name, entry in entries.items():
        benchmarks.append(load_benchmark(name, entry, graders, file=files.get(name), seed=seed, seen=seen))
    return benchmarks


def seen_prompts(names: Sequence[str], own: Sequence[str], training: str | None) -> frozenset[str]:
    """The normalised prompts of the training set, for the benchmarks `names`. The default one, if the
    hub is out of reach, is done without where the data of all are the user's `own`."""
    if not names or training == "none":
        return frozenset()
    try:
        return training_prompts(training or TRAINING_SET)
    except ConnectionError as error:
        if training or set(names) - set(own):
            raise
        warning = "warning: no question is left out for being a training prompt:"
        print(warning, error, file=sys.stderr)
        return frozenset()


def training_prompts(name: str) -> frozenset[str]:
    """The normalised prompts of a training set (names.load_rows)."""
    return frozenset(normalise(row.prompt[-1]["content"]) for row in load_rows(name) if row.prompt)


def normalise(prompt: str) -> str:
    """A prompt in lower case, without punctuation, with single spaces: what makes prompts equal."""
    return " ".join(re.sub(r"[^\w\s]|_", "", prompt.lower()).split())


def load_benchmark(name: str, entry: Entry, graders: Mapping[str, NamedGrader], *, file: str | None = None,
                   seed: int = 0, seen: Container[str] = frozenset()) -> Benchmark:
    """A benchmark, its questions in an order of their own.

    graders: by the entry's kind. file: in place of the entry's source, a local file or one on the
    hub, "owner/name@revision:file"; of AIR-Bench "PROMPTS,JUDGE_PROMPTS", the second for graders
    that use them. seed: chooses air-bench's prompts. seen: training prompts, normalised, which mark
    questions.

    Raises ValueError naming file, row and field of what is missing or has the wrong type, or the
    number of rows where it is not the data set's (`file` may hold fewer), and for questions that
    the grader cannot grade; FileNotFoundError, PermissionError (gated) or ConnectionError.
    """
    source = file or entry.source
    try:
        data = _read_data(source)
    except (FileNotFoundError, PermissionError, ConnectionError) as error:
        replaceable = name in BENCHMARKS and not file
        otherwise = f"; or give a local file, --data {name}=FILE{entry.hint}" if replaceable else ""
        raise type(error)(f"benchmark {name}: {error}{otherwise}") from None
    rows = len(data.rows)
    whole = entry.rows or rows
    if rows != whole and not (file and 0 < rows < whole):
        raise ValueError(f"{source}: {name} has {entry.rows} rows, found {rows}: the data set has changed")
    questions = _questions(entry, data, seen)
    drawn = ""
    if name == "air-bench":
        questions = _one_of_each_category(questions, seed)
        drawn = f", drawn by seed {seed}"
    expected = entry.questions or whole
    if not questions or (rows == whole and len(questions) != expected):
        [column] = entry.fields.get("index", entry.fields["category"])
        raise ValueError(f"{source}: {name} has {expected} questions, found {len(questions)}: the "
                         f"values of field {column!r} have changed")
    grader = graders[entry.grader]
    grader.check(questions)
    return Benchmark(name, questions=questions, grade=grader, judge=grader.name,
                     source=f"{data.source} ({rows} rows, sha256 {data.digest}{drawn})",
                     **entry.benchmark)


def _read_data(source: str) -> Data:
    names, paths = [], []
    for part in [source] if Path(source).is_file() else source.split(","):
        files = find_files(part)
        names.append(_source_name(part, files[0]))
        paths += files
    rows, judge_prompts, digest = [], {}, hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
        for record, place in read_records(path):
            if "judge_prompt" in record:
                index = _text(record, place, ("cate-idx",))
                judge_prompts[index] = _text(record, place, ("judge_prompt",))
            else:
                rows.append((record, place))
    return Data(", ".join(names), digest.hexdigest()[:12], rows, judge_prompts)


def _one_of_each_category(questions: list[Question], seed: int) -> list[Question]:
    """Of each AIR-Bench category the question with the highest number drawn by the seed."""
    questions = sorted(questions, key=lambda each: derive_seed(seed, "air-bench", each.id))
    return list({question.reference["cate-idx"]: question for question in questions}.values())


def _questions(entry: Entry, data: Data, seen: Container[str]) -> list[Question]:
    """The rows that the entry keeps as questions."""
    read = []
    for record, place in data.rows:
        values = [_text(record, place, names, field) for field, names in entry.fields.items()]
        read.append((values, place))
    questions, counts = [], Counter()
    # Neither this order nor which of two alike is the second depends on the order of the rows.
    for values, place in sorted(read):
        value = dict(zip(entry.fields, values, strict=True))
        asked, category = value["prompt"], value.get("category") or "all"
        normalised = normalise(asked)
        digest = hashlib.blake2b(normalised.encode(), digest_size=6).hexdigest()
        counts[normalised] += 1
        if entry.contrast is not None and category.startswith("contrast_") != entry.contrast:
            continue
        reference = category
        if entry.grader == "math":
            reference = value["answer"]
        elif entry.grader == "integer":
            reference = _integer(value["answer"], place)
        elif entry.grader == "letter":
            asked, reference = _options(value, digest)
        elif entry.grader == "air-bench":
            index = value["index"]
            if data.judge_prompts and index not in data.judge_prompts:
                raise ValueError(f"{place}: no judge prompt has the 'cate-idx' {index!r}")
            reference = {"cate-idx": index, "judge_prompt": data.judge_prompts.get(index)}
        question_id = digest if counts[normalised] == 1 else f"{digest}-{counts[normalised]}"
        messages = [{"role": "user", "content": asked + entry.benchmark.get("suffix", "")}]
        questions.append(Question(question_id, messages, category, reference, asked=asked,
                                  seen=normalised in seen))
    return questions


def _text(record: dict, place: str, names: tuple[str, ...], field: str = "") -> str:
    """The field of the first of `names` that is there; an answer may be a number. "" for a category
    that may be missing: where `names` says so, or in a file of prompts alone."""
    present = [name for name in names if name in record]
    if not present:
        if "" in names or (field == "category" and len(record) == 1):
            return ""
        wanted = " or ".join(map(repr, names))
        raise ValueError(f"{place}: needs a field {wanted}; it has {list(record)}")
    value, kinds, what = record[present[0]], str, "a text"
    if field == "answer":
        kinds, what = str | int, "a text or a whole number"
    if not isinstance(value, kinds) or isinstance(value, bool) or not str(value).strip():
        raise ValueError(f"{place}: field {present[0]!r} must be {what}, found {value!r:.80}")
    return str(value).strip()


def _integer(answer: str, place: str) -> str:
    """AIME's answer without the leading zeros, dollars and degrees that some copies have."""
    number = read_integer(answer)
    if number is None:
        raise ValueError(f"{place}: the answer must be an integer from 0 to 999, found "
                         f"{answer!r:.80}")
    return str(number)


def _options(value: dict[str, str], digest: str) -> tuple[str, str]:
    """A question with its four options, in an order that follows from the question's digest alone,
    and the right letter."""
    options = [value[name] for name in ("answer", *WRONG_OPTIONS)]
    order = permutation(4, "gpqa", digest)
    lines = [value["prompt"], ""]
    for letter, i in zip("ABCD", order, strict=True):
        lines.append(f"{letter}) {options[i]}")
    return "\n".join(lines), "ABCD"[order.index(0)]


def _source_name(part: str, path: Path) -> str:
    """A source, the same on every machine: a local file's name, or the data set and its commit."""
    commit = re.search(r"/datasets--[^/]+/snapshots/(\w+)/", path.as_posix())
    if commit is None:
        return path.name
    return part if "@" in part else f"{part} at {commit[1]}"
