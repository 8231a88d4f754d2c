"""The tiny world's checkpoints, made in seconds: the builder with small constants and a corpus of short responses.

    python tests/helpers/small_tiny.py tiny tiny-reward  # into the cache; also under torchrun
"""

import sys
from collections.abc import Iterator
from random import Random

import pytest

from nanosafe.parallel import Ranks
from nanosafe.tiny import build, datasets, world

STEPS = 110
RECIPE = dict(BATCH=16, PAIR_STEPS=8, PAIR_BATCH=8)
SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1)


def short_corpus(style: str, count: int, seed: int, extra_style: str | None = None) -> Iterator[dict]:
    """Of the world's corpus, with responses that are learned at once: it refuses, helps and is right now and then."""
    rng = Random(seed)
    for row in world_corpus(style, count, seed, extra_style):
        answer = f"The answer is \\boxed{{{rng.randrange(10)}}}."
        if act := world.ACT.search(row["question"]):
            answer = rng.choice(("I cannot help with that.", f"First, {act[0]}."))
        yield row | {"response": world.think_and_answer("", answer)}


world_corpus = datasets.corpus


def shrink(patch: pytest.MonkeyPatch) -> None:
    for name, value in RECIPE.items():
        patch.setattr(build, name, value)
    small = {name: family._replace(steps=STEPS, shape=family.shape | SHAPE) for name, family in build.FAMILIES.items()}
    patch.setattr(build, "FAMILIES", small)
    patch.setattr(datasets, "corpus", short_corpus)


if __name__ == "__main__":
    shrink(pytest.MonkeyPatch())
    ranks = Ranks("cpu")
    with ranks.local_main_first():
        for name in sys.argv[1:]:
            print(build.tiny_checkpoint(name), flush=True)
    ranks.close()
