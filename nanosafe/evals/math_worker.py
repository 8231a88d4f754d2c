"""What runs in MathGrader's worker processes (worker.py): math-verify. It imports nothing of nanosafe."""

import logging
import re

from latex2sympy2_extended import NormalizationConfig
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

logging.disable(logging.WARNING)  # math-verify warns that its own time limits are off; the process is the limit
# math-verify drops these at the end as units: 3t would equal 3
LAST_VARIABLE = re.compile(r"(?<=[\d}\s])(ab|bc|[cdghlmost])(?=[$}.\s]*$)")
DECIMAL_COMMA = re.compile(r"\\boxed\{\d+,\d\d\}")  # 1,22 is two numbers or one: either is right
DECIMALS = 6  # to which math-verify compares by default


def answer(request: list[str]) -> bool | None:
    """[gold, prediction] -> whether they are equal, None if gold cannot be read."""
    decimals = max([DECIMALS, *map(len, re.findall(r"\.(\d+)", request[0]))])  # .0000672 is not .0000668
    units = not LAST_VARIABLE.search(request[0])
    normalise = NormalizationConfig(basic_latex=True, units=units, malformed_operators=True, nits=True, boxed="all")
    form = (LatexExtractionConfig(normalization_config=normalise), ExprExtractionConfig())
    gold, prediction = (parse(text, form, parsing_timeout=None) for text in request)
    if DECIMAL_COMMA.fullmatch(request[0]):
        gold += parse(request[0][len(r"\boxed{") : -1].replace(",", "."), form, parsing_timeout=None)
    return verify(gold, prediction, allow_set_relation_comp=True, float_rounding=decimals, timeout_seconds=None) if gold else None


answer(["1", "1"])  # compiles the patterns and the grammar, which should not count in the first answer's time
