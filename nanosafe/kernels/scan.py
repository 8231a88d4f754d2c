"""What a Mamba-2 layer does along time: a short causal convolution, and a linear recurrence of a matrix-valued state.

Of each head, with state S [P, S], input x_t [P], step dt_t, decay rate A < 0, and B_t, C_t [S] shared by a group of
heads (Mamba-2, arXiv 2405.21060, section 2):

    S_t = exp(dt_t * A) * S_{t-1} + dt_t * x_t B_t^T        y_t = S_t C_t

`scan` computes it for whole documents, chunk by chunk (section 6 of the paper): inside a chunk all pairs of tokens at
once, as attention whose weights are decays (compiled on CUDA), and from chunk to chunk the state. Documents are packed
one behind the other and know nothing of each other. `scan_step` does one token, on CUDA by a Triton kernel with a plain
twin. The recurrence is in float32.
"""

import torch
from torch import Tensor

from nanosafe.kernels import INTERPRETED, tl, triton
from nanosafe.kernels.compiled import compiled


class Segments:
    """Lengths of packed documents, and where their tokens go to be convolved and scanned: made once for all layers."""

    def __init__(self, lengths: list[int], device: torch.device | str):
        self.lengths, self.device = lengths, device
        self._windows: dict[int, Windows] = {}
        self._chunks: dict[int, Chunks] = {}

    def windows(self, size: int) -> "Windows":
        if size not in self._windows:
            self._windows[size] = Windows(self.lengths, size, self.device)
        return self._windows[size]

    def chunks(self, size: int) -> "Chunks":
        if size not in self._chunks:
            self._chunks[size] = Chunks(self.lengths, size, self.device)
        return self._chunks[size]


class Windows:
    """Documents with `size` - 1 rows of their past before each: one convolution over all then mixes no two of them."""

    def __init__(self, lengths: list[int], size: int, device: torch.device | str):
        before, n = size - 1, torch.tensor(lengths)
        past = n.cumsum(0) - n + before * torch.arange(len(n))  # [documents] the first row of each past
        document = torch.repeat_interleave(n)
        rows = torch.arange(before)
        # One row more, so that there is a window even without a token.
        self.rows = int(n.sum()) + before * len(n) + 1
        self.tokens = (torch.arange(len(document)) + before * (document + 1)).to(device)  # [N]
        self.past = (past[:, None] + rows).to(device)  # [documents, size - 1]
        self.last = ((past + n)[:, None] + rows).to(device)  # the past of the tokens to come


