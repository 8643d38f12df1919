"""Gradient noise in one currency: variance added to a layer's weight gradient, relative to the gradient's own scale.

A codec replaces a residual x by an unbiased x^ with E|x^ - x|^2 = v |x|^2, v being its *relative noise energy*. A
weight gradient G = sum of x dy over positions then gains variance v E, E = sum of x^2 dy^2, so relative to itself

    noise of the layer = v * ratio,        ratio = E / |G|^2        (1 until it is measured)

and the noise of a plan is the sum of those over the layers, each times its share. How far an error travels depends on
how the backward uses the residual (`TRAVEL`):

* weight: a residual read by a convolution's or linear layer's weight gradient. Input gradients do not read it, so the
  error stays in its own layer: nothing travels.
* norm: normalisation's backward is dx = (dy - mean(dy) - x mean(dy x)) / sigma, x normalised. An error e of x enters dx
  as e mean(dy x): relative energy v rho^2, rho the correlation of dy and x in a channel. It is small where a channel
  has many positions: over the six layers of a small trained network rho^2 rose from 1e-4 in the first to 0.2 in the
  last. The prior of 0.05 is their mean.
* other: products, activations' derivatives and the like multiply the cotangent by the residual, so the whole relative
  error v passes on.

What travels on reaches the gradient of every earlier layer: a use adds v (share + TRAVEL * upstream), with `share` that
of its own layer (0 without weights) and `upstream` the shares of the earlier layers summed.

Sources: ActNN (Chen et al., ICML 2021) for the allocation; XConv (arXiv 2106.06998) for probes. Known gaps: errors of
different residuals count as independent; a travelling error is not damped by the layers it passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt

TRAVEL = {"weight": 0.0, "norm": 0.05, "other": 1.0}
# Distance of the smallest to the largest value of a quantised group, in units of the group's root mean square. 6.4 fits
# what was measured on activations of a small trained network: 0.03 at 4 bits, 0.7 at 2.
SPAN = 6.4


@dataclass(frozen=True)
class Use:
    """One use of a residual in the backward. `kind` is a key of `TRAVEL`; shares and ratio as in the module's text."""

    kind: str
    share: float
    upstream: float = 0.0
    ratio: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in TRAVEL:
            raise ValueError(f"kind: {self.kind!r} is not one of {', '.join(TRAVEL)}")


def sensitivity(uses: Iterable[Use]) -> float:
    """Noise of a plan for each unit of a residual's relative noise energy, summed over the residual's uses."""
    return sum(use.ratio * use.share + TRAVEL[use.kind] * use.upstream for use in uses)


def plan_noise(weights: Sequence[float], energies: Sequence[float]) -> float:
    """Noise of a plan: the sensitivity of every residual times the relative noise energy of what holds it."""
    return sum(weight * energy for weight, energy in zip(weights, energies, strict=True))


def shares(parameters: Sequence[int], *, by_size: bool = False) -> list[float]:
    """Every layer's share of the total, summing to 1: equal, or in proportion to its number of parameters.

    Equal shares keep small early layers, which have few weights and large activations, from being sacrificed.
    """
    total = sum(parameters)
    if by_size and total > 0:
        return [count / total for count in parameters]
    return [1 / len(parameters) for _ in parameters]


def rounding_noise(bits: int) -> float:
    """Relative noise energy of b-bit codes with stochastic rounding between a group's smallest and largest value.

    Rounding to a grid of step d at random, up or down without bias, has variance d^2/6 averaged over the positions
    within a step; d = SPAN / (2^b - 1).
    """
    if bits < 1:
        raise ValueError(f"bits: {bits} is less than 1")
    return (SPAN / (2**bits - 1)) ** 2 / 6


def fold_noise(fold: float, rounding: float = 0.0) -> float:
    """Relative noise energy of folding `fold` values into one by random signs, its values rounded with `rounding`.

    Unfolding returns each value plus fold - 1 others of random sign: energy fold - 1. A folded value has fold times the
    energy of one, and its rounding error comes back to all of them: (fold - 1) + fold * rounding.
    """
    if fold < 1:
        raise ValueError(f"fold: {fold} is less than 1")
    return fold - 1 + fold * rounding


def fold_for_bytes(sizes: Sequence[float], energies: Sequence[float], budget: float) -> list[float]:
    """The folds c of least noise that hold residuals of the given sizes in `budget` bytes.

    Minimises sum E c over the residuals under sum bytes / c <= budget and c >= 1. Where c > 1, the Lagrangian's
    derivative E - m bytes / c^2 is zero: c = sqrt(m bytes / E), ActNN's rule. Putting that into the budget gives

        sqrt(m) = sum sqrt(bytes E) / (budget - bytes of the residuals with c = 1),

    and the residuals with c = 1 are those of smallest bytes / E, split off one by one until the rest has c > 1.
    `sizes` and `budget` in bytes, `energies` in any common unit, all positive. Real numbers: use them to choose which
    probe counts to offer to the solver. Raises `ValueError` when something is not positive.
    """
    if not (budget > 0 and all(size > 0 for size in sizes) and all(energy > 0 for energy in energies)):
        raise ValueError(f"fold_for_bytes: sizes, energies and budget {budget!r} must be positive")
    pairs = list(zip(sizes, energies, strict=True))
    order = sorted(range(len(pairs)), key=lambda index: pairs[index][0] / pairs[index][1])
    folds = [1.0] * len(pairs)
    left = budget
    for place, index in enumerate(order):
        size, energy = pairs[index]
        root = sum(sqrt(pairs[other][0] * pairs[other][1]) for other in order[place:]) / left
        if root * sqrt(size / energy) >= 1:
            for other in order[place:]:
                folds[other] = root * sqrt(pairs[other][0] / pairs[other][1])
            break
        left -= size
    return folds
