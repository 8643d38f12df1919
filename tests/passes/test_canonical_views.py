"""Reshaping by stride is written as reshaping by shape; a replayed copy of it then reads the right elements."""

from __future__ import annotations

import pytest
import torch
from helpers.tracing import run_joint, trace
from torch import nn

from xconv_fx import gradient_check
from xconv_fx.passes.canonical_views import name_shapes

aten = torch.ops.aten
FEW = 7  # Pixels a side: below eight, a group norm's coefficients are larger than what is saved besides residuals.


def net() -> nn.Sequential:
    layers = [nn.Conv2d(3, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def restrided(graph):
    return graph.find_nodes(op="call_function", target=aten.as_strided.default)


def test_reshaped_coefficients_of_a_group_norm_are_views():
    torch.manual_seed(0)
    traced = trace(net(), torch.randn(8, 3, FEW, FEW))
    joint, tangents = traced.joint(), traced.tangents()
    expected = run_joint(joint, traced.primals, tangents)
    before = len(restrided(joint.graph))
    name_shapes(joint)
    joint.recompile()
    assert before > 0 and not restrided(joint.graph)
    for one, other in zip(run_joint(joint, traced.primals, tangents), expected, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_strides_that_are_no_shape_are_left():
    def overlapping(x):
        return (x * 2).as_strided((8, 3), (1, 1)).sum()

    joint = trace(overlapping, torch.randn(4, 4, requires_grad=True)).joint()
    name_shapes(joint)
    assert [tuple(node.args[1]) for node in restrided(joint.graph)][:1] == [(8, 3)]


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_a_replayed_group_norm_of_a_small_image_has_no_bias():
    torch.manual_seed(0)
    torch._dynamo.reset()
    x = torch.randn(63, 3, FEW, FEW)
    check = gradient_check(net(), lambda out: out.square().mean(), (x, ()), {"codecs": "actnn:L3", "seed": 0}, draws=8)
    assert not check.biased
