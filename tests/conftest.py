"""Shared by all tests: one thread, and the folder of official files that some tests compare with."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the network
torch.set_num_threads(1)  # on tiny tensors a second thread mostly spins: 6 times slower on two busy cores


@pytest.fixture(scope="session")
def assets() -> Path:
    """Folder with official configs, tokenizers, templates and data, which are not part of this repository."""
    if not os.environ.get("NANOSAFE_ASSETS"):
        pytest.skip("NANOSAFE_ASSETS does not name the folder of official files")
    return Path(os.environ["NANOSAFE_ASSETS"])
