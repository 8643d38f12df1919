"""One frontier for all tests that look at one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from xconv_fx.tools.sweep.frontier import Frontier, frontier


def _net() -> nn.Sequential:
    """Batch normalisation keeps the samples together, so there is one problem to solve."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1),
    )  # fmt: skip


@pytest.fixture
def net() -> Callable[[], nn.Module]:
    return _net


@pytest.fixture
def images() -> torch.Tensor:
    return torch.zeros(4, 3, 24, 24)


@pytest.fixture(scope="session")
def found() -> Frontier:
    torch._dynamo.reset()
    return frontier(_net(), torch.zeros(4, 3, 24, 24), points=5, slices=1)
