"""Is the mean of draws the exact value? A test of what they are off by.

The error of the mean is projected on random directions and divided by its own standard error: under no bias each of
these is a t value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from .errors import Errors

DIRECTIONS = 4
DOUBT = 0.05


@dataclass(frozen=True)
class Verdict:
    """What the draws of some tensors say. `limit` is the two-sided Bonferroni bound on `largest`."""

    tensors: int
    noisy: int
    noise: float
    largest: float
    limit: float
    coverage: float
    exact_error: float

    @property
    def unbiased(self) -> bool:
        return self.largest <= self.limit and self.exact_error <= 1e-9


def errors_of(exact: Tensor) -> Errors:
    """Empty, with the projections that `verdict` needs."""
    return Errors(exact, DIRECTIONS)


def verdict(errors: Sequence[Errors]) -> Verdict:
    """Test the accumulated errors of the draws, as many of every tensor.

    Each projection has its own standard error, from its own draws: what a normalisation layer passes on is correlated
    between the coordinates of a gradient.
    """
    draws = errors[0].draws
    scores, inside, counted, noise, fixed = [], 0, 0, [], 0.0
    # The gradient of a bias in front of a normalisation is zero, and rounding all that is seen of it.
    rounding = 1e-12 * max(float(seen.exact.norm()) for seen in errors)
    quantile = float(stats.t.ppf(0.975, draws - 1))
    for seen in errors:
        mean = seen.sums / draws
        spread = ((seen.squares / draws - mean.square()) * draws / (draws - 1)).clamp(min=0).sqrt()
        scale = float(seen.exact.norm())
        if float(spread.norm()) <= max(1e-9 * scale, rounding):
            fixed = max(fixed, float(mean.norm()) / max(scale, 1e3 * rounding))
            continue
        noise.append(float(spread.norm()) / scale)
        error = spread / draws**0.5
        varying = error > 0
        inside += int((mean.abs()[varying] <= quantile * error[varying]).sum())
        counted += int(varying.sum())
        projected = torch.stack(seen.projections)
        scores += (projected.mean(0) / (projected.std(0) / draws**0.5)).tolist()
    return Verdict(
        tensors=len(errors),
        noisy=len(noise),
        noise=float(np.median(noise)) if noise else 0.0,
        largest=max((abs(score) for score in scores), default=0.0),
        limit=float(stats.t.ppf(1 - DOUBT / 2 / max(1, len(scores)), draws - 1)),
        coverage=inside / max(1, counted),
        exact_error=fixed,
    )
