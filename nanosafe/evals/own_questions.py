"""Questions of one's own: any file with a column of prompts becomes a benchmark.

HarmBench's `Behavior`, AdvBench's `goal` and many others are found by name; --columns names the rest. What the
questions are about decides how they are sampled and graded, as it does for the paper's benchmarks.
"""

from pathlib import Path

from nanosafe.evals.benchmark import BOXED, slug
from nanosafe.evals.paper_suite import BENCHMARKS, OVER_REFUSAL, REASONING, SAFETY, Entry
from nanosafe.io.hub import DATA_SUFFIXES

# The names under which data sets have their columns, most telling first; "": it may be missing.
COLUMNS = {
    "prompt": ("prompt", "Behavior", "behavior", "goal", "Goal", "forbidden_prompt", "question", "Question",
               "problem", "request", "instruction", "input", "text"),
    "category": ("category", "Category", "SemanticCategory", "subject", "type", "label", ""),
    "answer": ("answer", "Answer", "reference", "final_answer"),
}
KINDS = {"safety": ("harm", SAFETY), "over-refusal": ("refusal", OVER_REFUSAL),
         "reasoning": ("math", dict(REASONING, suffix=BOXED))}


def is_question_file(name: str) -> bool:
    """Whether a name given to --benchmarks is that of a file, here or on the hub."""
    return Path(name).suffix in DATA_SUFFIXES


def own_benchmark(file: str, about: str, columns: dict[str, str]) -> tuple[str, Entry]:
    """The name of a file's questions in tables, and how they are read, sampled and graded.

    about: safety, over-refusal or reasoning. columns: the file's names for prompt, category and answer, where they are
    not among the known ones. Raises ValueError for a file that is called like one of the paper's benchmarks.
    """
    name = slug(Path(file).stem).lower()
    if name in BENCHMARKS:
        raise ValueError(f"--benchmarks {file}: {name} is one of the paper's benchmarks; for another copy "
                         f"of its data use --data {name}={file}, else rename the file")
    fields = {column: names for column, names in COLUMNS.items() if column != "answer" or about == "reasoning"}
    for column, given in columns.items():
        fields[column] = (given,)
    grader, options = KINDS[about]
    return name, Entry(file, None, fields, grader, options)


def read_columns(pairs: list[str]) -> dict[str, str]:
    """--columns prompt=goal category=Topic as a dict; raises ValueError for another form."""
    columns = {}
    for pair in pairs:
        column, _, name = pair.partition("=")
        if column not in COLUMNS or not name:
            raise ValueError(f"--columns {pair}: give COLUMN=NAME, COLUMN one of {', '.join(COLUMNS)}")
        columns[column] = name
    return columns
