"""Predicted seconds of graphs against the roofline worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from xconv_fx.cost_model.device import DeviceSpec
from xconv_fx.cost_model.timing import REARRANGING, few_channels
from xconv_fx.device.workspace import workspace_bytes
from xconv_fx.passes.liveness import timeline
from xconv_fx.passes.step_time import step_seconds

aten = torch.ops.aten
# One rate matters at a time: arithmetic takes seconds here, traffic next to nothing.
COUNTING = DeviceSpec("toy", bandwidth=1e30, flops32=1.0, flops16=4.0, weight32=0.5, weight16=0.5, launch=0.0)
MOVING = DeviceSpec("toy", bandwidth=1.0, flops32=1e30, flops16=1e30, weight32=1e30, weight16=1e30, launch=0.0)
BATCH, WIDTH, SIDE = 2, 16, 8
X = torch.randn(BATCH, WIDTH, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
W = torch.randn(WIDTH, WIDTH, 3, 3)
FLOPS = 2 * BATCH * WIDTH * SIDE**2 * WIDTH * 9


def predicted(machine, function, *inputs):
    return step_seconds(timeline(make_fx(function, tracing_mode="fake")(*inputs).graph), machine)


def backward(groups, wanted):
    def function(grad, x, weight):
        return aten.convolution_backward(grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], groups, wanted)

    return function


def test_a_convolution_takes_its_flops_and_more_with_few_channels():
    def function(x, weight):
        return aten.convolution(x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], WIDTH // weight.shape[1])

    assert predicted(COUNTING, function, X, W) == pytest.approx(FLOPS * few_channels(WIDTH, WIDTH))
    assert predicted(COUNTING, function, X, W[:, :1]) == pytest.approx(FLOPS / WIDTH * few_channels(1, 1))
    half = predicted(COUNTING, function, X.bfloat16(), W.bfloat16())
    assert half == pytest.approx(FLOPS * few_channels(WIDTH, WIDTH) / 4)


def test_weight_gradients_take_their_own_rate():
    one = FLOPS * few_channels(WIDTH, WIDTH)
    for wanted, times in (((True, False), 1), ((False, True), 2), ((True, True), 3)):
        seconds = predicted(COUNTING, backward(1, [*wanted, False]), X, X, W)
        assert seconds == pytest.approx(times * one)


def test_matrix_products_and_loops():
    a = torch.randn(4, 5)
    assert predicted(COUNTING, lambda a, b: a @ b, a, a.t()) == pytest.approx(2 * 4 * 5 * 4)
    assert predicted(COUNTING, torch.relu, a) < 1e-20
    assert predicted(MOVING, lambda a: torch.relu(a) + 1, a) == pytest.approx(2 * a.nbytes)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="the workspace is oneDNN's")
def test_workspaces_are_filled_before_they_are_read():
    """On channels-last images oneDNN rearranges the weight, and pads it to the processor's vectors."""

    def function(x, weight):
        return aten.convolution(x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)

    seconds = predicted(MOVING, function, X, W)
    weight = W.contiguous(memory_format=torch.channels_last)
    work = workspace_bytes(aten.convolution.default, (X, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1))
    assert work >= W.nbytes
    assert seconds == pytest.approx(2 * X.nbytes + W.nbytes + 2 * work * REARRANGING)
