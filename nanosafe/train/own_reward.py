"""A reward of one's own: a function in a Python file, given as --reward-model FILE.py:FUNCTION.

    def brevity(conversations, rows):
        return [-len(messages[-1]["content"]) / 1000 for messages in conversations]

It gets finished conversations, lists of {"role", "content"} whose last message is the response, and the rows of the
data that their prompts come from, as dicts with every field of the file. It returns a number for each.
"""

import importlib.util
import math
import re
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nanosafe.text.data import Row

SPEC = re.compile(r"(.+\.py):(\w+)")


def is_function(spec: str) -> bool:
    """Whether a --reward-model is FILE.py:FUNCTION."""
    return bool(SPEC.fullmatch(spec))


class OwnReward:
    def __init__(self, spec: str):
        """spec: FILE.py:FUNCTION; the file is run. Raises ValueError for a missing file or function."""
        file, name = SPEC.fullmatch(spec).groups()
        self.spec, self.path = spec, Path(file).expanduser()
        if not self.path.is_file():
            raise ValueError(f"--reward-model {spec}: there is no file {self.path}")
        module_spec = importlib.util.spec_from_file_location(self.path.stem, self.path)
        module = importlib.util.module_from_spec(module_spec)
        self._run(module_spec.loader.exec_module, module)
        self.function = getattr(module, name, None)
        if not callable(self.function):
            raise ValueError(f"--reward-model {spec}: {self.path} has no function {name}")

    def __call__(self, conversations: Sequence[list[dict]], rows: Sequence[Row]) -> Tensor:
        """As a Reward. Raises ValueError for an error in the function, naming the line, and for what it returns."""
        columns = [dict(row.columns) for row in rows]
        values = self._run(self.function, list(conversations), columns)
        try:
            if isinstance(values, dict | str):
                raise TypeError  # whose keys or digits would pass for numbers
            scores = [float(value) for value in values]
        except (TypeError, ValueError):
            raise ValueError(f"{self.spec} must return a list of numbers, not {values!r:.100}") from None
        if len(scores) != len(rows):
            raise ValueError(f"{self.spec} returned {len(scores)} numbers for {len(rows)} conversations")
        return torch.tensor(scores)

    def try_on(self, row: Row) -> None:
        """Raise ValueError, before anything is trained, where the function fails on a row and a made-up response."""
        [score] = self([[*row.prompt, {"role": "assistant", "content": "I cannot help with that."}]], [row])
        if not math.isfinite(score):
            raise ValueError(f"{self.spec} gives {row.source} the reward {score}: it must be finite")

    def _run(self, function: Callable, *arguments) -> object:
        try:
            return function(*arguments)
        except Exception as error:
            # The last line of the file that was running: that of a library it calls would say less.
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                     if frame.filename == str(self.path)]
            place = f"line {lines[-1]}: " if lines else ""
            raise ValueError(f"{self.spec}: {place}{type(error).__name__}: {error}") from error
