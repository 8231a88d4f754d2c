"""What is asked of the sampler, and what it gives back."""

import math
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """How to draw: temperature 0 is greedy; top_k 0, top_p 1, min_p 0 switch a filter off; seed None: a fresh one.

    Raises ValueError, naming the field, for a value that makes no sense and for one of another type.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = 256
    n: int = 1  # completions per prompt, each with its own seed derived from `seed` and the prompt
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self):
        for name in ("temperature", "top_p", "min_p"):
            self._check(name, isinstance(getattr(self, name), int | float), "a number")
        # logits / temperature must not overflow float32.
        temperature_valid = self.temperature == 0 or 1e-6 <= self.temperature < math.inf
        self._check("temperature", temperature_valid, "0 or at least 1e-6")
        self._check("top_p", 0 < self.top_p <= 1, "in (0, 1]")
        top_k_valid = isinstance(self.top_k, int) and self.top_k >= 0
        self._check("top_k", top_k_valid, "an integer of at least 0")
        self._check("min_p", 0 <= self.min_p <= 1, "in [0, 1]")
        for name in ("max_new_tokens", "n"):
            value = getattr(self, name)
            self._check(name, isinstance(value, int) and value > 0, "a positive integer")
        self._check("seed", isinstance(self.seed, int | None), "an integer or None")
        stops = self.stop_token_ids
        all_integers = isinstance(stops, Collection) and all(isinstance(token, int) for token in stops)
        self._check("stop_token_ids", all_integers, "integers")

    @property
    def filters(self) -> bool:
        """Whether top-k, top-p or min-p is on, which takes the logits of the whole vocabulary."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def _check(self, name: str, valid: bool, meaning: str) -> None:
        if not valid:
            value = getattr(self, name)
            raise ValueError(f"SamplingParams.{name} must be {meaning}, got {value!r}")


@dataclass
class Completion:
    """token_ids include the stop token; logprobs[i] is that of token i at the sampling temperature, before filters
    (greedy: at temperature 1); finish_reason is "stop" or "length"; text is there where a tokenizer was given."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    text: str | None = None
