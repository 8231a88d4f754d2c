"""What runs in MathGrader's worker processes (worker.py): math-verify. It imports no nanosafe."""

import logging
import re

from latex2sympy2_extended import NormalizationConfig
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

logging.disable(logging.WARNING)  # math-verify warns that it sets no time limits; the process does
# math-verify drops these at the end as units: 3t would equal 3. References have theirs in \text{}.
LAST_VARIABLE = re.compile(r"(?<=[\d}\s])(ab|bc|[cdghlmost])(?=[$}.\s]*$)")
DECIMAL_COMMA = re.compile(r"\\boxed\{(\d+),(\d\d)\}")  # 1,22 is two numbers or one: both are right
DECIMALS = 6  # to which math-verify compares by default


def answer(request: list[str]) -> bool | None:
    """[gold, prediction] -> whether they are equal, None if gold cannot be read."""
    reference, _ = request
    units = not LAST_VARIABLE.search(reference)
    normal = NormalizationConfig(units=units, malformed_operators=True, nits=True)
    form = (LatexExtractionConfig(normalization_config=normal), ExprExtractionConfig())
    gold, prediction = (parse(text, form, parsing_timeout=None) for text in request)
    if DECIMAL_COMMA.fullmatch(reference):
        gold += parse(DECIMAL_COMMA.sub(r"\1.\2", reference), form, parsing_timeout=None)
    # .0000672 is not .0000668
    decimals = max([DECIMALS, *map(len, re.findall(r"\.(\d+)", reference))])
    if not gold:
        return None
    return verify(gold, prediction, allow_set_relation_comp=True, float_rounding=decimals,
                  timeout_seconds=None)


answer(["1", "1"])  # compiles patterns and grammar, which are not the first answer's time
