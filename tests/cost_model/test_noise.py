from __future__ import annotations

import math
import random

import pytest

from xconv_fx.cost_model.noise import (
    TRAVEL,
    Use,
    fold_for_bytes,
    fold_noise,
    plan_noise,
    rounding_noise,
    sensitivity,
    shares,
)


def test_how_far_an_error_travels_orders_the_uses() -> None:
    weight, norm, other = (sensitivity([Use(kind, 0.1, upstream=0.5)]) for kind in ("weight", "norm", "other"))
    assert weight < norm < other
    assert [weight, norm, other] == pytest.approx([0.1, 0.1 + 0.5 * TRAVEL["norm"], 0.6])
    assert sensitivity([Use("weight", 0.1), Use("other", 0.0, 0.5)]) == pytest.approx(0.6)
    assert sensitivity([Use("weight", 0.1, ratio=4.0)]) == pytest.approx(0.4)
    assert sensitivity([]) == 0
    with pytest.raises(ValueError, match="'bias' is not one of weight, norm, other"):
        Use("bias", 0.1)


def test_plan_noise_weighs_energies() -> None:
    assert plan_noise([0.5, 2.0], [3.0, 0.25]) == pytest.approx(2.0)


def test_shares_sum_to_one() -> None:
    assert shares([10, 30]) == [0.5, 0.5]
    assert shares([10, 30], by_size=True) == [0.25, 0.75]
    assert shares([0, 0], by_size=True) == [0.5, 0.5]
    assert shares([]) == []


def test_rounding_noise_is_the_variance_of_stochastic_rounding() -> None:
    """Uniform positions within a grid step d: the mean of p(1-p) d^2 is d^2/6."""
    rng = random.Random(0)
    step = 6.4 / 15
    errors = []
    for _ in range(40_000):
        place = rng.random()
        errors.append(step * ((rng.random() < place) - place))
    measured = sum(error * error for error in errors) / len(errors)
    assert rounding_noise(4) == pytest.approx(measured, rel=0.03)
    assert rounding_noise(4) == pytest.approx(0.03, abs=0.002)
    assert rounding_noise(2) == pytest.approx(0.76, abs=0.01)
    with pytest.raises(ValueError, match="bits: 0"):
        rounding_noise(0)


def test_fold_noise_is_the_variance_of_folding() -> None:
    """Fold c independent values by random signs, add a rounding error of relative energy q, unfold."""
    rng = random.Random(0)
    fold, rounding, error, energy = 4, 0.5, 0.0, 0.0
    for _ in range(20_000):
        values = [rng.gauss(0, 1) for _ in range(fold)]
        signs = [rng.choice((-1, 1)) for _ in range(fold)]
        held = sum(sign * value for sign, value in zip(signs, values, strict=True))
        held += rng.gauss(0, math.sqrt(rounding * fold))
        error += sum((sign * held - value) ** 2 for sign, value in zip(signs, values, strict=True))
        energy += sum(value**2 for value in values)
    assert fold_noise(fold, rounding) == pytest.approx(error / energy, rel=0.03)
    assert fold_noise(1) == 0
    with pytest.raises(ValueError, match=r"fold: 0\.5"):
        fold_noise(0.5)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("part", [0.05, 0.4, 0.9])
def test_fold_for_bytes_solves_the_lagrangian(seed, part) -> None:
    """KKT: the budget is used up; one multiplier c^2 E / bytes where c > 1, and none that is smaller where c = 1."""
    rng = random.Random(seed)
    sizes = [rng.lognormvariate(10, 2) for _ in range(12)]
    energies = [rng.lognormvariate(0, 2) for _ in range(12)]
    budget = part * sum(sizes)
    folds = fold_for_bytes(sizes, energies, budget)
    assert sum(size / fold for size, fold in zip(sizes, folds, strict=True)) == pytest.approx(budget)
    prices = [fold**2 * energy / size for size, energy, fold in zip(sizes, energies, folds, strict=True)]
    multiplier = next(price for price, fold in zip(prices, folds, strict=True) if fold > 1)
    for price, fold in zip(prices, folds, strict=True):
        assert price == pytest.approx(multiplier) if fold > 1 else price >= multiplier * (1 - 1e-9)


def test_fold_for_bytes_keeps_all_that_fits_and_rejects_nothing() -> None:
    assert fold_for_bytes([10.0, 20.0], [1.0, 1.0], 30.0) == pytest.approx([1.0, 1.0])
    assert fold_for_bytes([10.0, 20.0], [1.0, 1.0], 99.0) == [1.0, 1.0]
    assert fold_for_bytes([10.0], [5.0], 2.5) == pytest.approx([4.0])
    for sizes, energies, budget in (([0.0], [1.0], 1.0), ([1.0], [0.0], 1.0), ([1.0], [1.0], 0.0)):
        with pytest.raises(ValueError, match="positive"):
            fold_for_bytes(sizes, energies, budget)
