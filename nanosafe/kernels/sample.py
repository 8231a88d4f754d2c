"""One fused sampling pass: temperature, top-k, top-p, min-p, log-prob and a seeded draw, from logits to token ids.

A draw is the argmax of score + Gumbel noise, hashed from (seed, step, token id). Gumbel noise is -log of the time at
which an exponential clock rings. The clocks come in blocks of W tokens, top down as in A* sampling (Maddison, Tarlow
and Minka, arXiv:1411.0030): first when the earliest of a block rings, then whose it is, then how much later each other
rings, which is exponential again (the clocks have no memory). The noise of all tokens is exactly independent, yet the
earliest ring bounds it in a whole block, so that only the few blocks that can win are hashed token by token. The Triton
kernel handles a row per program; the plain PyTorch twin is what runs on a CPU.
"""

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # not every platform has it; the plain twin runs everywhere
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton decides the same way, when a kernel is defined

W = 128  # tokens in a block of clocks; part of what a seed means
TILE = 64 * W  # tokens that a program of the Triton kernel has in registers at a time
MASK = 0xFFFFFFFF  # the hash works on 32-bit words held in int64, where products wrap and their low word stays exact


def draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor,
         steps: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Draw one token per row of logits [B, V] float32 -> token ids [B] int64, their log-probs [B] float32.

    temperature [B] float32 (0: the first of the largest logits, whatever the filters), top_k [B] int64 (0: off),
    top_p [B] float64 (1: off), min_p [B] float32 (0: off), as `filter_scores` has them; seeds [B] int64 of 63 bits,
    steps [B] int64. The log-prob is that of softmax(logits / temperature) before the filters (temperature 0: as 1).

    The Triton kernel reads nothing back to the host, so a CUDA graph can capture it.
    """
    one_pass = triton_draw if triton is not None and (logits.is_cuda or INTERPRETED) else plain_draw
    return one_pass(logits, temperature, top_k, top_p, min_p, seeds, steps)


def plain_draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor,
               steps: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`draw`, leaving out every pass over [B, V] that no row needs."""
    sampled = temperature > 0
    scores = logits
    if (sampled & (temperature != 1)).any():
        scores = logits / torch.where(sampled, temperature, 1.0)[:, None]
    if sampled.any():
        filtered = (sampled & ((top_k > 0) | (top_p < 1) | (min_p > 0))).any()
        kept = filter_scores(scores, top_k, top_p, min_p) if filtered else scores
        tokens = _gumbel_argmax(kept, seeds, steps)
        if not sampled.all():
            tokens = torch.where(sampled, tokens, _argmax(scores))
    else:
        tokens = _argmax(scores)
    return tokens, scores.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]  # one pass, which logsumexp is not


