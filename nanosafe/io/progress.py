"""Progress bars of the main rank."""

from collections.abc import Iterable, Sequence

from tqdm import tqdm

from nanosafe.io.machine import MAIN_RANK


def progress(items: Sequence, what: str) -> Iterable:
    """`items` with a progress bar, which appears once they have taken two seconds."""
    return tqdm(items, what, delay=2, leave=False, disable=not MAIN_RANK)
