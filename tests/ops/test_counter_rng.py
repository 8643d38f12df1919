from __future__ import annotations

import pytest
import torch

from xconv_fx.ops import counter_rng as xhash

COUNT = 1 << 16
SEED = 12345678901234567


def draw(seed: int = SEED, stream: int = 0, count: int = COUNT) -> torch.Tensor:
    index = torch.arange(count, dtype=torch.int32)
    return xhash.random_bits(index, torch.tensor([seed]), stream)


def bit_planes(words: torch.Tensor) -> torch.Tensor:
    return torch.stack([(words >> bit) & 1 for bit in range(32)]).double()


def test_matches_arithmetic_on_python_integers():
    def reference(index: int, low: int, high: int, constants: tuple[int, int]) -> int:
        def mix(word: int) -> int:
            word &= 0xFFFFFFFF
            word = (word ^ (word >> 16)) * 0x7FEB352D & 0xFFFFFFFF
            word = (word ^ (word >> 15)) * 0x846CA68B & 0xFFFFFFFF
            return word ^ (word >> 16)

        halves = mix(low ^ constants[0]), mix(high ^ constants[1])
        first, second = mix(halves[0] ^ halves[1]), mix(halves[0] + halves[1])
        word = (index ^ first) & 0xFFFFFFFF
        word = (word ^ (word >> 16)) * 0x7FEB352D & 0xFFFFFFFF
        word = ((word ^ (word >> 15)) + second) * 0x846CA68B & 0xFFFFFFFF
        return xhash.signed(word ^ (word >> 16))

    seed = (1 << 62) - 987654321
    words = draw(seed, stream=2, count=50).tolist()
    low, high = seed & 0xFFFFFFFF, seed >> 32
    assert words == [reference(index, low, high, xhash.constants(2)) for index in range(50)]


def test_every_bit_is_fair_and_bits_are_uncorrelated():
    planes = bit_planes(draw()) - 0.5
    assert planes.mean(1).abs().max() < 5 * 0.5 / COUNT**0.5
    correlation = 4 * planes @ planes.T / COUNT - torch.eye(32)
    assert correlation.abs().max() < 5 / COUNT**0.5


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"seed": 2**31}, {"stream": 1}],
    ids=str,
)
def test_neighbouring_keys_are_independent(other):
    # Every pair of bits of the two streams, and no shared value beyond what chance brings: one in COUNT**2 / 2**32.
    first, second = draw(), draw(SEED + other.get("seed", 0), other.get("stream", 0))
    correlation = 4 * (bit_planes(first) - 0.5) @ (bit_planes(second) - 0.5).T / COUNT
    assert correlation.abs().max() < 5.5 / COUNT**0.5
    pairs = 40
    seeds = [SEED * (number + 1) % 2**62 for number in range(pairs)]
    drawn = ((draw(seed), draw(seed + other.get("seed", 0), other.get("stream", 0))) for seed in seeds)
    assert sum(torch.isin(*pair).sum().item() for pair in drawn) < 3 * pairs


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 256, 4096])
def test_neighbouring_indices_are_independent(lag):
    planes = bit_planes(draw()) - 0.5
    correlation = 4 * planes[:, lag:] @ planes[:, :-lag].T / (COUNT - lag)
    assert correlation.abs().max() < 5.5 / (COUNT - lag) ** 0.5


def test_uniform_is_uniform_and_below_one():
    values = xhash.uniform(draw()).double()
    assert values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 5 / (12 * COUNT) ** 0.5
    assert abs(values.var() - 1 / 12) < 5 / (180 * COUNT) ** 0.5
    counts = torch.histc(values, 256, 0, 1)
    chi_square = ((counts - COUNT / 256) ** 2 / (COUNT / 256)).sum()
    assert 255 - 5 * 510**0.5 < chi_square < 255 + 5 * 510**0.5
    largest = xhash.uniform(torch.tensor([-1], dtype=torch.int32))
    assert largest.item() == 1 - 2.0**-24


@pytest.mark.parametrize("count", [16, 14, 1])
def test_halves_are_those_of_the_hash(count):
    index = torch.arange(COUNT, dtype=torch.int32)
    lower, upper = xhash.random_halves(index, count, torch.tensor([SEED]))
    words, mask = draw().long(), (1 << count) - 1
    assert torch.equal(lower.long(), words & mask) and torch.equal(upper.long(), words >> 16 & mask)


def test_signs_are_plus_or_minus_one():
    signs = xhash.random_signs(draw(), bit=5, dtype=torch.float64)
    assert signs.abs().eq(1).all()
    assert abs(signs.mean()) < 5 / COUNT**0.5


def test_negative_seeds_work():
    assert not torch.equal(draw(-1), draw(-2))


def test_signed_round_trips():
    assert [xhash.signed(word) for word in (0, 1, 2**31 - 1, 2**31, 2**32 - 1)] == [0, 1, 2**31 - 1, -(2**31), -1]


def test_what_an_int32_cannot_count_is_refused():
    xhash.check_countable((2**16, 2**15), 2**31)
    with pytest.raises(ValueError, match="counts 2147483649 random numbers"):
        xhash.check_countable((2**16, 2**15), 2**31 + 1)
