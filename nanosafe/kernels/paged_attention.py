"""Attention of one new token per sequence over its paged cache: a Triton kernel and its plain PyTorch twin.

Decoding reads every key and value once and computes little, so the kernel is about keeping enough reads in flight.
One program handles one sequence, one key head with all query heads that share it, and one share of the positions:
splitting long contexts keeps all processors busy when there are few sequences (flash-decoding, Dao et al. 2023). It
goes over its share in tiles with an online softmax (Milakov and Gimelshein, arXiv:1805.02867), and a second kernel
combines the shares. Simplified: one tile size and one launch configuration for all shapes, no autotuning.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanosafe.kernels import INTERPRETED, tl, triton

PROGRAMS_PER_PROCESSOR = 4  # About as many fit; more would only add partial results to combine.
SMALLEST_SHARE = 128  # positions; to start a program for fewer costs more than it reads
MOST_SPLITS = 64  # _combine_shares holds all shares of a head in registers.


def paged_attention(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v of one new token per sequence over the positions its cache holds, its own among them.

    q [B, H, head_dim]; keys, values [blocks, H_kv, block_size, head_dim] of the same dtype, the pool of one layer, each
    block contiguous; tables [B, M] integers: the blocks of each sequence in order, entries beyond its length being any
    valid block; lengths [B] integers from 1 to M * block_size: positions to attend to -> [B, H, head_dim]. Query heads
    h * H / H_kv onwards share key head h.

    Reads nothing back to the host, so a CUDA graph can capture it once a call with the same shapes has compiled the
    kernels; a replay sees tables and lengths changed in place.
    """
    if triton is not None and (q.is_cuda or INTERPRETED):
        return triton_paged_attention(q, keys, values, tables, lengths, scale)
    return plain_paged_attention(q, keys, values, tables, lengths, scale)


def plain_paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """`paged_attention` by copying each sequence's blocks behind one another."""
    H_kv, block_size = keys.shape[1:3]
    pages = tables[:, None], torch.arange(H_kv, device=q.device)[:, None]  # broadcast to [B, H_kv, M]
    # [B, H_kv, M * block_size, head_dim]
    keys, values = keys[pages].flatten(2, 3), values[pages].flatten(2, 3)
    seen = torch.arange(tables.shape[1] * block_size, device=q.device) < lengths[:, None]
    seen = seen[:, None, None, :]  # [B, 1, 1, M * block_size]
    for copy in (keys, values):
        copy.masked_fill_(~seen.mT, 0)  # A weight of 0 does not hide a NaN of uninitialised memory.
    # The query heads that share a key head become query rows: SDPA's own grouping is several times slower.
    grouped = q.unflatten(1, (H_kv, -1))  # [B, H_kv, H / H_kv, head_dim]
    return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=seen, scale=scale).flatten(1, 2)


