"""What runs in MathGrader's worker process (worker.py): math-verify. It imports nothing of nanosafe."""

import logging

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

logging.disable(logging.WARNING)  # math-verify warns that its own time limits are off; the process is the limit
TARGETS = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]  # \boxed{} first, as models are asked


def answer(request: list[str]) -> bool | None:
    """[gold, prediction] -> whether they are equal, None if gold cannot be read."""
    gold, prediction = request
    if "\\boxed" not in gold and "$" not in gold.replace("\\$", ""):
        gold = f"${gold}$"  # data sets give bare LaTeX, and only marked LaTeX is read as such
    # The order matters: a gold x > 2 accepts the interval (2, oo), but not the other way round.
    gold, prediction = (parse(text, TARGETS, parsing_timeout=None) for text in (gold, prediction))
    return verify(gold, prediction, timeout_seconds=None) if gold else None


answer(["1", "1"])  # compiles the patterns and the grammar, which should not count in the first answer's time
