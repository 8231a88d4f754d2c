"""Shared by all tests: one thread, the CPU, and the folder of official files that some tests compare with."""

import os
from functools import lru_cache
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the network
torch.set_num_threads(1)  # on tiny tensors a second thread mostly spins: 6 times slower on two busy cores
if "NANOSAFE_TEST_GPU" not in os.environ:
    # Most tests are about the CPU's numbers, and many fork, which CUDA forbids. What is for a GPU is pretended instead.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def assets() -> Path:
    """Folder with official configs, tokenizers, templates and data, which are not part of this repository."""
    if not os.environ.get("NANOSAFE_ASSETS"):
        pytest.skip("NANOSAFE_ASSETS does not name the folder of official files")
    return Path(os.environ["NANOSAFE_ASSETS"])


@pytest.fixture(scope="session")
def official(assets, tmp_path_factory):
    """A function: name in official.OFFICIAL -> its tokenizer, loaded once."""
    from official import official_tokenizer

    return lru_cache(lambda name: official_tokenizer(assets, name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def small_cache(tmp_path_factory) -> Path:
    """A cache with the checkpoints tiny and tiny-reward of small_tiny.py, under the names that the builder gives."""
    from small_tiny import shrink

    from nanosafe.tiny import build

    folder = tmp_path_factory.mktemp("tiny-cache")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        patch.setenv("NANOSAFE_CACHE", str(folder))
        for name in ("tiny", "tiny-reward"):
            build.tiny_checkpoint(name)
    return folder
