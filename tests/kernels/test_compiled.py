"""Runs the tests of what CUDA compiles in training."""

from own_process import ROOT, check_passes


def test_compiled_functions():
    """Alone, for where PyTorch's CUDA build has compiled a function, no fork can do a backward pass, and the forks of
    other tests do."""
    check_passes(ROOT / "tests" / "helpers" / "compiled_functions.py")
