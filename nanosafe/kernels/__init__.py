"""Kernels: each file has an operation in plain PyTorch, which defines it and runs everywhere, and its faster form.

They import nothing of the project but this file, which imports Triton once for all of them.
"""

import os

try:
    import triton
    import triton.language as tl
except ImportError:  # not every platform has it
    triton = tl = None

# Triton decides the same way, when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
