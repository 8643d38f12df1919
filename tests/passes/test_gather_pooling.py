"""Max-pooling's backward as a gather equals the scatter that it replaces."""

from __future__ import annotations

import pytest
import torch
from helpers.tracing import run_joint, targets, trace
from torch import nn

from xconv_fx.passes.gather_pooling import gather_pooling

GATHER, SCATTER = "xconv.max_pool_backward.default", "aten.scatter_add.default"


def pooled(pool, shape):
    """A trace of `pool` between operations that autograd needs to go through it."""
    model = nn.Sequential(nn.Tanh(), pool, nn.Tanh())
    return trace(model, torch.randn(shape, dtype=torch.float64, requires_grad=True))


GATHERED = {
    "2, 2": (nn.MaxPool2d(2), (2, 3, 8, 8)),
    "rows left over": (nn.MaxPool2d(2), (2, 3, 9, 7)),
    "overlapping": (nn.MaxPool2d(3, 2, 1), (2, 3, 9, 8)),
    "nine windows": (nn.MaxPool2d(3, 1, 1), (2, 3, 6, 6)),
    "anisotropic": (nn.MaxPool2d((3, 2), (1, 2), (1, 0)), (2, 3, 7, 8)),
    "ceil": (nn.MaxPool2d(3, 2, ceil_mode=True), (2, 3, 8, 8)),
    "1d": (nn.MaxPool1d(3, 2, 1), (2, 3, 12)),
    "3d": (nn.MaxPool3d(2), (2, 3, 4, 6, 4)),
    "3d, anisotropic": (nn.MaxPool3d((1, 2, 2)), (2, 3, 3, 6, 5)),
}


@pytest.mark.parametrize("case", GATHERED)
def test_gathered_gradients_equal_scattered_ones(case):
    traced = pooled(*GATHERED[case])
    gm, tangents = traced.joint(), traced.tangents()
    before = run_joint(gm, traced.primals, tangents)
    gather_pooling(gm)
    names = targets(gm.graph)
    assert GATHER in names and SCATTER not in names
    for one, other in zip(before, run_joint(gm, traced.primals, tangents), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-13, atol=1e-13)


def test_ties_go_where_the_forward_put_them():
    """Half of ReLU's outputs are equal: only the recorded offsets say which of them won."""
    model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    traced = trace(model, torch.randn(2, 3, 8, 8, dtype=torch.float64).sub_(1).requires_grad_())
    gm, tangents = traced.joint(), traced.tangents()
    before = run_joint(gm, traced.primals, tangents)
    gather_pooling(gm)
    assert GATHER in targets(gm.graph)
    for one, other in zip(before, run_joint(gm, traced.primals, tangents), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-13, atol=1e-13)


def test_pooling_a_volume_does_not_hold_it():
    model = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.MaxPool3d(2), nn.Conv3d(4, 4, 1))
    saved = trace(model, torch.randn(1, 1, 8, 8, 8)).pair().residuals()
    sizes = sorted(tuple(node.meta["val"].shape) for node, _ in saved.values())
    assert sizes == [(1, 4, 4, 4, 4), (1, 4, 4, 4, 4)]  # What the last layer reads, and the offsets.


KEPT = {
    "dilation": (nn.MaxPool2d(2, dilation=2), (2, 3, 8, 8)),
    "25 windows": (nn.MaxPool2d(5, 1), (2, 3, 8, 8)),
    "3d without offsets": (nn.MaxPool3d(3, 2, 1), (2, 3, 4, 4, 4)),
    "no batch": (nn.MaxPool3d(2), (3, 4, 4, 4)),
    "average": (nn.AvgPool2d(2), (2, 3, 8, 8)),
}


@pytest.mark.parametrize("case", KEPT)
def test_nothing_to_do(case):
    gm = pooled(*KEPT[case]).joint()
    before = targets(gm.graph)
    gather_pooling(gm)
    assert targets(gm.graph) == before