def filter_scores(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Set to -inf what top-k, then top-p (the smallest set reaching p), then min-p (relative to the largest) exclude.

    scores [B, V]; top_k [B] int64 (0: off), top_p [B] float64 (1: off), min_p [B] (0: off) -> [B, V]. Top-k keeps
    every score equal to the k-th best; top-p counts the probability left after top-k, and among equal scores the lower
    id as better. The best score always stays.
    """
    limited = (top_k > 0) & (top_k < scores.shape[1])
    if limited.any():
        best = scores.topk(int(top_k[limited].max()), dim=-1).values
        kth = best.gather(1, (top_k - 1).clamp(0, best.shape[1] - 1)[:, None])
        scores = scores.masked_fill(scores < torch.where(limited[:, None], kth, -torch.inf), -torch.inf)
    if (top_p < 1).any():
        scores = torch.where(top_p[:, None] < 1, _nucleus(scores, (1 - top_p).float()[:, None]), scores)
    if min_p.any():
        scores = scores.masked_fill(scores < scores.amax(dim=-1, keepdim=True) + min_p.log()[:, None], -torch.inf)
    return scores


def _nucleus(scores: Tensor, spare: Tensor) -> Tensor:
    """scores [B, V] with -inf for the largest set of the lowest whose probability is at most spare [B, 1]; a row with
    nothing to spare comes out undefined."""
    probs = scores.softmax(dim=-1)
    # Tokens this unlikely have at most half of `spare` together, so none of them stays and none needs to be sorted.
    likely = (probs > spare / (2 * probs.shape[1])).count_nonzero(dim=-1) * (spare[:, 0] > 0)
    index = probs.topk(max(int(likely.max()), 1), sorted=False).indices.sort(dim=-1, descending=True).values
    # Ascending, so that small numbers are added first; stable, so that of equals the higher id goes first.
    ordered, order = probs.gather(1, index).sort(dim=-1, stable=True)
    rest = probs.scatter_(1, index, 0.0).sum(dim=-1, keepdim=True)
    excluded = ordered.cumsum(dim=-1) <= spare - rest
    excluded[:, -1] = False
    index = index.gather(1, order)
    kept = scores.gather(1, index).masked_fill(excluded, -torch.inf)
    return torch.full_like(scores, -torch.inf).scatter_(1, index, kept)


def _argmax(scores: Tensor) -> Tensor:
    """scores.argmax(dim=-1), the first among equals, several times as fast: [B, V] -> [B]."""
    blocks = _in_blocks(scores)
    block = blocks.amax(dim=2).argmax(dim=1)
    return block * W + blocks[torch.arange(len(block), device=block.device), block].argmax(dim=1)


def _gumbel_argmax(scores: Tensor, seeds: Tensor, steps: Tensor) -> Tensor:
    """(scores + gumbel_noise).argmax(dim=-1), the first among equals: [B, V] -> [B]."""
    scores = _in_blocks(scores)
    B, count, _ = scores.shape
    keys = _keys(seeds, steps)
    first, owner = first_ring([key[:, None] for key in keys], torch.arange(count, device=scores.device))
    highest = -first.log()  # [B, blocks]: the noise of each owner, and the bound of its block
    # The winner is no worse than the best owner. Whatever the scores, about W tokens a row could be better than that.
    owners = scores.gather(2, owner[:, :, None])[:, :, 0] + highest
    least = owners.amax(dim=1).clamp(min=torch.finfo(scores.dtype).min)
    rows, blocks = (scores.amax(dim=2) + highest >= least[:, None]).nonzero(as_tuple=True)
    bounds = scores[rows, blocks] + highest[rows, blocks, None]
    hits, places = (bounds >= least[rows, None]).nonzero(as_tuple=True)
    rows, blocks = rows[hits], blocks[hits]
    tokens = blocks * W + places
    noise = _noise([key[rows] for key in keys], tokens, first[rows, blocks], owner[rows, blocks])
    perturbed = scores.flatten(1)[rows, tokens] + noise
    best = scores.new_full((B,), -torch.inf).scatter_reduce(0, rows, perturbed, "amax")
    winners = perturbed == best[rows]
    return rows.new_zeros(B).scatter_reduce(0, rows[winners], tokens[winners], "amin", include_self=False)


def _in_blocks(scores: Tensor) -> Tensor:
    """[B, V] -> [B, blocks, W], the last block filled up with -inf."""
    if scores.shape[1] % W:
        scores = F.pad(scores, (0, -scores.shape[1] % W), value=-torch.inf)
    return scores.unflatten(1, (-1, W))


def gumbel_noise(seeds: Tensor, steps: Tensor, tokens: Tensor) -> Tensor:
    """Independent standard Gumbel noise, float32, of each token id; the int64 arguments broadcast."""
    keys = _keys(seeds, steps)
    return _noise(keys, tokens, *first_ring(keys, tokens // W))


def _noise(keys: Sequence[Tensor], tokens: Tensor, first: Tensor, owner: Tensor) -> Tensor:
    """`gumbel_noise` of tokens whose blocks' first rings are known."""
    later = first + _exponential(_hash(keys, tokens))
    return -torch.where(tokens % W == owner, first, later).log()


def first_ring(keys: Sequence[Tensor], blocks: Tensor) -> tuple[Tensor, Tensor]:
    """When the earliest of a block's W clocks rings, float32, and the place in the block of the token it belongs to."""
    time = _exponential(_hash(keys, 2**31 + 2 * blocks)) / W
    return time, _hash(keys, 2**31 + 2 * blocks + 1) % W


def _exponential(bits: Tensor) -> Tensor:
    """A unit exponential from 32 random bits: -log1p(-v), so that early rings, which decide draws, come from small v,
    where float32 is finest."""
    v = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log1p(-v)


def _keys(seeds: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Two 32-bit keys, in int64, of each (seed, step)."""
    return _mix((seeds & MASK) ^ _mix(steps)), _mix(((seeds >> 32) & MASK) + steps)


def _hash(keys: Sequence[Tensor], counters: Tensor) -> Tensor:
    """32 random bits in int64 for each counter below 2^32; keys and counters broadcast."""
    low, high = keys
    return _mix(_mix(counters ^ low) + high)


def _mix(x: Tensor) -> Tensor:
    """The 32-bit finaliser of MurmurHash3: every input bit flips every output bit with probability near 1/2."""
    x = x & MASK
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK
    return x ^ (x >> 16)


def triton_draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor,
                steps: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`draw` by the kernel below, whose searches for the filters' edges read a copy of what can be near them."""
    logits = logits.contiguous()
    tokens, logprobs = torch.empty_like(seeds), torch.empty_like(temperature)
    if len(logits):
        _draw_row[(len(logits),)](
            logits, torch.empty_like(logits), temperature, top_k, top_p, min_p, seeds, steps, tokens, logprobs,
            logits.shape[1], W=W, TILE=TILE, num_warps=16,
        )  # fmt: skip
    return tokens, logprobs


if triton is not None:

    @triton.jit
    def _draw_row(
        logits, copy, temperature, top_k, top_p, min_p, seeds, steps, tokens, logprobs, V,
        W: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        """Program r draws row r. Its filters come down to one edge: scores above it stay, and of those equal to it the
        ids up to `last`. Whatever can be at an edge is copied first, so that the searches read little."""
        row = tl.program_id(0).to(tl.int64)
        logits, copy = logits + row * V, copy + row * V
        heat = tl.load(temperature + row)
        greedy = heat == 0
        heat = tl.where(greedy, 1.0, heat)
        k, p, m = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
        limited, partial = (k > 0) & ~greedy, (p < 1) & ~greedy

        lanes = tl.full([TILE], float("-inf"), tl.float32)  # the largest score in each column of tiles
        for start in range(0, V, TILE):
            lanes = tl.maximum(lanes, _load_tile(logits, start, V, heat, TILE)[1])
        peak = tl.max(lanes, 0)
        edge, last = tl.full((), float("-inf"), tl.float32), V
        if limited:  # the k-th best score is no worse than the k-th best lane
            tl.store(copy + tl.arange(0, TILE), lanes, mask=tl.arange(0, TILE) < V)
            tl.debug_barrier()  # what one thread has stored others read
            edge = _find_edge(k, edge, peak, copy, tl.minimum(V, TILE), False, TILE)
            tl.debug_barrier()
        elif partial:  # as in _nucleus, where probabilities relative to the best token's add up to at least 1
            edge = peak + tl.log(((1 - p) / (2 * V)).to(tl.float32))
        masses = tl.zeros([TILE], tl.float32)
        n = 0  # scores in the copy
        for start in range(0, V, TILE):
            ids, scores = _load_tile(logits, start, V, heat, TILE)
            masses += tl.exp(scores - peak)
            if limited | partial:
                near = (scores >= edge) & (ids < V)
                tl.store(copy + n + tl.cumsum(near.to(tl.int32), 0) - 1, scores, mask=near)
                n += tl.sum(near.to(tl.int32), 0)
        total = tl.sum(masses, 0)
        tl.debug_barrier()

        whole = total
        if limited:
            edge = _find_edge(k, edge, peak, copy, n, False, TILE)
            whole = _sum_from(edge, peak, copy, n, True, TILE)
        if partial:
            target = (p * whole).to(tl.float32)
            edge = _find_edge(target, edge, peak, copy, n, True, TILE)
            above = _float(_integer(edge) + 1)
            ties = _sum_from(edge, peak, copy, n, False, TILE) - _sum_from(above, peak, copy, n, False, TILE)
            kept = tl.ceil((target - _sum_from(above, peak, copy, n, True, TILE)) / tl.exp(edge - peak))
            if kept < ties:
                last = _find_tie(tl.maximum(kept, 1.0), edge, logits, V, heat, TILE)
        if m > 0 and peak + tl.log(m) > edge:
            edge, last = peak + tl.log(m), V

        seed, step = tl.load(seeds + row), tl.load(steps + row).to(tl.uint32)
        key_low = _mix32(seed.to(tl.uint32) ^ _mix32(step))
        key_high = _mix32((seed >> 32).to(tl.uint32) + step)
        best, token = tl.full((), float("-inf"), tl.float32), tl.full((), 0, tl.int32)
        for start in range(0, V, TILE):
            ids, scores = _load_tile(logits, start, V, heat, TILE)
            scores = tl.where((scores > edge) | ((scores == edge) & (ids <= last)), scores, float("-inf"))
            ids, scores = tl.reshape(ids, (TILE // W, W)), tl.reshape(scores, (TILE // W, W))
            block = (start // W + tl.arange(0, TILE // W)).to(tl.uint32)
            first = _exponential32(_hash32(0x80000000 + 2 * block, key_low, key_high)) / W  # [blocks]
            bound = tl.where(greedy, 0.0, -tl.log(first))
            if tl.max(tl.max(scores, 1) + bound, 0) > best:  # only then can a token of this tile win
                owner = (_hash32(0x80000001 + 2 * block, key_low, key_high) % W).to(tl.int32)
                later = first[:, None] + _exponential32(_hash32(ids.to(tl.uint32), key_low, key_high))
                time = tl.where(ids % W == owner[:, None], first[:, None], later)
                perturbed = scores + tl.where(greedy, 0.0, -tl.log(time))
                highest = tl.max(perturbed)
                if highest > best:
                    best, token = highest, tl.min(tl.where(perturbed == highest, ids, V))
        tl.store(tokens + row, token.to(tl.int64))
        tl.store(logprobs + row, tl.load(logits + token) / heat - peak - tl.log(total))

    @triton.jit
    def _load_tile(logits, start, V, heat, TILE: tl.constexpr):
        """Ids and scores from id `start` on; -inf from V on."""
        ids = start + tl.arange(0, TILE)
        return ids, tl.load(logits + ids, mask=ids < V, other=float("-inf")) / heat

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
    def _find_tie(number, edge, logits, V, heat, TILE: tl.constexpr):
        """The id of that number, from 1, among the scores equal to `edge`."""
        seen, found = 0, V
        for start in range(0, V, TILE):
            ids, scores = _load_tile(logits, start, V, heat, TILE)
            tie = (scores == edge).to(tl.int32)
            right = (tie > 0) & (seen + tl.cumsum(tie, 0) == number)
            found = tl.minimum(found, tl.min(tl.where(right, ids, V), 0))
            seen += tl.sum(tie, 0)
        return found

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

    @triton.jit
    def _exponential32(bits):
        """As `_exponential`. There is no log1p here: log(u) v / (1 - u) repairs the rounding of u = 1 - v (Kahan)."""
        v = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1 - 5.9604644775390625e-08)
        u = 1 - v
        return tl.where(u == 1, v, -tl.log(u) * (v / tl.where(u == 1, 1.0, 1 - u)))

    @triton.jit
    def _hash32(counters, key_low, key_high):
        return _mix32(_mix32(counters ^ key_low) + key_high)

    @triton.jit
    def _mix32(x):
        x = (x ^ (x >> 16)) * 0x85EBCA6B
        x = (x ^ (x >> 13)) * 0xC2B2AE35
        return x ^ (x >> 16)
