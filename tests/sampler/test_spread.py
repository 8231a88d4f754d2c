"""Models that several ranks hold together against one process: completions, memory, what is refused, whole runs."""

import pytest
import torch
from spread_cases import CASES, SHAPE, measure, sample_cases
from tiny_models import random_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The models of CASES, and what 1, 2 and 4 processes sample with them."""
    folder = tmp_path_factory.mktemp("spread")
    for name, (family, changes) in CASES.items():
        random_checkpoint(folder / name, family, **SHAPE | changes)
    for world, shards in ((1, [1]), (2, [2]), (4, [2, 4])):
        torch.multiprocessing.spawn(sample_cases, (world, folder, shards), nprocs=world)
    return folder


@pytest.mark.parametrize("world, shards", [(2, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize("case", CASES)
def test_ranks_that_hold_a_model_together_sample_what_one_process_does(folder, case, world, shards):
    one = torch.load(folder / "1-0.pt")[case, 1]
    each = [torch.load(folder / f"{world}-{rank}.pt")[case, shards] for rank in range(world)]
    assert one.keys() == each[0].keys() and len(one) == (4 if case == "qwen3" else 1)
    for kind in one:
        assert all(results[kind] == each[0][kind] for results in each), "every rank has all completions"
        for samples, expected in zip(each[0][kind], one[kind], strict=True):
            for a, b in zip(samples, expected, strict=True):
                assert a[0] == b[0] and a[2] == b[2]
                assert a[1] == pytest.approx(b[1], abs=1e-5)
