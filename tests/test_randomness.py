"""Seeds, permutations and Gumbel noise: pinned values, an independent pure-Python twin, and statistics."""

import math

import pytest
import torch

from nanosafe.randomness import _mix, derive_seed, gumbel_noise, permutation, shuffled_passes

EULER = 0.5772156649
SEED = derive_seed("test")


def fmix32(x: int) -> int:
    """MurmurHash3's finaliser on Python's unbounded ints."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def python_noise(seed: int, step: int, token: int) -> float:
    """What gumbel_noise documents, one number at a time in float64."""
    low, high = fmix32(seed % 2**32 ^ fmix32(step)), fmix32((seed // 2**32 + step) % 2**32)
    bits = fmix32((fmix32(token ^ low) + high) % 2**32)
    return -math.log(-math.log1p(-(bits + 0.5) / 2**32))


def z_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Correlation of two samples in standard errors of the estimate."""
    return float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]) * a.numel() ** 0.5


def test_hash_has_the_published_values_of_murmurhash3():
    # MurmurHash3_x86_32 of the empty string is the finaliser of its seed
    assert [int(_mix(torch.tensor(x))) for x in (0, 1, 0xFFFFFFFF)] == [0, 0x514E28B7, 0x81F16F39]


def test_noise_equals_the_pure_python_hash():
    seeds, steps, tokens = [1, 2**31 + 5, 2**63 - 1, SEED], [0, 1, 4095, 2**20], [0, 1, 2, 149, 1023, 9999]
    ours = gumbel_noise(torch.tensor(seeds), torch.tensor(steps), 10_000)
    assert ours.dtype == torch.float32
    for row, (seed, step) in enumerate(zip(seeds, steps, strict=True)):
        expected = [python_noise(seed, step, token) for token in tokens]
        assert ours[row, tokens].tolist() == pytest.approx(expected, abs=2e-6)


def test_values_are_pinned():
    """These numbers are part of what a seed means: a change here changes every seeded result."""
    assert derive_seed(7, "rollout", 3) == 0xA02590B3AC4A5883 >> 1  # printf "(7, 'rollout', 3)" | b2sum -l 64
    assert permutation(10, 0, "prompts") == (4, 6, 1, 5, 0, 7, 2, 8, 9, 3)
    noise = gumbel_noise(torch.tensor([1234567890123456789]), torch.tensor([5]), 4)
    assert noise[0].tolist() == pytest.approx([-0.475144, -1.502149, 0.130296, 0.080988], abs=1e-5)


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
    rows, V = 1000, 1000
    if varied == "seed":  # the worst seeds: neighbours, not hashed ones
        noise = gumbel_noise(torch.arange(rows) + SEED, torch.zeros(rows, dtype=torch.int64), V).double()
    else:
        noise = gumbel_noise(torch.full((rows,), SEED), torch.arange(rows), V).double()
    # bounds of 4 standard errors; Var(s^2) = sigma^4 (kurtosis - 1) / n with the Gumbel's kurtosis 5.4
    assert abs(noise.mean() - EULER) < 4 * (math.pi**2 / 6 / noise.numel()) ** 0.5
    assert abs(noise.var() - math.pi**2 / 6) < 4 * math.pi**2 / 6 * (4.4 / noise.numel()) ** 0.5
    # Kolmogorov-Smirnov: sup |F_n - F| sqrt(n) passes 1.95 with probability 1e-3
    cdf = torch.exp(-torch.exp(-noise.flatten().sort().values))
    assert (cdf - (torch.arange(cdf.numel()) + 0.5) / cdf.numel()).abs().max() * cdf.numel() ** 0.5 < 1.95
    for a, b in (
        (noise[1:], noise[:-1]),
        (noise[:, 1:], noise[:, :-1]),
        (noise[1:, 1:], noise[:-1, :-1]),
        (noise[1:, :-1], noise[:-1, 1:]),
    ):
        assert abs(z_correlation(a, b)) < 4
        assert abs(z_correlation(a.square(), b.square())) < 4


def test_noise_is_bounded_and_never_repeats():
    noise = gumbel_noise(torch.full((40,), SEED), torch.arange(40), 50_000)
    # by construction: the smallest uniform is 2^-33, the largest 1 - 2^-24
    assert noise.isfinite().all() and noise.max() < 22.9 and noise.min() > -2.82
    assert noise.max() > 10 and noise.min() < -2.3  # two million draws reach far into both tails
    assert len({tuple(row[:8].tolist()) for row in noise}) == 40
    other = gumbel_noise(torch.full((40,), SEED + 2**32), torch.arange(40), 50_000)  # differs above the low 32 bits
    assert not (noise[:, :100] == other[:, :100]).any(dim=1).all()


def test_the_smallest_and_the_largest_hash_give_finite_noise():
    """Words that no sample of tests would meet: each is the hash of token 0 for a seed that is found backwards."""

    def unmix(x: int) -> int:
        x = (x ^ (x >> 16)) * pow(0xC2B2AE35, -1, 2**32) % 2**32
        x = (x ^ (x >> 13) ^ (x >> 26)) * pow(0x85EBCA6B, -1, 2**32) % 2**32
        return x ^ (x >> 16)

    assert unmix(fmix32(123456789)) == 123456789
    # the low word of the seed, the step and the token are 0, which hash to 0; only the high word is left
    seeds = torch.tensor([unmix(unmix(word)) for word in (0, 2**32 - 1)]) << 32
    smallest, largest = gumbel_noise(seeds, torch.zeros(2, dtype=torch.int64), 1)[:, 0].tolist()
    assert smallest == pytest.approx(33 * math.log(2), abs=1e-5)  # -log(2^-33)
    assert largest == pytest.approx(-math.log(24 * math.log(2)), abs=1e-5)  # float32 ends at 1 - 2^-24