class Chunks:
    """Documents cut into chunks of `size` tokens, the last one filled up, each document at least one chunk.

    They lie in rounds: the first chunk of every document, then the second of all that have one, ... The documents are
    in order of length, the longest first, so that those of a round are the first of those of the round before.
    """

    def __init__(self, lengths: list[int], size: int, device: torch.device | str):
        self.size = max(1, min(size, max(lengths)))
        n = torch.tensor(lengths)
        # An empty document, too, must give every weight its gradient.
        counts = (-(-n // self.size)).clamp(min=1)
        order = counts.argsort(descending=True, stable=True)
        self.rounds = [int((counts > r).sum()) for r in range(int(counts.max()))]  # documents in each
        starts = torch.tensor([0, *self.rounds]).cumsum(0)
        document = torch.repeat_interleave(n)
        position = torch.arange(len(document)) - (n.cumsum(0) - n)[document]
        chunk = starts[position // self.size] + order.argsort()[document]
        self.places = (chunk * self.size + position % self.size).to(device)  # [N]
        self.order, self.rank = order.to(device), order.argsort().to(device)  # [documents]

    def cut(self, x: Tensor) -> Tensor:
        """[N, ...] in float32 -> [chunks, size, ...], zeros where a chunk is filled up."""
        x = x.float()
        chunks = x.new_zeros(sum(self.rounds) * self.size, *x.shape[1:])
        return chunks.index_copy(0, self.places, x).unflatten(0, (-1, self.size))

    def join(self, x: Tensor) -> Tensor:
        """The inverse of `cut`."""
        return x.flatten(0, 1).index_select(0, self.places)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, segments: Segments, past: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Each channel of x [N, C] convolved with its weight [C, 1, K] over the token itself and the K - 1 before it.

    past [documents, K - 1, C]: what came before each document (None: zeros). Returns [N, C] and the new past.

    A product for each of the K taps, in float32: PyTorch's convolution of float32 on CUDA would round to TF32.
    """
    windows = segments.windows(weight.shape[2])
    padded = x.new_zeros(windows.rows, x.shape[1]).index_copy(0, windows.tokens, x)
    if past is not None:
        padded = padded.index_copy(0, windows.past.flatten(), past.flatten(0, 1))
    taps, rows, before = weight[:, 0].T.float(), padded.float(), weight.shape[2] - 1
    last = len(rows) - before
    out = rows[:last] * taps[0]
    if bias is not None:
        out = out + bias.float()
    for k, tap in enumerate(taps[1:], start=1):
        out = torch.addcmul(out, rows[k : k + last], tap)  # row i sees `padded` from i to i + before
    return out.to(x.dtype).index_select(0, windows.tokens - before), padded[windows.last]


def convolve_step(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor) -> tuple[Tensor, Tensor]:
    """`convolve` of one token x [B, C] of each of B sequences with past [B, K - 1, C]."""
    window = torch.cat((past, x[:, None]), dim=1)  # [B, K, C]
    out = (window.float() * weight[:, 0].T.float()).sum(1)
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype), window[:, 1:]


def scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, segments: Segments, chunk_size: int,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The recurrence over packed documents: x [N, H, P], dt [N, H] and A [H] in float32, B and C [N, G, S].

    state [documents, H, P, S]: with which each document begins (None: zeros). Returns y [N, H, P] and the states at the
    documents' ends, float32. chunk_size decides speed and memory, [chunks, H, size, size] float32, not the result.
    """
    chunks, groups = segments.chunks(chunk_size), B.shape[1]
    # Where a chunk is filled up, dt is 0: no step.
    x, dt, B, C = chunks.cut(x), chunks.cut(dt), chunks.cut(B), chunks.cut(C)
    scan_within = compiled(within) if x.is_cuda else within
    y, added, kept, reach = scan_within(x, dt, A, B, C)
    if state is None:
        state = added.new_zeros(len(segments.lengths), *added.shape[1:])
    else:
        state = state[chunks.order].float()
    # From round to round fewer documents go on; those that end leave the rear, the shortest first.
    before, ended = [], []
    rounds = zip(chunks.rounds, added.split(chunks.rounds), kept.split(chunks.rounds), strict=True)
    for count, round_added, round_kept in rounds:
        state, finished = state.split([count, len(state) - count])
        ended.append(finished)
        before.append(state)
        state = state * round_kept + round_added
    final = torch.cat([state, *reversed(ended)])[chunks.rank]
    states = torch.cat(before).unflatten(1, (groups, -1))  # [chunks, G, H / G, P, S]
    y = y + torch.einsum("clgs,cghps->clghp", C, states) * reach
    return chunks.join(y.flatten(2, 3)), final


def within(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a chunk does by itself: x [chunks, L, H, P], dt [chunks, L, H], A [H], B and C [chunks, L, G, S], float32.

    Returns y [chunks, L, G, H / G, P] as if each chunk began without a state; what it adds to the state by its end
    [chunks, H, P, S]; how far it decays the state it finds by its end, and by each token, both to be multiplied.
    """
    u = (x * dt[..., None]).unflatten(2, (B.shape[2], -1))  # [chunks, L, G, H / G, P]
    # Sums of log-decays reach thousands where their differences are what counts: in float32 those would be rounded.
    logs = (dt * A).double().cumsum(1).unflatten(2, (B.shape[2], -1))
    logs = logs.permute(0, 2, 3, 1)  # [chunks, G, H / G, L]
    # Token l sees token m <= l, decayed by all the steps between.
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    decays = (logs[..., :, None] - logs[..., None, :]).float().masked_fill(future, -torch.inf).exp()
    pairs = torch.einsum("clgs,cmgs->cglm", C, B)[:, :, None]
    y = torch.einsum("cghlm,cmghp->clghp", pairs * decays, u)
    left = (logs[..., -1:] - logs).float().exp().permute(0, 3, 1, 2)[..., None]
    added = torch.einsum("clghp,clgs->cghps", u * left, B).flatten(1, 2)
    kept = logs[..., -1].float().exp().flatten(1, 2)[..., None, None]
    return y, added, kept, logs.float().exp().permute(0, 3, 1, 2)[..., None]


def scan_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, states: Tensor, slots: Tensor) -> Tensor:
    """`scan` of one token of each of N sequences: x [N, H, P], dt [N, H] and A [H] in float32, B and C [N, G, S].

    states [slots, H, P, S] float32, changed in place: sequence i has the one in slots[i]. Returns y [N, H, P], float32.
    """
    if triton is not None and (x.is_cuda or INTERPRETED):
        return triton_scan_step(x, dt, A, B, C, states, slots)
    return plain_scan_step(x, dt, A, B, C, states, slots)


def plain_scan_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, states: Tensor, slots: Tensor) -> Tensor:
    """`scan_step` on a copy of the states."""
    group = x.shape[1] // B.shape[1]
    B = B.float().repeat_interleave(group, dim=1)  # [N, H, S]
    C = C.float().repeat_interleave(group, dim=1)
    state = states.index_select(0, slots).mul_((dt * A).exp()[..., None, None])
    state.addcmul_((x * dt[..., None])[..., None], B[:, :, None])
    states.index_copy_(0, slots, state)
    return torch.matmul(state, C[..., None])[..., 0]


def triton_scan_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, states: Tensor, slots: Tensor) -> Tensor:
    """`scan_step` by the kernel below, which reads and writes every state once, where it lies."""
    (N, H, P), (G, S) = x.shape, B.shape[1:]
    assert states.is_contiguous() and states.dtype == torch.float32
    y = torch.empty(N, H, P, dtype=torch.float32, device=x.device)
    _step[N, H](
        x.contiguous(), dt.contiguous(), A.contiguous(), B.contiguous(), C.contiguous(),
        states, slots.contiguous(), y,
        GROUP=H // G, P=P, S=S, ROWS=triton.next_power_of_2(P), COLUMNS=triton.next_power_of_2(S), num_warps=4,
    )
    return y


if triton is not None:

    @triton.jit
    def _step(
        x, dt, A, B, C, states, slots, y,
        GROUP: tl.constexpr, P: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):
        """Program (sequence, head): its state in place, and y."""
        sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        one = sequence * tl.num_programs(1) + head  # in [0, N * H)
        row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        shared = (one // GROUP) * S + column  # H is a multiple of GROUP, so this counts groups over the sequences
        b = tl.load(B + shared, mask=column < S, other=0.0).to(tl.float32)
        c = tl.load(C + shared, mask=column < S, other=0.0).to(tl.float32)
        step = tl.load(dt + one)
        u = tl.load(x + one * P + row, mask=row < P, other=0.0).to(tl.float32) * step
        slot = tl.load(slots + sequence).to(tl.int64)
        place = ((slot * tl.num_programs(1) + head) * P + row[:, None]) * S + column[None, :]
        inside = (row < P)[:, None] & (column < S)[None, :]
        state = tl.load(states + place, mask=inside, other=0.0) * tl.exp(step * tl.load(A + head))
        state += u[:, None] * b[None, :]
        tl.store(states + place, state, mask=inside)
        tl.store(y + one * P + row, tl.sum(state * c[None, :], 1), mask=row < P)
