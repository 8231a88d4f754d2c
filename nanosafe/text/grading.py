"""Graders without a model: whether an answer is right, or refuses; all look past the thought.

Answers have three kinds: "math" (MATH-500, rule:math), "integer" (AIME) and "letter" (GPQA).
answers.py reads what an answer says; here it is compared with the reference. Maths goes through
math-verify, what the field uses, in processes that are killed when they are late: sympy can run for
ever on a short answer such as 9^{9^{9^9}}.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from queue import LifoQueue

from nanosafe.io.machine import available_cores
from nanosafe.io.worker import Worker, WorkerError
from nanosafe.text.answers import (
    answer_formula,
    answer_integer,
    answer_letter,
    reference_formula,
    says_less,
)
from nanosafe.text.thoughts import split_thought

MEMORY_BYTES = 1 << 30

# (of a reference, of an answer) -> what it says, None for nothing
READERS = {
    "math": (reference_formula, answer_formula),
    "integer": (answer_integer, answer_integer),
    "letter": (answer_letter, answer_letter),
}


def grade_answer(kind: str, response: str, reference: object) -> float:
    """1.0 if a whole response, with its thought, is right, else 0.0; see grade_answers."""
    return grade_answers(kind, [response], [reference])[0]


def grade_answers(kind: str, responses: Sequence[str], references: Sequence) -> list[float]:
    """1.0 for each response whose answer equals its reference, else 0.0.

    kind: "math" (references are LaTeX or plain text), "integer" (0 to 999), "letter" ("A" to "D").
    A response without an answer is wrong. Raises ValueError for another kind and for a reference
    that cannot be read.
    """
    if kind not in READERS:
        raise ValueError(f"there is no answer of the kind {kind!r}; there are {', '.join(READERS)}")
    read_reference, read_answer = READERS[kind]
    golds = [read_reference(str(reference)) for reference in references]
    answers = [read_answer(split_thought(response)[1].strip()) for response in responses]
    pairs = list(zip(golds, answers, strict=True))
    right = math_grader()(pairs) if kind == "math" else [gold == said for gold, said in pairs]
    for reference, gold, verdict in zip(references, golds, right, strict=True):
        if gold is None or verdict is None:
            raise ValueError(f"cannot read the reference answer {reference!r:.80}")
    return [float(verdict) for verdict in right]


def readable(references: Sequence[str]) -> list[bool]:
    """Whether math-verify can read each reference of the kind "math": an answer can equal no other."""
    golds = [reference_formula(reference) for reference in references]
    verdicts = math_grader()([(gold, gold) for gold in golds])
    return [gold is not None and verdict is not None for gold, verdict in zip(golds, verdicts, strict=True)]


class MathGrader:
    """Whether formulas as answers.py reads them are equal, by math-verify.

    seconds: wall clock of one comparison; late, crashed and unreadable answers are wrong.
    processes: how many compare at a time, as many as there are cores if None; each starts when it
    is first needed (2 seconds). Equal pairs are compared once. A batch takes at most (different
    pairs / processes) * (seconds + a start): with two processes and 5 seconds, about 3.5 seconds
    for each answer that is built to never end, 10 ms for each other one.
    """

    def __init__(self, seconds: float = 5.0, processes: int | None = None):
        path = Path(__file__).with_name("math_worker.py")
        self.workers = [Worker(path, seconds=seconds, memory_bytes=MEMORY_BYTES)
                        for _ in range(processes or available_cores())]  # fmt: skip
        self.idle = LifoQueue()  # the last one used comes first: single answers need one process
        for worker in self.workers:
            self.idle.put(worker)

    def __call__(self, pairs: Sequence[tuple[str | None, str | None]]) -> list[bool | None]:
        """(reference, answer) -> whether they are equal; None if the reference cannot be read."""
        read = [pair for pair in dict.fromkeys(pairs) if None not in pair]
        different = [pair for pair in read if not says_less(*pair)]
        with ThreadPoolExecutor(len(self.workers)) as threads:
            verdicts = dict(zip(different, threads.map(self._compare, different), strict=True))
        return [verdicts.get(pair, False) for pair in pairs]

    def _compare(self, pair: tuple[str, str]) -> bool | None:
        worker = self.idle.get()
        try:
            return worker.call(pair)
        except WorkerError:
            return False
        finally:
            self.idle.put(worker)


math_grader = cache(MathGrader)  # one for the process: rewards and evals share its workers
