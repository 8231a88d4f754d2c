"""Seeds, permutations and noise: pinned values, an independent pure-Python twin, and statistics."""

import math

import pytest
import torch

from nanosafe.kernels.noise import W, first_ring, gumbel_noise, mix, noise_keys
from nanosafe.randomness import derive_seed, permutation, shuffled_passes

EULER = 0.5772156649
SEED = derive_seed("test")


def fmix32(x: int) -> int:
    """MurmurHash3's finaliser on Python's unbounded ints."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def unmix(x: int) -> int:
    """The inverse of fmix32."""
    x = (x ^ (x >> 16)) * pow(0xC2B2AE35, -1, 2**32) % 2**32
    x = (x ^ (x >> 13) ^ (x >> 26)) * pow(0x85EBCA6B, -1, 2**32) % 2**32
    return x ^ (x >> 16)


def seed_for(word: int, counter: int) -> int:
    """The seed, as int64 has it, for which at step 0 the hash of `counter` is `word`."""
    # The step and the seed's low word are 0, which hash to 0; the high word is left to choose.
    high = unmix((unmix(word) - fmix32(counter)) % 2**32)
    return (high - (high >> 31 << 32)) << 32


def python_noise(seed: int, step: int, token: int) -> float:
    """The Gumbel noise of a token in float64, one number at a time: -log of when its clock rings."""
    low, high = fmix32(seed % 2**32 ^ fmix32(step)), fmix32((seed // 2**32 + step) % 2**32)

    def bits(counter: int) -> int:
        return fmix32((fmix32(counter ^ low) + high) % 2**32)

    def exponential(counter: int) -> float:
        return -math.log1p(-(bits(counter) + 0.5) / 2**32)

    block, place = divmod(token, 128)
    time = exponential(2**31 + 2 * block) / 128
    if bits(2**31 + 2 * block + 1) % 128 != place:
        time += exponential(token)
    return -math.log(time)


def noise_of(seeds, steps, tokens) -> torch.Tensor:
    """Every row's noise of `tokens`: sequences of B and B ints -> [B, len(tokens)]."""
    return gumbel_noise(torch.tensor(seeds)[:, None], torch.tensor(steps)[:, None], torch.tensor(tokens))


