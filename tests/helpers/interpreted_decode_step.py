"""The Triton kernels between a decode step's products against their plain twins, and `decode_hidden` as a whole.

On a GPU, or in Triton's interpreter without one; test_kernels.py runs this file in a process of its own.
"""

import pytest
import torch
from tiny_models import FAMILIES, decoder_like, random_reference, tiny_raw

from nanosafe.kernels import INTERPRETED, decode_step
from nanosafe.kernels.decode_step import HeadNorms, Pages
from nanosafe.model import decode
from nanosafe.model.attention import KVCache, PagedDecode
from nanosafe.model.decode import decode_hidden, join_projections

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu" and not INTERPRETED:
    pytest.skip("without a GPU this needs TRITON_INTERPRET=1", allow_module_level=True)
# The interpreter's bfloat16 casts truncate.
DTYPES = [torch.float32, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float32]


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal but for the order of sums; in bfloat16 within one rounding."""
    tolerance = 2e-6 if ours.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def random_tensors(*shapes, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("head_dim", [16, 24])
def test_heads_are_turned_and_written_to_their_places(head_dim, rotated, normed, dtype):
    """Rows of one joined product, as slices of it; one layer's pool out of a larger one."""
    B, H, H_kv, block_size = 3, 6, 2, 5
    [qkv, q_weight, k_weight] = random_tensors((B, H + 2 * H_kv, head_dim), head_dim, head_dim, dtype=dtype)
    cos, sin = random_tensors((B, 1, head_dim), (B, 1, head_dim))
    norms = HeadNorms(q_weight, k_weight, 1e-5) if normed else None
    blocks, offsets = torch.tensor([4, 0, 3], device=DEVICE), torch.tensor([2, 4, 0], device=DEVICE)
    results = []
    for function in (decode_step.triton_rotate_and_write, decode_step.plain_rotate_and_write):
        pools = torch.full((2, 2, 6, H_kv, block_size, head_dim), 7.0, device=DEVICE, dtype=dtype)
        pages = Pages(pools[0, 1], pools[1, 1], blocks, offsets)
        out = function(*qkv.split([H, H_kv, H_kv], dim=1), norms, (cos, sin) if rotated else None, pages)
        results.append((out, pools))
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [1, 32, 77])
def test_sum_and_norm(D, dtype):
    x, delta, weight = random_tensors((3, D), (3, D), D, dtype=dtype)
    for alpha in (1.0, 0.22):
        results = [function(x, delta, weight, 1e-5, alpha)
                   for function in (decode_step.triton_add_norm, decode_step.plain_add_norm)]
        for ours, theirs in zip(*results, strict=True):
            close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 48, 1500])
def test_swiglu_of_rows_that_lie_apart(width, dtype):
    [joined] = random_tensors((3, 2 * width), dtype=dtype)
    gate, up = (10 * joined).chunk(2, dim=1)
    close(decode_step.triton_swiglu(gate, up), decode_step.plain_swiglu(gate, up))


@pytest.mark.parametrize("joined", [False, True], ids=["separate", "joined"])
@pytest.mark.parametrize("rows", [3, 1])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_steps_of_decoding_are_the_decoders_own(family, rows, joined, monkeypatch):
    """Hidden states and cache after each of several steps of three sequences of unequal length, or of one alone."""
    monkeypatch.setattr(decode, "ROW_PRODUCTS", True)
    raw = tiny_raw(family)
    model = decoder_like(random_reference(raw), raw).to(DEVICE)
    if joined:
        join_projections(model)
    tables = torch.tensor([[5, 2], [0, 4], [3, 1]], dtype=torch.int32, device=DEVICE)[-rows:]
    caches = []
    for _ in range(2):
        cache = KVCache(model.config, 6, 4, DEVICE, torch.float32)
        cache.keys = torch.zeros_like(cache.values)  # On a CPU another order of its elements is the default.
        cache.keys.copy_(random_tensors(cache.keys.shape)[0])
        cache.values.copy_(random_tensors(cache.values.shape)[0])
        caches.append(cache)
    positions = torch.tensor([0, 2, 5], device=DEVICE)[-rows:]
    for step in range(2):
        tokens = torch.tensor([3, 14, 15], device=DEVICE)[-rows:] + step
        ours, theirs = (PagedDecode(cache, tables, positions + step) for cache in caches)
        found = decode_hidden(model, tokens, ours)
        expected = model.hidden(tokens, theirs.positions, theirs)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(caches[0].keys, caches[1].keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(caches[0].values, caches[1].values, rtol=1e-5, atol=1e-5)
