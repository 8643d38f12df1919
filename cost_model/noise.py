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

from collections.abc import Iterable
from dataclasses import dataclass

TRAVEL = {"weight": 0.0, "norm": 0.05, "other": 1.0}


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
