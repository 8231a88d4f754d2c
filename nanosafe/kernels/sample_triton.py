"""Drawing by Triton kernels: the last of the three forms of `draw` in sample.py.

A row of a large vocabulary does not fit into registers, so its program reads it tile by tile: once for the largest
score, once for the softmax's denominator, and once for the draw itself. Between them the filters come down to one edge.
It is searched by halving the range of scores, over a copy of the scores that can be near it.

A few programs would leave most of a GPU idle. So few rows are cut into parts, which are drawn from at the same time,
and the program of a row without filters only combines what was found in them.
"""

import torch
from torch import Tensor

from nanosafe.kernels import tl, triton
from nanosafe.kernels.noise import BLOCKS, W

if triton is not None:
    from nanosafe.kernels.noise import triton_exponential, triton_hash, triton_mix

TILE = 64 * W  # tokens that a program has in registers at a time
PART = 16 * W  # tokens of a part
FEW_ROWS = 64  # Fewer rows than this are drawn from in parts: by themselves they would not fill half of a large GPU.


def triton_draw(logits: Tensor, params, begin: int = 0) -> tuple[Tensor, Tensor]:
    """`draw` of sample.py, with its SamplingTensors."""
    logits = logits.contiguous()
    B, V = logits.shape
    tokens, logprobs = torch.empty_like(params.seeds), torch.empty_like(params.temperature)
    if not B:
        return tokens, logprobs
    parts, statistics, candidates = 0, None, None
    if B < FEW_ROWS:
        parts = triton.cdiv(V, PART)
        statistics = logits.new_empty(B, 3, parts)
        candidates = tokens.new_empty(B, parts, dtype=torch.int32)
        _draw_part[B, parts](
            logits, *params, statistics, candidates, V, begin, W=W, TILE=PART, BLOCKS=BLOCKS, num_warps=4
        )
    _draw_row[(B,)](
        logits, torch.empty_like(logits), *params, statistics, candidates, parts, tokens, logprobs, V, begin,
        W=W, TILE=TILE, BLOCKS=BLOCKS, PARTS=triton.next_power_of_2(parts), num_warps=16,
    )  # fmt: skip
    return tokens, logprobs


