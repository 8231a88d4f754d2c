"""The Triton kernel for products of one row against its plain twin.

On a GPU, or in Triton's interpreter without one; test_kernels.py runs this file in a process of its own.
"""

import pytest
import torch
from interpreted_decode_step import DEVICE, random_tensors

from nanosafe.kernels import row_product
from nanosafe.kernels.row_product import Affine, Norm, Residual, plain_row_product, triton_row_product

KINDS = ["alone", "norm", "norm and swiglu", "swiglu", "residual", "all"]


def operands(kind: str, out: int, width: int, biased: bool, dtype: torch.dtype) -> tuple:
    """Arguments of `row_product`; weights are such that results are near 1."""
    shapes = (1, width), (out, width), (out, width), out, out, width, (1, out)
    x, gate, up, gate_bias, up_bias, scales, old = random_tensors(*shapes, dtype=dtype)
    gate, up = (weight * width**-0.5 for weight in (gate, up))
    if not biased:
        gate_bias = up_bias = None
    norm = Norm(scales, 1e-5) if "norm" in kind or kind == "all" else None
    up = Affine(up, up_bias) if "swiglu" in kind or kind == "all" else None
    residual = Residual(old, 0.22) if kind in ("residual", "all") else None
    return 3 * x, Affine(gate, gate_bias), up, norm, residual


@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 77), (40, 32), (19, 600)], ids=str)
def test_products_in_float32(shape, kind, biased):
    arguments = operands(kind, *shape, biased, torch.float32)
    found, expected = triton_row_product(*arguments), plain_row_product(*arguments)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 77), (19, 600)], ids=str)
def test_products_in_bfloat16(shape, kind):
    arguments = operands(kind, *shape, True, torch.bfloat16)
    found, expected = triton_row_product(*arguments), plain_row_product(*arguments)
    assert found.dtype == torch.bfloat16
    # The interpreter's casts truncate, and SwiGLU has three of them.
    tolerance = 2**-7 if DEVICE.type == "cuda" else 2**-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_several_rows_of_the_weight_to_a_program_and_one(monkeypatch):
    arguments = operands("all", 21, 50, True, torch.float32)
    results = []
    for weights in (1, 512, 2**15):
        monkeypatch.setattr(row_product, "WEIGHTS", weights)
        results.append(triton_row_product(*arguments))
    for result in results:
        torch.testing.assert_close(result, plain_row_product(*arguments), rtol=1e-5, atol=1e-5)


def test_the_public_function_takes_this_path(monkeypatch):
    arguments = operands("all", 5, 7, False, torch.float32)
    expected = plain_row_product(*arguments)
    monkeypatch.delattr(row_product, "plain_row_product")
    torch.testing.assert_close(row_product.row_product(*arguments), expected, rtol=1e-5, atol=1e-5)
    assert expected.device.type == DEVICE.type