def z_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Correlation of two samples in standard errors of the estimate."""
    return float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]) * a.numel() ** 0.5


def kolmogorov_smirnov(cdf: torch.Tensor) -> float:
    """sup |F_n - F| sqrt(n) of a sample whose F is given; it passes 1.95 with probability 1e-3."""
    cdf = cdf.flatten().sort().values
    return float((cdf - (torch.arange(cdf.numel()) + 0.5) / cdf.numel()).abs().max()) * cdf.numel() ** 0.5


def chi_square_z(counts: torch.Tensor) -> float:
    """The chi-square statistic of counts that should be equal, in its standard deviations."""
    expected = counts.sum() / len(counts)
    freedom = len(counts) - 1
    return float(((counts - expected).square() / expected).sum() - freedom) / (2 * freedom) ** 0.5


def test_hash_has_the_published_values_of_murmurhash3():
    # MurmurHash3_x86_32 of the empty string is the finaliser of its seed
    assert [int(mix(torch.tensor(x))) for x in (0, 1, 0xFFFFFFFF)] == [0, 0x514E28B7, 0x81F16F39]


def test_noise_equals_the_pure_python_hash():
    seeds, steps = [1, 2**31 + 5, 2**63 - 1, SEED], [0, 1, 4095, 2**20]
    tokens = [0, 1, 2, 127, *range(128, 256), 9999, 151_935]  # a whole block, so owners too
    ours = noise_of(seeds, steps, tokens)
    assert ours.dtype == torch.float32
    for row, seed, step in zip(ours, seeds, steps, strict=True):
        assert row.tolist() == pytest.approx([python_noise(seed, step, token) for token in tokens], abs=5e-6)
        keys = noise_keys(torch.tensor(seed), torch.tensor(step))
        assert row[4:132].max() == -first_ring(keys, torch.tensor(1))[0].log()


def test_values_are_pinned():
    """These numbers are part of what a seed means: a change here changes every seeded result."""
    assert derive_seed(7, "rollout", 3) == 0xA02590B3AC4A5883 >> 1  # printf "(7, 'rollout', 3)" | b2sum -l 64
    assert permutation(10, 0, "prompts") == (4, 6, 1, 5, 0, 7, 2, 8, 9, 3)
    noise = noise_of([1234567890123456789], [5], [0, 1, 2, 3, 200])
    assert noise[0].tolist() == pytest.approx([-0.475745, -1.502364, 0.129195, 0.07994, 0.005047], abs=1e-5)


def test_derived_seeds_are_63_bits_and_tell_parts_apart():
    parts = [(1,), ("1",), (1, 2), (2, 1), (12,), (1, "a"), ("a", 1), (-1,), ()]
    seeds = [derive_seed(*p) for p in parts] + [derive_seed(i) for i in range(2, 2000) if i != 12]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= s < 2**63 for s in seeds) and max(seeds) > 2**62  # an int64 tensor can hold them


def test_permutations_and_passes():
    assert sorted(permutation(50, 3)) == list(range(50)) and permutation(50, 3) != permutation(50, 4)
    passes = shuffled_passes(7, range(21), 0, "rows")
    for start in (0, 7, 14):
        assert sorted(passes[start : start + 7]) == list(range(7))
    assert len({tuple(passes[start : start + 7]) for start in (0, 7, 14)}) == 3
    # a step that straddles two passes reads the same endless row
    assert shuffled_passes(7, range(5, 12), 0, "rows") == passes[5:12]
    assert shuffled_passes(7, range(21), 1, "rows") != passes


@pytest.mark.parametrize("varied", ["seed", "step"])
def test_noise_has_the_gumbel_distribution_without_visible_correlation(varied):
    rows, V = 1000, 8 * W
    many = range(rows)  # the worst seeds: neighbours, not hashed ones
    seeds, steps = ([SEED + i for i in many], [0] * rows) if varied == "seed" else ([SEED] * rows, many)
    noise = noise_of(seeds, steps, range(V)).double()
    # bounds of 4 standard errors; Var(s^2) = sigma^4 (kurtosis - 1) / n with the Gumbel's kurtosis 5.4
    assert abs(noise.mean() - EULER) < 4 * (math.pi**2 / 6 / noise.numel()) ** 0.5
    assert abs(noise.var() - math.pi**2 / 6) < 4 * math.pi**2 / 6 * (4.4 / noise.numel()) ** 0.5
    assert kolmogorov_smirnov(torch.exp(-torch.exp(-noise))) < 1.95
    for a, b in (
        (noise[1:], noise[:-1]),
        (noise[:, 1:], noise[:, :-1]),  # mostly of one block
        (noise[:, W:], noise[:, :-W]),  # the same place of neighbouring blocks
        (noise[1:, 1:], noise[:-1, :-1]),
        (noise[1:, :-1], noise[:-1, 1:]),
    ):
        assert abs(z_correlation(a, b)) < 4
        assert abs(z_correlation(a.square(), b.square())) < 4
    # Were the tokens of a block or of a row correlated at all, however little each pair, their sums would show it.
    for sums in (noise.view(-1, W).sum(1), noise.sum(1)):
        z = (sums - sums.mean()) / (math.pi**2 / 6 * noise.numel() / len(sums)) ** 0.5
        assert abs(z.square().mean() - 1) < 4 * (2 / len(sums)) ** 0.5


def test_the_clocks_of_a_block_ring_as_independent_ones_do():
    """Of n unit exponentials the gaps between successive rings are independent exponentials of rates n, n - 1, ... 1,
    in uniformly random order (Renyi 1953)."""
    blocks = 8000
    times = torch.exp(-noise_of([SEED + i for i in range(1000)], [3] * 1000, range(8 * W)).double()).view(blocks, W)
    rings, order = times.sort(dim=1)
    gaps = rings.diff(dim=1, prepend=torch.zeros(blocks, 1)) * torch.arange(W, 0, -1)  # [blocks, W] unit exponentials
    for i in (0, 1, 2, W // 2, W - 1):
        assert kolmogorov_smirnov(1 - torch.exp(-gaps[:, i])) < 1.95
        assert abs(chi_square_z(torch.bincount(order[:, i], minlength=W))) < 4
    for i, j in ((0, 1), (1, 2), (0, W - 1)):
        assert abs(z_correlation(gaps[:, i], gaps[:, j])) < 4
        assert abs(z_correlation(order[:, i].double(), order[:, j] + 0.0)) < 4
        assert abs(z_correlation(order[:, i].double(), gaps[:, j])) < 4
    differences = (order[:, 0] - order[:, 1]) % W  # never 0, the others equally often
    assert abs(chi_square_z(torch.bincount(differences, minlength=W)[1:])) < 4
    # the block that rings first is each of a row's equally often
    assert abs(chi_square_z(torch.bincount(rings[:, 0].view(-1, 8).argmin(dim=1)))) < 4


def test_noise_is_bounded_and_never_repeats():
    noise = noise_of([SEED] * 40, range(40), range(50_000))
    # by construction: the smallest uniform is 2^-33, the largest 1 - 2^-24
    assert noise.isfinite().all() and noise.max() < 40 * math.log(2) + 1e-5 and noise.min() > -2.83
    assert noise.max() > 10 and noise.min() < -2.3  # two million draws reach far into both tails
    assert len({tuple(row[:8].tolist()) for row in noise}) == 40
    other = noise_of([SEED + 2**32] * 40, range(40), range(100))  # differs above the low 32 bits
    assert not (noise[:, :100] == other).any(dim=1).all()


def test_the_smallest_and_the_largest_hash_give_finite_noise():
    """Words that no sample of tests would meet: each is the hash of one counter for a seed that is found backwards."""
    assert unmix(fmix32(123456789)) == 123456789
    words = (0, 2**32 - 1)
    highest = noise_of([seed_for(word, 2**31) for word in words], [0, 0], range(W)).amax(dim=1)  # the clock of block 0
    # -log(2^-33 / W), and float32 ends at 1 - 2^-24
    assert highest.tolist() == pytest.approx([40 * math.log(2), -math.log(24 * math.log(2) / W)], abs=1e-5)
    seeds = [seed_for(word, 5) for word in words]  # the clock of token 5
    first, owner = first_ring(noise_keys(torch.tensor(seeds), torch.tensor(0)), torch.tensor(0))
    later = torch.exp(-noise_of(seeds, [0, 0], [5])[:, 0]) - first
    assert 5 not in owner and later.tolist() == pytest.approx([2.0**-33, 24 * math.log(2)], rel=1e-5, abs=1e-8)
