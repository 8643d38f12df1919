"""What a plan's costs may be at most, whatever the budget: constraints of the search, as rows of numbers.

A limit that only filters the plan that is liked best refuses budgets at which another plan keeps it. So every limit is
a row, linear in the one-hot encoding of the choice as the bytes of a step are (`tools/sweep/memory.py`):

    sum over items i of row(i, o_i) <= 1,    row = what the option adds, over the limit.

Options that break a limit alone are struck out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .memory import Option, Problem

# What sums of floating point may be off by, relative to a limit.
SLACK = 1e-6


@dataclass(frozen=True)
class Limits:
    """`noise` of the whole plan, `layer` of any one layer's gradient, and extra `seconds` a step; None: no limit.

    Raises `ValueError` for a limit below zero.
    """

    noise: float | None = None
    layer: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name, limit in (("noise", self.noise), ("layer", self.layer), ("seconds", self.seconds)):
            if limit is not None and not limit >= 0:
                raise ValueError(f"{name}: {limit!r} is not a number from 0")

    def rows(self, problem: Problem) -> NDArray[np.float64]:
        """One row a limit, over the limit; one column an option. Where the limit is 0, what is above it is infinite."""
        options = [option for item in problem.items for option in item.options]
        rows = [np.empty((0, len(options)))]
        if self.noise is not None:
            rows.append(_over(np.array([[option.noise for option in options]]), self.noise))
        if self.layer is not None:
            rows.append(_over(_of_layers(options), self.layer))
        if self.seconds is not None:
            rows.append(_over(np.array([[option.time for option in options]]), self.seconds))
        return np.concatenate(rows)


NO_LIMITS = Limits()


def noisiest(problem: Problem, choice: Sequence[int]) -> float:
    """The noise of the noisiest layer under a plan."""
    layers: dict[str, float] = {}
    for item, index in zip(problem.items, choice, strict=True):
        for layer, noise in item.options[index].layers:
            layers[layer] = layers.get(layer, 0.0) + noise
    return max(layers.values(), default=0.0)


def _over(costs: NDArray[np.float64], limit: float) -> NDArray[np.float64]:
    if limit > 0:
        return costs / limit
    return np.where(costs > 0, math.inf, 0.0)


def _of_layers(options: list[Option]) -> NDArray[np.float64]:
    """What every option adds to every layer: one row a layer, in the order in which options name them."""
    places: dict[str, int] = {}
    entries = [
        (places.setdefault(layer, len(places)), column, noise)
        for column, option in enumerate(options)
        for layer, noise in option.layers
    ]
    found = np.zeros((len(places), len(options)))
    if entries:
        rows, columns, noises = zip(*entries, strict=True)
        np.add.at(found, (np.array(rows), np.array(columns)), np.array(noises))
    return found
