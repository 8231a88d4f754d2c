"""Graders without a model: whether the answer of a response is right, whatever its thought says.

Answers have three kinds: "math" (MATH-500, rule:math), "integer" (AIME) and "letter" (GPQA). answers.py reads what an
answer says; here it is compared with the reference. Maths goes through math-verify, what the field uses, in processes
that are killed when they are late: sympy can run for ever on a short answer such as 9^{9^{9^9}}.
"""

import os
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
    differs_in_form,
    reference_formula,
)
from nanosafe.text.thoughts import split_thought

MEMORY_BYTES = 1 << 30

# kind -> what reads a reference and what reads an answer; both give None for nothing
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
    pairs = []
    for response, reference in zip(responses, references, strict=True):
        _, answer = split_thought(response)
        pairs.append((read_reference(str(reference)), read_answer(answer.strip())))
    verdicts = math_grader()(pairs) if kind == "math" else list(map(_equal, pairs))
    for reference, verdict in zip(references, verdicts, strict=True):
        if verdict is None:
            raise ValueError(f"cannot read the reference answer {reference!r:.80}")
    return list(map(float, verdicts))


def _equal(pair: tuple) -> bool | None:
    reference, answer = pair
    return None if reference is None else reference == answer


def readable(references: Sequence[str]) -> list[bool]:
    """Whether math-verify can read each reference of the kind "math"; no answer equals one that it cannot."""
    formulas = list(map(reference_formula, references))
    verdicts = math_grader()(list(zip(formulas, formulas, strict=True)))
    return [verdict is not None for verdict in verdicts]


class MathGrader:
    """Whether formulas as answers.py reads them are equal, by math-verify.

    seconds: wall clock of one comparison; late, crashed and unreadable answers are wrong.
    processes: how many compare at a time, by default this rank's share of the node's cores; each starts when it is
    first needed (2 seconds). A batch takes at most (different pairs / processes) * (seconds + a start): with two
    processes and 5 seconds, about 3.5 seconds for each answer that is built to never end, 10 ms for each other one.
    """

    def __init__(self, seconds: float = 5.0, processes: int | None = None):
        path = Path(__file__).with_name("math_worker.py")
        self.workers = []
        self.idle = LifoQueue()  # the last one used comes first: single answers need one process
        for _ in range(processes or max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))):
            worker = Worker(path, seconds=seconds, memory_bytes=MEMORY_BYTES)
            self.workers.append(worker)
            self.idle.put(worker)

    def __call__(self, pairs: Sequence[tuple[str | None, str | None]]) -> list[bool | None]:
        """(reference, answer) -> whether they are equal; None if the reference cannot be read."""
        # Equal pairs are compared once, and those that are decided without math-verify not at all.
        verdicts = {pair: None if pair[0] is None else False for pair in pairs}
        compared = [pair for pair in verdicts if None not in pair and not differs_in_form(*pair)]
        with ThreadPoolExecutor(len(self.workers)) as threads:
            verdicts |= zip(compared, threads.map(self._compare, compared), strict=True)
        return [verdicts[pair] for pair in pairs]

    def _compare(self, pair: tuple[str, str]) -> bool | None:
        worker = self.idle.get()
        try:
            return worker.call(pair)
        except WorkerError:
            return False
        finally:
            self.idle.put(worker)


math_grader = cache(MathGrader)  # one for the process: rewards and evals share its workers
