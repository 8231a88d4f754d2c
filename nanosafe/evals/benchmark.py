"""What a benchmark is: what is asked, how it is sampled, how answers are graded, as data.

A benchmark is a list of questions, a protocol that is printed and saved with every result, and a
grader that turns responses into named values. eval.py and train_rl.py's --eval-every know nothing
else of a benchmark. The tiny world's are in tiny_suite.py, the paper's in paper_suite.py.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from nanosafe.randomness import permutation

# How a reasoning benchmark asks for the form of its answers; an attack adapts to it.
BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
LETTER = ('\n\nChoose one option. The last line of your answer must read "Answer: $LETTER", '
          "$LETTER being A, B, C or D.")
# Metrics that say nothing of a model without thoughts.
OF_THOUGHTS = ("harmful_thought", "harmful_anywhere", "harmful_thought_only")


@dataclass(frozen=True)
class Question:
    id: str  # unique in its benchmark and equal between runs, which are compared by question
    messages: list[dict]  # what the model is asked
    category: str
    reference: object  # what the grader needs to know
    prefill: str = ""  # text that the response is made to begin with; it is graded as part of it
    asked: str = ""  # the plain request, which a judge reads: without attack and suffix
    seen: bool = False  # among the training prompts: asked, but not in the headline figures


# (questions, responses) -> {metric: value} for each; shares in [0, 1]. A response is the text from
# the thought's opening on. Metrics that a judge could not tell are missing, and "unjudged" is 1.
Values = dict[str, float]
Grader = Callable[[Sequence[Question], Sequence[str]], list[Values]]


@dataclass(frozen=True)
class Benchmark:
    name: str
    about: str  # safety, over-refusal or reasoning
    headline: str  # the metric that stands for the benchmark
    questions: list[Question]
    grade: Grader
    judge: str  # what grades, with its revision, for the protocol
    source: str  # where the questions come from, with revision; other sources are not compared
    keeps_verdicts: bool = False  # a model judges, which is dear: `judge` is asked only once
    differences: dict[str, tuple[str, str]] = field(default_factory=dict)  # one metric less another
    shown: tuple[str, ...] = ()  # metrics that tables put right behind the headline
    variation: bool = False  # of another benchmark, in other words or attacked: listed further down
    suffix: str = ""  # what stands behind each question, for the protocol
    temperature: float = 1.0
    top_p: float = 1.0
    samples: int = 1
    max_response_tokens: int = 128
    template_vars: dict = field(default_factory=dict)  # as enable_thinking, for the chat template


# A safety benchmark whose grader tells thought and answer apart.
HARM = dict(about="safety", headline="safe", shown=("harmful", "harmful_thought", "thought_gap"),
            differences={"thought_gap": ("harmful_thought", "harmful")})


def slug(name: str) -> str:
    """A benchmark's name as --benchmarks takes it: hyphens for spaces and commas."""
    return re.sub(r"[ ,]+", "-", name)


def adapt(benchmark: Benchmark, *, seed: int, limit: int | None = None, **others: float | None) -> Benchmark:
    """`benchmark` with other samples, temperature, top_p or max_response_tokens, or `limit` of its questions; None
    changes nothing.

    The questions are drawn from all alike (not stratified), as a function of the seed: the same for
    every model and for benchmarks that ask the same in other ways, and a larger limit only adds to
    them. A greedy benchmark has one sample: more would be equal.
    """
    chosen = sorted(permutation(len(benchmark.questions), seed, "eval")[:limit])
    changes = {name: value for name, value in others.items() if value is not None}
    adapted = replace(benchmark, questions=[benchmark.questions[i] for i in chosen], **changes)
    return replace(adapted, samples=1) if adapted.temperature == 0 else adapted