def triton_paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, scale: float, splits: int | None = None
) -> Tensor:
    """`paged_attention` by the kernels below; `splits`: programs among which each sequence is shared out."""
    (B, H, head_dim), (_, H_kv, block_size, _) = q.shape, keys.shape
    assert keys[0].is_contiguous() and values[0].is_contiguous() and keys.stride(0) == values.stride(0)
    if splits is None:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
        splits = choose_splits(B * H_kv, tables.shape[1] * block_size, processors)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    partial, logsumexp = out, None
    if splits > 1:
        partial = q.new_empty(B, H, splits, head_dim, dtype=torch.float32)
        logsumexp = q.new_empty(B, H, splits, dtype=torch.float32)
    columns = max(16, triton.next_power_of_2(head_dim))  # tl.dot takes powers of two from 16 in each direction.
    _attend_share[B, H_kv, splits](
        q.contiguous(), keys, values, tables, lengths.contiguous(), partial, logsumexp, scale,
        keys.stride(0), tables.stride(0), GROUP=H // H_kv, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
        # There are no tensor cores for float32; larger tiles of it would spill registers.
        TILE=16 if q.dtype == torch.float32 else 64,
        ROWS=max(16, triton.next_power_of_2(H // H_kv)), COLUMNS=columns,
        # Keys wait for the block numbers, which halves the depth: 5 stages have two tiles in flight while one is used.
        num_warps=4, num_stages=5,
    )  # fmt: skip
    if splits > 1:
        _combine_shares[(B * H,)](
            partial, logsumexp, out, splits, HEAD_DIM=head_dim, SPLITS=triton.next_power_of_2(splits), COLUMNS=columns
        )
    return out


def choose_splits(programs: int, positions: int, processors: int) -> int:
    """Shares per sequence for `programs` pairs of sequence and key head and at most `positions` positions each.

    From shapes alone: reading the lengths would stop the host until the device has caught up.
    """
    wanted = -(-PROGRAMS_PER_PROCESSOR * processors // programs)
    return max(1, min(wanted, positions // SMALLEST_SHARE, MOST_SPLITS))


if triton is not None:

    @triton.jit
    def _attend_share(
        q, keys, values, tables, lengths, out, logsumexp, scale, block_stride, table_stride,
        GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
        TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """Program (sequence, key head, split): its share's softmax over values -> out [B, H, splits, HEAD_DIM], and
        the log of the softmax's denominator -> logsumexp [B, H, splits] (or None); a share of no positions: 0, -inf."""
        sequence = tl.program_id(0).to(tl.int64)
        kv_head, split, splits = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
        row, column, offset = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, TILE)
        head = (sequence * tl.num_programs(1) + kv_head) * GROUP + row  # [ROWS] in [0, B * H)
        inside = (row < GROUP)[:, None] & (column < HEAD_DIM)[None, :]
        query = tl.load(q + head[:, None] * HEAD_DIM + column[None, :], mask=inside, other=0.0)

        length = tl.load(lengths + sequence)
        share = tl.cdiv(tl.cdiv(length, TILE), splits) * TILE
        end = tl.minimum((split + 1) * share, length)
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        weighted = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(split * share, end, TILE):
            position = start + offset
            seen = position < end
            table = tables + sequence * table_stride
            if BLOCK_SIZE % TILE == 0:  # Tiles begin at multiples of TILE, so a tile lies in one block.
                block = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
            else:
                block = tl.load(table + position // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
            place = block * block_stride + (kv_head * BLOCK_SIZE + position % BLOCK_SIZE) * HEAD_DIM
            place = place[:, None] + column[None, :]
            valid = seen[:, None] & (column < HEAD_DIM)[None, :]
            key = tl.load(keys + place, mask=valid, other=0.0)  # [TILE, COLUMNS]
            value = tl.load(values + place, mask=valid, other=0.0)
            scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
            scores = tl.where(seen[None, :], scores, float("-inf"))  # [ROWS, TILE]
            higher = tl.maximum(highest, tl.max(scores, 1))
            decay, p = tl.exp(highest - higher), tl.exp(scores - higher[:, None])
            total = total * decay + tl.sum(p, 1)
            weighted = tl.dot(p.to(value.dtype), value, weighted * decay[:, None], input_precision="ieee")
            highest = higher

        target = head * splits + split
        # The highest score adds exactly 1 to the total, so only an empty share has less.
        weighted /= tl.maximum(total, 1.0)[:, None]
        tl.store(out + target[:, None] * HEAD_DIM + column[None, :], weighted, mask=inside)
        if logsumexp is not None:
            tl.store(logsumexp + target, highest + tl.log(total), mask=row < GROUP)

    @triton.jit
    def _combine_shares(
        partial, logsumexp, out, splits, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr
    ):
        """Program (sequence and head): partial [B * H, splits, HEAD_DIM] weighted by softmax(logsumexp) -> out."""
        head = tl.program_id(0).to(tl.int64)
        split, column = tl.arange(0, SPLITS), tl.arange(0, COLUMNS)
        logs = tl.load(logsumexp + head * splits + split, mask=split < splits, other=float("-inf"))
        weight = tl.exp(logs - tl.max(logs, 0))
        inside = (split < splits)[:, None] & (column < HEAD_DIM)[None, :]
        place = (head * splits + split)[:, None] * HEAD_DIM + column[None, :]
        parts = tl.load(partial + place, mask=inside, other=0.0)  # [SPLITS, COLUMNS]
        combined = tl.sum(weight[:, None] * parts, 0) / tl.sum(weight, 0)
        tl.store(out + head * HEAD_DIM + column, combined, mask=column < HEAD_DIM)
