"""Pooling whose positions lie channels-last in compiled code: gradients are eager's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

# Where the windows of fractional pooling lie.
PLACES = torch.rand(2, 8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
POOLS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "fractional 2D": (2, lambda: nn.FractionalMaxPool2d(2, output_ratio=0.7, _random_samples=PLACES)),
    "adaptive 2D": (2, lambda: nn.AdaptiveMaxPool2d(4)),
    "adaptive 3D": (3, lambda: nn.AdaptiveMaxPool3d(4)),
}


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("options", [{}, {"mem_budget": "100%", "codecs": "exact", "slices": 1}], ids=str)
@pytest.mark.parametrize("pool", POOLS)
def test_gradients_go_to_the_maxima(pool: str, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    dims, build = POOLS[pool]
    conv = nn.Conv2d if dims == 2 else nn.Conv3d
    net = nn.Sequential(conv(3, 8, 3, padding=1), build(), nn.ReLU(), conv(8, 2, 1)).double()
    x, mine = torch.randn(2, 3, *[10] * dims, dtype=torch.float64), copy.deepcopy(net)
    for call in (net, torch.compile(mine, backend="xconv", options=options)):
        call(x).square().mean().backward()
    for expected, found in zip(net.parameters(), mine.parameters(), strict=True):
        assert expected.grad is not None and found.grad is not None
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-12)
