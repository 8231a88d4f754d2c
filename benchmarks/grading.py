"""Time to grade MATH-500: eight responses to each question, as a model gives them.

Of the eight, right ones are the official solution after a thought of 32k tokens, its answer boxed, in a sentence,
rewritten and with a unit, wrong ones the solution of the next problem, an answer with other digits and a thought that
was cut off. About half of the pairs are equal and compared once. CPU seconds (of all processes) tell more than elapsed
ones on a machine that does other work. Run it as `python benchmarks/grading.py MATH-500/test.jsonl`; --hostile replaces
that many by different answers that never end. The last line is one JSON object.
"""

import argparse
import json
import re
import resource
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
THOUGHT = "Wait, if $x = 3$ then \\boxed{5} is wrong, so let me try {} again.\n" * 1500  # about 32k tokens


def responses_to(row: dict, following: dict) -> list[str]:
    gold = row["answer"]
    rewritten = gold.replace(r"\frac", r"\dfrac").replace(r"\text", r"\mathrm").replace(" ", "")
    shifted = re.sub("[0-9]", lambda digit: str((int(digit[0]) + 1) % 10), gold)
    answers = [
        row["solution"], rf"**Final Answer**\n\n\[\boxed{{{gold}}}\]", f"Therefore, the answer is ${gold}$.",
        rf"So we have $\boxed{{ {rewritten} }}$.",
        rf"\boxed{{{gold}\text{{ units}}}}" if gold.isdecimal() else rf"It is \({gold}\).",
        following["solution"], rf"$$\boxed{{{shifted if shifted != gold else following['answer']}}}$$",
    ]  # fmt: skip
    return [*(f"<think>\n{THOUGHT}</think>\n\n{answer}" for answer in answers), f"<think>\n{THOUGHT}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="MATH-500's test.jsonl")
    parser.add_argument("--hostile", type=int, default=0, help="so many answers that never end")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from nanosafe.evals.benchmark import Question
    from nanosafe.evals.graders import AnswerGrader
    from nanosafe.text.grading import math_grader

    rows = [json.loads(line) for line in args.file.read_text().splitlines()]
    questions, responses = [], []
    for row, following in zip(rows, rows[1:] + rows[:1], strict=True):
        for response in responses_to(row, following):
            questions.append(Question(row["unique_id"], [], row["subject"], row["answer"]))
            responses.append(response)
    for i in range(args.hostile):
        responses[i * len(responses) // args.hostile] = rf"\boxed{{9^{{9^{{9^{{{9 + i}}}}}}}}}"
    start, own = time.monotonic(), sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    values = AnswerGrader("math")(questions, responses)
    seconds = time.monotonic() - start
    for worker in math_grader().workers:
        worker.stop()  # only then is its time known
    cpu = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) - own
    kinds = ("solution", "boxed", "sentence", "rewritten", "unit", "next solution", "other digits", "cut off")
    right = {kind: sum(value["right"] for value in values[k :: len(kinds)]) / len(rows) for k, kind in enumerate(kinds)}
    for kind, share in right.items():
        print(f"{kind:16}{share:8.1%} right")
    print(json.dumps({"benchmark": "grading", "responses": len(responses), "hostile": args.hostile,
                      "processes": len(math_grader().workers), "seconds": round(seconds, 1),
                      "cpu_seconds": round(cpu, 1),
                      "right": right, "no_answer": sum(value["no_answer"] for value in values) / len(values)}))


if __name__ == "__main__":
    main()
