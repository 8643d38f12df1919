"""Halves of `convolution_backward` against the fused node, in float64, for the variants of convolution."""

from __future__ import annotations

import pytest
import torch
from helpers.tracing import run_joint, targets, trace
from torch import nn

from xconv_fx.passes.split_conv_backward import split_backward

aten = torch.ops.aten
FUSED = aten.convolution_backward.default


def fused(gm):
    return gm.graph.find_nodes(op="call_function", target=FUSED)


def conv(*args, **kwargs):
    return lambda: nn.Conv2d(*args, **kwargs)


CASES = {
    "3x3": (conv(4, 6, 3, padding=1), (2, 4, 9, 9)),
    "no bias": (conv(4, 6, 3, padding=1, bias=False), (2, 4, 9, 9)),
    "stride 2 with a row left over": (conv(4, 6, 3, stride=2, padding=1), (2, 4, 10, 9)),
    "dilation": (conv(4, 6, 3, dilation=2), (2, 4, 9, 9)),
    "groups": (conv(4, 6, 3, padding=1, groups=2), (2, 4, 9, 9)),
    "even kernel": (conv(4, 6, 2), (2, 4, 9, 9)),
    "even kernel, same": (conv(4, 6, 2, padding="same"), (2, 4, 9, 9)),
    "pointwise": (conv(4, 6, 1), (2, 4, 9, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 5)),
    "transposed, dilated beyond the stride": (
        lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, dilation=3, output_padding=2),
        (2, 4, 5, 5),
    ),
    "1d": (lambda: nn.Conv1d(4, 6, 3, stride=2), (2, 4, 12)),
    "3d": (lambda: nn.Conv3d(4, 6, 3, padding=1, stride=2), (1, 4, 6, 5, 6)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_halves_equal_the_fused_gradients(case):
    make, shape = CASES[case]
    model = make().double()
    traced = trace(model, torch.randn(shape, dtype=torch.float64, requires_grad=True))
    gm, tangents = traced.joint(), traced.tangents()
    before = run_joint(gm, traced.primals, tangents)
    split_backward(gm)
    after = run_joint(gm, traced.primals, tangents)
    assert fused(gm) and not any(node.args[10][0] for node in fused(gm))
    assert len(before) == len(after) == 3 + (model.bias is not None)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


def test_metadata_of_the_halves():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    gm = trace(model, torch.randn(2, 3, 8, 8)).joint()
    values = [node.meta["val"] for node in fused(gm)[0].users]
    split_backward(gm)
    half = fused(gm)[0]
    assert half.meta["val"][0] is None
    weight, bias = (user.meta["val"] for user in half.users)
    (grad,) = [n for n in gm.graph.nodes if n.target is aten.convolution.default and n.args[6]]
    assert [v.shape for v in values] == [v.shape for v in (grad.meta["val"], weight, bias)]
    assert half < grad, "what the weight half holds must be free before the input gradient is allocated"


def test_an_incoming_gradient_is_laid_out_once():
    gm = trace(nn.Conv2d(3, 8, 3), torch.randn(2, 3, 8, 8, requires_grad=True)).joint()
    split_backward(gm)
    (copied,) = gm.graph.find_nodes(op="call_function", target=aten.clone.default)
    assert copied.args[0].name == "tangents_1"
    assert {user.target for user in copied.users} == {FUSED, aten.convolution.default}


@pytest.mark.parametrize("bias", [False, True])
def test_a_frozen_weight_needs_no_input(bias):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, bias=bias))
    model[1].weight.requires_grad_(False)
    traced = trace(model.double(), torch.randn(2, 3, 8, 8, dtype=torch.float64))
    gm = traced.joint()
    before = run_joint(gm, traced.primals, traced.tangents())
    split_backward(gm)
    assert len(fused(gm)) == 1  # The first layer's, which never had an input half.
    after = run_joint(gm, traced.primals, traced.tangents())
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)
    assert not traced.pair().residuals()


@pytest.mark.parametrize("model", [nn.Conv2d(3, 4, 3), nn.Linear(8, 4)], ids=["weight half only", "no convolution"])
def test_nothing_to_do(model):
    gm = trace(model, torch.randn(2, 3, 8, 8)).joint()
    before = targets(gm.graph)
    split_backward(gm)
    assert targets(gm.graph) == before


DEPTHWISE = {
    "same size": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), True),
    "two filters a channel": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), False),
    "stride": (lambda: nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4), False),
}


@pytest.mark.parametrize("case", DEPTHWISE)
def test_depthwise_gradients_on_cuda_stay_with_their_kernels(case):
    """No transposed convolution; the input half reads no input where the incoming gradient has its shape."""
    make, in_halves = DEPTHWISE[case]
    traced = trace(make().double(), torch.randn((2, 4, 9, 9), dtype=torch.float64, requires_grad=True))
    gm, tangents = traced.joint(), traced.tangents()
    before = run_joint(gm, traced.primals, tangents)
    split_backward(gm, device="cuda")
    assert [node.args[10] for node in fused(gm)] == (
        [[False, True, True], [True, False, False]] if in_halves else [[True, True, True]]
    )
    assert not any(node.args[6] for node in gm.graph.find_nodes(op="call_function", target=aten.convolution.default))
    for one, other in zip(before, run_joint(gm, traced.primals, tangents), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


def test_other_groups_are_split_on_cuda():
    traced = trace(nn.Conv2d(4, 6, 3, padding=1, groups=2), torch.randn((2, 4, 9, 9), requires_grad=True))
    gm = traced.joint()
    split_backward(gm, device="cuda")
    assert [node.args[10] for node in fused(gm)] == [[False, True, True]]
