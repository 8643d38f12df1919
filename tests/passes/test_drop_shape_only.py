"""Average pooling's input is not held for a backward that reads its size alone."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.tracing import run_joint, targets, trace
from torch import nn

from xconv_fx.compiler import pipeline
from xconv_fx.passes.drop_shape_only import shapes_only
from xconv_fx.passes.graph import is_primal, nbytes


def held_bytes(traced, disabled):
    """What the forward makes for the backward and holds, in bytes."""
    with pipeline.without(*disabled):
        pair = traced.pair()
    return sum(nbytes(node) for node, _ in pair.residuals().values() if not is_primal(node))


POOLED = {
    "1d": (nn.AvgPool1d(2), (2, 3, 12)),
    "2d": (nn.AvgPool2d(2), (2, 3, 8, 6)),
    "2d, borders": (nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), (2, 3, 9, 8)),
    "3d": (nn.AvgPool3d((1, 2, 2)), (2, 3, 3, 4, 6)),
    "adaptive": (nn.AdaptiveAvgPool2d((3, 2)), (2, 3, 8, 5)),
    "adaptive, 3d": (nn.AdaptiveAvgPool3d((2, 3, 2)), (2, 3, 4, 5, 5)),
}


@pytest.mark.parametrize("case", POOLED)
def test_the_gradient_is_the_same_and_the_input_is_let_go(case):
    pool, shape = POOLED[case]
    traced = trace(lambda x: pool(x.sin() + 1).sin(), torch.randn(shape, dtype=torch.float64, requires_grad=True))
    gm, tangents = traced.joint(), traced.tangents()
    before = run_joint(gm, traced.primals, tangents)
    shapes_only(gm)
    for one, other in zip(before, run_joint(gm, traced.primals, tangents), strict=True):
        torch.testing.assert_close(other, one)
    # What the sines need: the image itself, which is an input, and the pooled one.
    held = [held_bytes(traced, disabled) for disabled in ((), ("drop_shape_only",))]
    assert held[0] == 8 * before[0].numel() and held[1] == held[0] + 8 * math.prod(shape)


ADAPTIVE = {"of a batch": ((2, 3, 8, 5), True), "without": ((3, 8, 5), False), "of many windows": ((2, 3, 1, 1), False)}


@pytest.mark.parametrize("case", ADAPTIVE)
def test_adaptive_pooling_is_gathered(case):
    """ATen's call would want the whole input in memory, and its gradient in the input's layout."""
    size, gathered = ADAPTIVE[case]
    pool = nn.AdaptiveAvgPool2d((6, 6) if case == "of many windows" else (3, 2))
    traced = trace(lambda x: pool(x.sin()).sin(), torch.randn(size, dtype=torch.float64, requires_grad=True))
    gm = traced.joint()
    shapes_only(gm)
    names = targets(gm.graph)
    assert ("xconv.adaptive_pool_backward.default" in names) == gathered
    assert ("aten._adaptive_avg_pool2d_backward.default" in names) != gathered


def test_generated_code_agrees_with_eager():
    """Windows that Inductor unrolls, and ones for which it calls ATen's kernel, in both memory formats."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Softplus(), nn.AvgPool2d(2), nn.Conv2d(8, 8, 3), nn.Softplus()]
    model = nn.Sequential(*layers, nn.AvgPool2d(7, 3), nn.Conv2d(8, 2, 1))
    x = torch.randn(4, 3, 40, 40)
    exact = torch.autograd.grad(model(x).sin().sum(), list(model.parameters()))
    compiled = torch.compile(model, backend="xconv", options={"mem_budget": "100%", "codecs": "exact"})
    for image in (x, x.to(memory_format=torch.channels_last)):
        found = torch.autograd.grad(compiled(image).sin().sum(), list(model.parameters()))
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
