"""Paged decode attention, the plain twin, against softmax by hand over sequences that were never cut into blocks."""

import runpy
import sys

import pytest
import torch

import nanosafe
from nanosafe.kernels import paged_attention as decode

SCALE = 0.3


def paged_case(lengths, *, group=2, block_size=3, head_dim=8, kv_heads=2, shared=0, dtype=torch.float32, device="cpu"):
    """Arguments of paged_attention and the truth [B, H, head_dim] in float64.

    Sequences of these lengths lie in shuffled blocks; the first `shared` blocks belong to all of them. Whatever no
    sequence owns is NaN: the rest of a last block and the blocks that table entries beyond a length point to.
    """
    generator = torch.Generator().manual_seed(0)
    counts = [-(-length // block_size) for length in lengths]
    total = sum(counts) + 2
    keys, values = torch.full((2, total, kv_heads, block_size, head_dim), torch.nan, dtype=dtype)
    unused, *free = torch.randperm(total, generator=generator).tolist()
    tables = torch.full((len(lengths), max(counts)), unused, dtype=torch.int32)
    q = torch.randn(len(lengths), kv_heads * group, head_dim, generator=generator).to(dtype)
    prefix = torch.randn(2, kv_heads, shared * block_size, head_dim, generator=generator)
    prefix_blocks = [free.pop() for _ in range(shared)]
    truth = torch.empty(q.shape, dtype=torch.float64)
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        rest = torch.randn(2, kv_heads, length - shared * block_size, head_dim, generator=generator)
        k, v = torch.cat([prefix, rest], dim=2).to(dtype)  # [kv_heads, length, head_dim]
        blocks = prefix_blocks + [free.pop() for _ in range(count - shared)]
        tables[row, :count] = torch.tensor(blocks)
        for place, block in enumerate(blocks):
            part = slice(place * block_size, min((place + 1) * block_size, length))
            for pool, x in ((keys, k), (values, v)):
                pool[block, :, : part.stop - part.start] = x[:, part]
        for head in range(q.shape[1]):
            scores = k[head // group].double() @ q[row, head].double() * SCALE
            weights = (scores - scores.max()).exp()
            truth[row, head] = weights @ v[head // group].double() / weights.sum()
    arguments = [x.to(device) for x in (q, keys, values, tables, torch.tensor(lengths, dtype=torch.int32))]
    return [*arguments, SCALE], truth


@pytest.mark.parametrize("group", [1, 2, 4, 5])
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_every_length_group_and_block_size(group, block_size):
    lengths = [1, block_size, block_size + 1, 2 * block_size, 3 * block_size]  # the last fills its table
    arguments, truth = paged_case(lengths, group=group, block_size=block_size)
    torch.testing.assert_close(decode.plain_paged_attention(*arguments).double(), truth, rtol=1e-5, atol=1e-6)


def test_blocks_shared_between_sequences():
    arguments, truth = paged_case([7, 6, 11, 7], shared=2)
    torch.testing.assert_close(decode.plain_paged_attention(*arguments).double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype, unit", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_is_within_rounding_of_float64(dtype, unit):
    """Rounding the softmax weights costs at most one unit of rounding, relative to the values; the output, another."""
    arguments, truth = paged_case([1, 40, 64], block_size=16, head_dim=64, dtype=dtype)
    out = decode.plain_paged_attention(*arguments)
    assert out.dtype == dtype
    assert (out.double() - truth).abs().max() <= 2 * unit * truth.abs().max()


def test_a_query_that_is_not_contiguous():
    arguments, truth = paged_case([4, 9])
    arguments[0] = arguments[0].mT.contiguous().mT
    torch.testing.assert_close(decode.plain_paged_attention(*arguments).double(), truth, rtol=1e-5, atol=1e-6)


def test_attention_on_cpu_does_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it now raises ImportError
    monkeypatch.delitem(sys.modules, "nanosafe.kernels")
    monkeypatch.setattr(nanosafe, "kernels", nanosafe.kernels)  # for the new one takes its place
    module = runpy.run_path(decode.__file__)
    assert module["triton"] is None
    arguments, truth = paged_case([4, 9])
    torch.testing.assert_close(module["paged_attention"](*arguments).double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("programs", [1, 8, 64, 300, 2048, 100_000])
@pytest.mark.parametrize("positions", [16, 200, 1024, 32768])
def test_splits_keep_all_processors_busy_without_shares_of_a_few_positions(programs, positions):
    splits = decode.choose_splits(programs, positions, processors=132)
    assert 1 <= splits <= 64
    assert splits == 1 or positions / splits >= 128
    assert splits == 64 or programs * splits >= 132 or positions / splits < 256
    assert splits == 1 or programs * (splits - 1) < 4 * 132  # no more than it takes