if triton is not None:

    @triton.jit
    def _draw_part(
        logits, temperatures, top_ks, top_ps, min_ps, seeds, steps, statistics, candidates, V, begin,
        W: tl.constexpr, TILE: tl.constexpr, BLOCKS: tl.constexpr,
    ):  # fmt: skip
        """Program (row, part), unless the row has filters: the part's largest score, its sum of exp(score - largest)
        and its largest score with noise -> statistics [B, 3, parts]; whose that is -> candidates [B, parts]."""
        row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
        temperature, greedy, filtered = _load_settings(row, temperatures, top_ks, top_ps, min_ps)
        if not filtered:
            scores = _load_tile(logits + row * V, part * TILE, V, temperature, TILE)[1]
            peak = tl.max(scores, 0)
            mass = tl.sum(tl.exp(scores - tl.where(peak == float("-inf"), 0.0, peak)), 0)
            key_low, key_high = _load_keys(row, seeds, steps)
            best, token = tl.full((), float("-inf"), tl.float32), tl.full((), 0, tl.int32)
            best, token = _draw_tile(
                scores, part * TILE, best, token, V, begin, key_low, key_high, greedy, W, TILE, BLOCKS
            )
            place = statistics + row * 3 * parts + part
            tl.store(place, peak)
            tl.store(place + parts, mass)
            tl.store(place + 2 * parts, best)
            tl.store(candidates + row * parts + part, token)

    @triton.jit
    def _draw_row(
        logits, near_edge, temperatures, top_ks, top_ps, min_ps, seeds, steps, statistics, candidates, parts,
        tokens, logprobs, V, begin, W: tl.constexpr, TILE: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr,
    ):  # fmt: skip
        """Program r draws row r: from all of it, or from what _draw_part has found if that has drawn from the row.

        Ids count from 0 up to V; the noise is that of the ids from `begin` on. PARTS: room for `parts`, 0 for none.
        """
        row = tl.program_id(0).to(tl.int64)
        logits, near_edge = logits + row * V, near_edge + row * V
        temperature, greedy, filtered = _load_settings(row, temperatures, top_ks, top_ps, min_ps)
        filters = tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row)
        keys = _load_keys(row, seeds, steps)
        if PARTS == 0:  # known when the kernel is compiled
            peak, total, token = _draw_whole(
                logits, near_edge, temperature, greedy, filters, keys, V, begin, W, TILE, BLOCKS
            )
        elif filtered:
            peak, total, token = _draw_whole(
                logits, near_edge, temperature, greedy, filters, keys, V, begin, W, TILE, BLOCKS
            )
        else:
            part = tl.arange(0, PARTS)
            inside = part < parts
            place = statistics + row * 3 * parts + part
            peaks = tl.load(place, mask=inside, other=float("-inf"))
            masses = tl.load(place + parts, mask=inside, other=0.0)
            bests = tl.load(place + 2 * parts, mask=inside, other=float("-inf"))
            ids = tl.load(candidates + row * parts + part, mask=inside, other=0)
            peak = tl.max(peaks, 0)
            total = tl.sum(masses * tl.exp(peaks - peak), 0)
            token = tl.min(tl.where(bests == tl.max(bests, 0), ids, V), 0)
        tl.store(tokens + row, begin + token.to(tl.int64))
        tl.store(logprobs + row, tl.load(logits + token) / temperature - peak - tl.log(total))

    @triton.jit
    def _draw_whole(
        logits, near_edge, temperature, greedy, filters, keys, V, begin,
        W: tl.constexpr, TILE: tl.constexpr, BLOCKS: tl.constexpr,
    ):  # fmt: skip
        """Draw from all of a row: its largest score, its sum of exp(score - largest), and the token."""
        top_k, top_p, min_p = filters
        key_low, key_high = keys
        peak, total, edge, last = _find_last(logits, near_edge, temperature, greedy, top_k, top_p, min_p, V, TILE)
        # Only tiles with a block whose bound is above the best so far are hashed token by token.
        best, token = tl.full((), float("-inf"), tl.float32), tl.full((), 0, tl.int32)
        for start in range(0, V, TILE):
            ids, scores = _load_tile(logits, start, V, temperature, TILE)
            scores = tl.where((scores > edge) | ((scores == edge) & (ids <= last)), scores, float("-inf"))
            best, token = _draw_tile(scores, start, best, token, V, begin, key_low, key_high, greedy, W, TILE, BLOCKS)
        return peak, total, token

    @triton.jit
    def _load_settings(row, temperatures, top_ks, top_ps, min_ps):
        """Temperature, 1 where it is 0; whether it is 0; whether the row has filters that leave anything out."""
        temperature = tl.load(temperatures + row)
        greedy = temperature == 0
        filtered = (tl.load(top_ks + row) > 0) | (tl.load(top_ps + row) < 1) | (tl.load(min_ps + row) > 0)
        return tl.where(greedy, 1.0, temperature), greedy, filtered & ~greedy

    @triton.jit
    def _load_keys(row, seeds, steps):
        """`noise_keys` of the row."""
        seed, step = tl.load(seeds + row), tl.load(steps + row).to(tl.uint32)
        return triton_mix(seed.to(tl.uint32) ^ triton_mix(step)), triton_mix((seed >> 32).to(tl.uint32) + step)

    @triton.jit
    def _draw_tile(
        scores, start, best, token, V, begin, key_low, key_high, greedy,
        W: tl.constexpr, TILE: tl.constexpr, BLOCKS: tl.constexpr,
    ):  # fmt: skip
        """The best score with noise so far and its id, and those of the scores of ids `start` to start + TILE."""
        ids = tl.reshape(start + tl.arange(0, TILE), (TILE // W, W))
        scores = tl.reshape(scores, (TILE // W, W))
        block = ((begin + start) // W + tl.arange(0, TILE // W)).to(tl.uint32)
        first = triton_exponential(triton_hash(BLOCKS + 2 * block, key_low, key_high)) / W  # [blocks]
        bound = tl.where(greedy, 0.0, -tl.log(first))
        if tl.max(tl.max(scores, 1) + bound, 0) > best:
            owner = (triton_hash(BLOCKS + 1 + 2 * block, key_low, key_high) % W).to(tl.int32)
            later = first[:, None] + triton_exponential(triton_hash((begin + ids).to(tl.uint32), key_low, key_high))
            time = tl.where(ids % W == owner[:, None], first[:, None], later)
            perturbed = scores + tl.where(greedy, 0.0, -tl.log(time))
            highest = tl.max(perturbed)
            if highest > best:
                best, token = highest, tl.min(tl.where(perturbed == highest, ids, V))
        return best, token

    @triton.jit
    def _find_last(logits, near_edge, temperature, greedy, top_k, top_p, min_p, V, TILE: tl.constexpr):
        """The row's largest score and sum of exp(score - largest), and what its filters keep: scores above an edge, and
        of those equal to it the ids up to `last`. An edge of -inf keeps all."""
        by_count, by_mass = (top_k > 0) & ~greedy, (top_p < 1) & ~greedy

        # The largest score of the row, by way of the largest in each lane of the tiles.
        lanes = tl.full([TILE], float("-inf"), tl.float32)
        for start in range(0, V, TILE):
            lanes = tl.maximum(lanes, _load_tile(logits, start, V, temperature, TILE)[1])
        peak = tl.max(lanes, 0)

        # A first bound of the edge. The k-th best score is no worse than the k-th best lane; and tokens that have
        # half of what top-p may leave out together, as in _filter_top_p, are below it.
        edge, last = tl.full((), float("-inf"), tl.float32), V
        if by_count:
            tl.store(near_edge + tl.arange(0, TILE), lanes, mask=tl.arange(0, TILE) < V)
            tl.debug_barrier()  # Other threads read what one has stored.
            edge = _find_edge(top_k, edge, peak, near_edge, tl.minimum(V, TILE), False, TILE)
            tl.debug_barrier()
        elif by_mass:
            edge = peak + tl.log(((1 - top_p) / (2 * V)).to(tl.float32))

        # The denominator of the softmax, and the scores that can be at the edge.
        masses = tl.zeros([TILE], tl.float32)
        n = 0
        for start in range(0, V, TILE):
            ids, scores = _load_tile(logits, start, V, temperature, TILE)
            masses += tl.exp(scores - peak)
            if by_count | by_mass:
                near = (scores >= edge) & (ids < V)
                tl.store(near_edge + n + tl.cumsum(near.to(tl.int32), 0) - 1, scores, mask=near)
                n += tl.sum(near.to(tl.int32), 0)
        total = tl.sum(masses, 0)
        tl.debug_barrier()

        # The edge itself: top-k, then top-p of what is left, then min-p.
        whole = total
        if by_count:
            edge = _find_edge(top_k, edge, peak, near_edge, n, False, TILE)
            whole = _sum_from(edge, peak, near_edge, n, True, TILE)
        if by_mass:
            target = (top_p * whole).to(tl.float32)
            edge = _find_edge(target, edge, peak, near_edge, n, True, TILE)
            above = _float(_integer(edge) + 1)
            ties = _sum_from(edge, peak, near_edge, n, False, TILE)
            ties -= _sum_from(above, peak, near_edge, n, False, TILE)
            kept = tl.ceil((target - _sum_from(above, peak, near_edge, n, True, TILE)) / tl.exp(edge - peak))
            if kept < ties:
                last = _find_tie(tl.maximum(kept, 1.0), edge, logits, V, temperature, TILE)
        if min_p > 0 and peak + tl.log(min_p) > edge:
            edge, last = peak + tl.log(min_p), V

        return peak, total, edge, last

    @triton.jit
    def _load_tile(logits, start, V, temperature, TILE: tl.constexpr):
        """Ids and scores from id `start` on; -inf from V on."""
        ids = start + tl.arange(0, TILE)
        return ids, tl.load(logits + ids, mask=ids < V, other=float("-inf")) / temperature

    @triton.jit
    def _find_edge(target, lowest, peak, scores, n, MASS: tl.constexpr, TILE: tl.constexpr):
        """The largest edge from `lowest` to `peak` where `_sum_from` reaches the target: the range is halved as one of
        integers until one is left."""
        low, high = _integer(lowest), _integer(peak)
        while low < high:
            middle = (low + high + 1) >> 1
            reached = _sum_from(_float(middle), peak, scores, n, MASS, TILE) >= target
            low, high = tl.where(reached, middle, low), tl.where(reached, high, middle - 1)
        return _float(low)

    @triton.jit
    def _sum_from(edge, peak, scores, n, MASS: tl.constexpr, TILE: tl.constexpr):
        """Over those of n scores that are at least `edge`: the sum of exp(score - peak) if MASS, else their count."""
        sums = tl.zeros([TILE], tl.float32)
        for start in range(0, n, TILE):
            tile = _load_tile(scores, start, n, 1.0, TILE)[1]
            sums += tl.where(tile >= edge, tl.exp(tile - peak) if MASS else 1.0, 0.0)
        return tl.sum(sums, 0)

    @triton.jit
    def _find_tie(number, edge, logits, V, temperature, TILE: tl.constexpr):
        """The id of that number, from 1, among the scores equal to `edge`."""
        seen, result = 0, V
        for start in range(0, V, TILE):
            ids, scores = _load_tile(logits, start, V, temperature, TILE)
            tie = (scores == edge).to(tl.int32)
            right = (tie > 0) & (seen + tl.cumsum(tie, 0) == number)
            result = tl.minimum(result, tl.min(tl.where(right, ids, V), 0))
            seen += tl.sum(tie, 0)
        return result

    @triton.jit
    def _integer(x):
        """An integer for each float32, in the order of the floats; 0 for -0, too."""
        bits = (x + 0.0).to(tl.int32, bitcast=True)
        return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)

    @triton.jit
    def _float(integer):
        """The float32 of `_integer`'s integer."""
        bits = integer.to(tl.int32)
        return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)
