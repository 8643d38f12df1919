"""What the draws of a random estimate are off by, added up as they come."""

from __future__ import annotations

import torch
from torch import Tensor


class Errors:
    """The errors of draws of one tensor: their sums, their squares, and each draw's loss, its squared L2 norm.

    With `directions`, each draw's projections on so many random ones as well.
    """

    def __init__(self, exact: Tensor, directions: int = 0) -> None:
        self.exact = exact
        self.sums, self.squares = torch.zeros_like(exact), torch.zeros_like(exact)
        generator = torch.Generator().manual_seed(exact.numel())
        self.signs = torch.randint(0, 2, (directions, exact.numel()), generator=generator).to(exact.dtype) * 2 - 1
        self.projections: list[Tensor] = []
        self.losses: list[float] = []

    def add(self, draw: Tensor) -> None:
        error = draw - self.exact
        square = error.square()
        self.sums += error
        self.squares += square
        self.projections.append(self.signs @ error.flatten())
        self.losses.append(float(square.sum()))

    @property
    def draws(self) -> int:
        return len(self.losses)

    @property
    def energy(self) -> float:
        """Squared L2 norm of the exact tensor."""
        return float(self.exact.square().sum())

    @property
    def loss(self) -> float:
        """Of a draw, in the mean."""
        return sum(self.losses) / self.draws

    @property
    def doubt(self) -> float:
        """Standard error of `loss`, relative to it."""
        return float(torch.tensor(self.losses).std()) / self.draws**0.5 / self.loss

    @property
    def relative(self) -> float:
        """The loss, relative to the energy."""
        return self.loss / self.energy

    @property
    def one(self) -> float:
        """Error of a draw, relative to the exact norm: root mean square."""
        return self.relative**0.5

    @property
    def mean(self) -> float:
        """Error of the mean of the draws, relative to the exact norm."""
        return float(self.sums.norm()) / self.draws / self.energy**0.5
