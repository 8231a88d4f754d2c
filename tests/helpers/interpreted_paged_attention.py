"""The Triton kernels of paged decode attention against float64: on a GPU, or in Triton's interpreter without one.

The interpreter is chosen when Triton is imported, so test_kernels.py runs this file in a process of its own. Half
precision and CUDA graphs need a GPU: the interpreter's bfloat16 products are wrong.
"""

import pytest
import torch
from test_paged_attention import paged_case

from nanosafe.kernels import paged_attention as decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not decode.INTERPRETED:
    pytest.skip("without a GPU this needs TRITON_INTERPRET=1", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log")  # of shares of no positions
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def check(arguments, truth, splits, tolerance=1e-6):
    out = decode.triton_paged_attention(*arguments, splits=splits)
    torch.testing.assert_close(out.cpu().double(), truth, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("group", [1, 2, 5, 8])
def test_every_split_and_group(splits, group):
    """In float32 a tile is 16 positions: with 5 splits the lengths leave 4, 3, 0 and, uneven, 1 shares empty."""
    lengths = [1, 17, 80, 53]
    check(*paged_case(lengths, group=group, block_size=16, head_dim=16, device=DEVICE), splits)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("group, head_dim", [(2, 32), (5, 24), (20, 16), (2, 8)])
def test_head_dims_and_groups_that_need_padding(group, head_dim, splits):
    check(*paged_case([37, 16], group=group, block_size=16, head_dim=head_dim, device=DEVICE), splits)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("block_size", [1, 5, 64])
def test_blocks_smaller_and_larger_than_a_tile(block_size, splits):
    check(*paged_case([40, 33], block_size=block_size, head_dim=16, device=DEVICE), splits)


def test_blocks_shared_between_sequences_and_one_key_head():
    check(*paged_case([35, 48], block_size=16, head_dim=16, kv_heads=1, shared=2, device=DEVICE), splits=2)


@pytest.mark.parametrize("splits", [1, 2])
def test_arguments_that_are_not_contiguous(splits):
    """The query by columns; one layer's pool, every second block of it, out of a larger one; tables cut from wider."""
    (q, keys, values, tables, lengths, scale), truth = paged_case([20, 40], block_size=16, head_dim=16, device=DEVICE)
    pools = torch.full((2, 3, 2 * len(keys), *keys.shape[1:]), torch.nan, device=DEVICE)
    pools[0, 1, ::2], pools[1, 1, ::2] = keys, values
    wide = torch.cat([tables, torch.zeros_like(tables)], dim=1)[:, : tables.shape[1]]
    assert not wide.is_contiguous()
    check((q.mT.contiguous().mT, pools[0, 1, ::2], pools[1, 1, ::2], wide, lengths, scale), truth, splits)


def test_scores_far_apart_neither_overflow_nor_vanish():
    (q, *rest), _ = paged_case([48, 48], block_size=16, head_dim=16, device=DEVICE)
    for arguments in ([q * 1000, *rest], [q * -1000, *rest]):
        exact = decode.plain_paged_attention(*(x.double() if x.is_floating_point() else x for x in arguments[:5]), 0.3)
        check(arguments, exact.cpu(), 3, tolerance=1e-4)  # scores of 1,000 are rounded to 6e-5


def test_the_public_function_takes_this_path(monkeypatch):
    arguments, truth = paged_case([300], block_size=16, head_dim=16, kv_heads=1, device=DEVICE)
    monkeypatch.delattr(decode, "plain_paged_attention")
    torch.testing.assert_close(decode.paged_attention(*arguments).cpu().double(), truth, rtol=1e-5, atol=1e-6)


@on_gpu
@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize("dtype, unit", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("group, head_dim, block_size", [(4, 128, 64), (1, 64, 16), (5, 128, 256), (8, 80, 32)])
def test_half_precision_is_within_rounding_of_float64(group, head_dim, block_size, dtype, unit, splits):
    shape = dict(group=group, head_dim=head_dim, block_size=block_size, dtype=dtype)
    arguments, truth = paged_case([1, 64, 65, 1000, 4099], **shape, device=DEVICE)
    out = decode.triton_paged_attention(*arguments, splits=splits)
    assert out.dtype == dtype
    assert (out.cpu().double() - truth).abs().max() <= 2 * unit * truth.abs().max()


@on_gpu
def test_a_pool_of_more_than_2_31_elements():
    (q, keys, values, tables, lengths, scale), truth = paged_case(
        [100, 65], block_size=64, head_dim=128, dtype=torch.bfloat16, device=DEVICE
    )
    blocks = 2**31 // keys[0].numel() + 2
    large = torch.empty(2, blocks, *keys.shape[1:], dtype=keys.dtype, device=DEVICE)  # 8.6 GB
    large[0, -len(keys) :], large[1, -len(keys) :] = keys, values
    out = decode.triton_paged_attention(q, large[0], large[1], tables + (blocks - len(keys)), lengths, scale)
    assert (out.cpu().double() - truth).abs().max() <= 2 * 2**-8 * truth.abs().max()


@on_gpu
@pytest.mark.parametrize("splits", [1, 4])
def test_a_captured_graph_sees_lengths_and_tables_changed_in_place(splits):
    shape = dict(block_size=16, head_dim=64, dtype=torch.bfloat16, device=DEVICE)
    arguments, _ = paged_case([200, 10], **shape)
    changed, truth = paged_case([33, 177 + 23], **shape)
    assert [x.shape for x in changed[:1] + changed[3:5]] == [x.shape for x in arguments[:1] + arguments[3:5]]
    pools = torch.full((2, 64, *arguments[1].shape[1:]), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    pools[0, : len(arguments[1])], pools[1, : len(arguments[1])] = arguments[1:3]
    arguments[1:3] = pools
    decode.triton_paged_attention(*arguments, splits=splits)  # compiles; capturing must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode.triton_paged_attention(*arguments, splits=splits)
    for old, new in zip(arguments[:5], changed[:5], strict=True):
        old[: len(new)].copy_(new)
    graph.replay()
    assert (out.cpu().double() - truth).abs().max() <= 2 * 2**-8 * truth.abs().max()
