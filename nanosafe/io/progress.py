"""Progress bars: of the main rank, on a terminal, for what takes longer than two seconds."""

from collections.abc import Iterable, Sequence

from tqdm import tqdm

from nanosafe.io.machine import MAIN_RANK


def progress_bar(total: float | None, what: str, unit: str = "it", *, shown: bool = True, **options) -> tqdm:
    """A bar to be moved by hand; it is gone when it ends, and silent where the output is no terminal."""
    disable = None if shown and MAIN_RANK else True  # None: tqdm looks whether there is a terminal
    options = dict(delay=2, leave=False) | options
    return tqdm(total=total, desc=what, unit=unit, disable=disable, **options)


def progress(items: Sequence, what: str, unit: str = "it") -> Iterable:
    """`items` with a progress bar."""
    with progress_bar(len(items), what, unit) as bar:
        for item in items:
            yield item
            bar.update()
