"""Gradient noise in one currency: variance added to weight gradients, in units of a yardstick.

A codec replaces a residual x by an unbiased x^ with a *relative noise energy* v: E|x^ - x|^2 / |x|^2, or where it was
measured the same with each element weighted by its effect. A weight gradient G = sum of x dy over positions then gains
the variance v E, E = sum of x^2 dy^2. The yardstick is

* with statistics of the model (`xconv_fx.calibrate`): its SGD noise, the variance of a batch's gradient, summed over
  all layers. A layer's share is E over that sum, and a plan's noise is what it adds to the SGD noise, relative to it;
* by the prior: each layer's own |G|^2, with E / |G|^2 taken as 1, and layers as equals: a share is 1 / layers. In
  some small networks E / |G|^2 was 0.002 to 0.75; where training ends and gradients get small, it can be far more.

How far an error travels depends on how the backward uses the residual (`TRAVEL`, its priors):

* weight: a residual read by a convolution's or linear layer's weight gradient. Input gradients do not read it, so the
  error stays in its own layer: nothing travels.
* norm: normalisation's backward is dx = (dy - mean(dy) - x mean(dy x)) / sigma, x normalised. An error e of x enters dx
  as e mean(dy x): relative energy v rho^2, rho the correlation of dy and x in a channel. It is small where a channel
  has many positions: over the six layers of a small trained network rho^2 rose from 1e-4 in the first to 0.2 in the
  last. The prior of 0.05 is their mean. Through mean(dy x) it enters as well, and adds up where the layer before is
  correlated with x: statistics have what reaches each earlier layer, measured.
* scale: the gradient of a normalisation layer's scale is the sum of dy x: the error stays in it, as in a weight's. Most
  scales had at most a hundredth of a network's |G|^2, one 0.046, so one counts `SCALE` of a layer.
* other: products, activations' derivatives and the like multiply the cotangent by the residual, so the whole relative
  error v passes on.

What travels on reaches the gradient of every earlier layer, and adds to each its share times how far it travels.

Sources: ActNN (Chen et al., ICML 2021) for the allocation; XConv (arXiv 2106.06998) for probes. Known gaps: errors of
different residuals count as independent; by the priors, a travelling error is not damped by the layers it passes, and
scatters as the gradient that it travels with does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

TRAVEL = {"weight": 0.0, "scale": 0.0, "norm": 0.05, "other": 1.0}
SCALE = 0.05


@dataclass(frozen=True)
class Use:
    """One use of a residual in the backward; `kind` is a key of `TRAVEL`.

    `reaches` are the layers whose gradients become noisier, by name, each with the part of the plan's noise that a
    relative noise energy of 1 adds to it.
    """

    kind: str
    reaches: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        if self.kind not in TRAVEL:
            raise ValueError(f"kind: {self.kind!r} is not one of {', '.join(TRAVEL)}")

    @staticmethod
    def travelling(kind: str, earlier: Iterable[tuple[str, float]]) -> Use:
        """By the prior: a use whose errors reach all `earlier` layers, given with their shares."""
        return Use(kind, tuple((layer, TRAVEL.get(kind, 0.0) * share) for layer, share in earlier))

    @property
    def sensitivity(self) -> float:
        """Noise of a plan for each unit of the residual's relative noise energy."""
        return sum(share for _, share in self.reaches)
