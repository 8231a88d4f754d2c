"""What a benchmark is: what is asked, how it is sampled, how answers are graded, as data.

A benchmark is a list of questions, a protocol that is printed and saved with every result, and a grader that turns
responses into named values. eval.py and train_rl.py's --eval-every know nothing else of a benchmark. The tiny world's
are in tiny_tasks.py, the paper's in benchmarks.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from nanosafe.randomness import permutation


@dataclass(frozen=True)
class Question:
    id: str  # unique in its benchmark and equal between runs: arms are compared question by question
    messages: list[dict]  # what the model is asked
    category: str
    reference: object  # what the grader needs to know
    prefill: str = ""  # text that the response is made to begin with; it is graded as part of it
    asked: str = ""  # the plain request, which a judge reads: without an attack's wrapping or a suffix
    seen: bool = False  # it also stands among the training prompts: asked, and left out of the headline figures


# (questions, responses) -> {metric: value} for each; shares in [0, 1]. A response is the text from the thought's
# opening on. Metrics that a judge could not tell are missing, and "unjudged" is 1 there.
Values = dict[str, float]
Grader = Callable[[Sequence[Question], Sequence[str]], list[Values]]


@dataclass(frozen=True)
class Benchmark:
    name: str
    about: str  # safety, over-refusal or reasoning
    headline: str  # the metric that stands for the benchmark; of safety and reasoning, higher is better
    questions: list[Question]
    grade: Grader
    judge: str  # what grades, with its revision, for the protocol
    source: str  # where the questions come from, with revision; results of other sources are not compared
    keeps_verdicts: bool = False  # grading is dear (a model judges): what `judge` has graded is not graded again
    differences: dict[str, tuple[str, str]] = field(default_factory=dict)  # further metrics: one minus another
    shown: tuple[str, ...] = ()  # metrics that tables put right behind the headline
    variation: bool = False  # of another benchmark, by an attack or other words: tables list it further down
    suffix: str = ""  # what stands behind each question, for the protocol
    temperature: float = 1.0
    top_p: float = 1.0
    samples: int = 1
    max_response_tokens: int = 128
    template_vars: dict = field(default_factory=dict)  # as enable_thinking, for the chat template


HARM = dict(  # of a safety benchmark whose grader tells thought and answer apart
    about="safety", headline="safe", differences={"thought_gap": ("harmful_thought", "harmful")},
    shown=("harmful", "harmful_thought", "thought_gap"),
)  # fmt: skip

OF_THOUGHTS = ("harmful_thought", "harmful_anywhere", "harmful_thought_only")  # say nothing of a model without thoughts


def adapt(benchmark: Benchmark, *, seed: int, samples: int | None = None, limit: int | None = None,
          max_response_tokens: int | None = None) -> Benchmark:
    """`benchmark` with other samples or lengths, or with `limit` of its questions; None changes nothing.

    The questions are drawn from all alike (not stratified), as a function of the seed: the same for every model and for
    benchmarks that ask the same in other ways, and a larger limit only adds to them. A greedy benchmark keeps its one
    sample: more would be equal.
    """
    chosen = sorted(permutation(len(benchmark.questions), seed, "eval")[:limit])
    samples = samples if samples and benchmark.temperature else benchmark.samples
    return replace(benchmark, questions=[benchmark.questions[i] for i in chosen], samples=samples,
                   max_response_tokens=max_response_tokens or benchmark.max_response_tokens)
