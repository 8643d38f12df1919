"""Bytes inside extern kernels against what the allocator saw."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from xconv_fx import workspace
from xconv_fx.measure import physical_peak
from xconv_fx.workspace import node_workspace, workspace_bytes

aten = torch.ops.aten
CONVOLUTION, BACKWARD = aten.convolution.default, aten.convolution_backward.default


def arguments(x_size, weight_size, dtype=torch.float32, padding=1, dilation=1, stride=1):
    x, weight = torch.randn(x_size, dtype=dtype), torch.randn(weight_size, dtype=dtype)
    rank = len(x_size) - 2
    geometry = ([stride] * rank, [padding] * rank, [dilation] * rank, False, [0] * rank, 1)
    return x, weight, geometry


def transient(function):
    """What the allocator held at most during a call, beyond what the call returned."""
    kept = []
    peak = physical_peak(lambda: kept.append(function())).transient
    returned = torch.utils._pytree.tree_leaves(kept)
    return peak - sum(tensor.nbytes for tensor in returned if tensor is not None)


# float64 and dilation take ATen's native convolutions, which unfold their input; oneDNN takes the rest.
NATIVE = {
    "2d": arguments((2, 4, 12, 10), (6, 4, 3, 3), torch.float64),
    "2d, strided": arguments((2, 4, 12, 10), (6, 4, 3, 3), torch.float64, stride=2),
    "2d, dilated": arguments((2, 4, 12, 10), (6, 4, 3, 3), torch.float64, dilation=2),
    "3d": arguments((2, 4, 8, 6, 7), (6, 4, 3, 3, 3), torch.float64),
    "3d, dilated": arguments((2, 4, 8, 6, 7), (6, 4, 3, 3, 3), torch.float64, dilation=2),
}


@pytest.mark.parametrize("case", NATIVE)
def test_native_convolutions(case):
    x, weight, geometry = NATIVE[case]
    foreseen = workspace_bytes(CONVOLUTION, (x, weight, None, *geometry))
    assert foreseen > x.nbytes
    assert transient(lambda: CONVOLUTION(x, weight, None, *geometry)) == pytest.approx(foreseen, rel=0.05)


@pytest.mark.parametrize("case", NATIVE)
def test_weight_gradients_of_native_convolutions(case):
    x, weight, geometry = NATIVE[case]
    grad = torch.randn_like(CONVOLUTION(x, weight, None, *geometry))
    call = (grad, x, weight, None, *geometry, [False, True, False])
    foreseen = workspace_bytes(BACKWARD, call)
    assert transient(lambda: BACKWARD(*call)) == pytest.approx(foreseen, rel=0.15)


@pytest.mark.parametrize("batch", [2, 24])
@pytest.mark.parametrize(("before", "after", "stride"), [(24, 24, 1), (16, 32, 2)])
def test_weight_gradients_of_16_bit_images(batch, before, after, stride):
    """oneDNN's scratch in float32 by threads; ATen's unfolded images on processors for which it has no kernels."""
    x, weight, geometry = arguments((batch, before, 24, 24), (after, before, 3, 3), torch.bfloat16, stride=stride)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    grad = torch.randn_like(CONVOLUTION(x, weight, None, *geometry))
    call = (grad, x, weight, None, *geometry, [False, True, False])
    foreseen = workspace_bytes(BACKWARD, call)
    assert foreseen > weight.nbytes
    assert transient(lambda: BACKWARD(*call)) == pytest.approx(foreseen, rel=0.05)


def test_library_convolutions_take_little():
    x, weight, geometry = arguments((2, 16, 32, 32), (16, 16, 3, 3))
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    foreseen = workspace_bytes(CONVOLUTION, (x, weight, None, *geometry))
    assert foreseen == weight.nbytes
    # Reordered weights and a scratchpad: more than is foreseen, and small beside what unfolding would take.
    assert transient(lambda: CONVOLUTION(x, weight, None, *geometry)) <= 3 * foreseen < 9 * x.nbytes / 10


def test_pointwise_native_convolutions_unfold_nothing():
    x, weight, geometry = arguments((2, 4, 12, 10), (6, 4, 1, 1), torch.float64, padding=0)
    assert workspace_bytes(CONVOLUTION, (x, weight, None, *geometry)) == 0
    assert transient(lambda: CONVOLUTION(x, weight, None, *geometry)) <= weight.nbytes


def test_other_operations_have_no_known_workspace():
    x = torch.randn(4, 4)
    assert workspace_bytes(aten.mm.default, (x, x)) == 0
    x, weight, geometry = arguments((1, 2, 8, 8), (2, 2, 3, 3), torch.float64)
    assert workspace_bytes(CONVOLUTION, (x.to("meta"), weight.to("meta"), None, *geometry)) == 0


def test_nodes_have_the_workspace_of_their_fake_tensors():
    x, weight, geometry = NATIVE["3d"]
    graph = fx.Graph()
    inputs = [graph.placeholder("x"), graph.placeholder("w")]
    inputs[0].meta["val"], inputs[1].meta["val"] = x, weight
    node = graph.call_function(CONVOLUTION, (*inputs, None, *geometry))
    assert node_workspace(node) == workspace_bytes(CONVOLUTION, (x, weight, None, *geometry))
    assert node_workspace(graph.call_function(aten.relu.default, (node,))) == 0


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("last", [True, False])
def test_deep_volumes_are_measured_on_shallow_ones(batch, last, monkeypatch):
    """Convolutions, their input gradients, and weight gradients in slabs, against calls at full size."""
    from xconv_fx.ops import volume

    form = torch.channels_last_3d if last else torch.contiguous_format
    x = torch.randn(batch, 16, 96, 64, 8).contiguous(memory_format=form)
    weight = torch.randn(8, 16, 3, 3, 3).contiguous(memory_format=form)
    geometry = ([1] * 3, [1] * 3, [1] * 3, False, [0] * 3, 1)
    depths = []
    full = workspace.measured

    def watched(func, *signature):
        depths.append(signature[0].size[2])
        return full(func, *signature)

    monkeypatch.setattr(workspace, "measured", watched)
    call = (x, weight, None, *geometry)
    near = {"rel": 0.1, "abs": weight.nbytes}
    assert workspace_bytes(CONVOLUTION, call) == pytest.approx(transient(lambda: CONVOLUTION(*call)), **near)
    grad = torch.randn(batch, 8, 96, 64, 8).contiguous(memory_format=form)
    call = (grad, weight, None, *geometry[:3], True, [0] * 3, 1)
    assert workspace_bytes(CONVOLUTION, call) == pytest.approx(transient(lambda: CONVOLUTION(*call)), **near)
    whole = (grad, x, weight, None, *geometry, [False, True, False])
    slabs = torch.ops.xconv.volume_weight_gradient.default  # Also where, by the processor, oneDNN is left to it.
    call = volume.arguments_for(slabs, whole, whole)
    assert workspace_bytes(slabs, call) == pytest.approx(transient(lambda: slabs(*call)), **near)
    assert max(depths) < 96


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
def test_depthwise_and_contiguous_images(form):
    x = torch.randn(2, 64, 20, 20).contiguous(memory_format=form)
    weight = torch.randn(64, 1, 7, 7)
    grad = torch.randn_like(x)
    geometry = ([1, 1], [3, 3], [1, 1], False, [0, 0], 64)
    call = (x, weight, None, *geometry)
    assert workspace_bytes(CONVOLUTION, call) == transient(lambda: CONVOLUTION(*call))
    call = (grad, x, weight, None, *geometry, [False, True, False])
    found = workspace_bytes(BACKWARD, call)
    assert found == transient(lambda: BACKWARD(*call))
    if form is torch.channels_last:
        assert found > 32 * weight.nbytes, "padded to the processor's vectors"


@pytest.mark.parametrize("depth", [12, 48])
def test_a_part_of_the_channels_is_copied(depth):
    """A gradient that is part of a concatenation's: oneDNN wants it in memory of its own."""
    whole = torch.randn(2, 32, depth, 24, 24).contiguous(memory_format=torch.channels_last_3d)
    x, weight = whole[:, :16], torch.randn(8, 16, 3, 3, 3)
    call = (x, weight, None, [1] * 3, [1] * 3, [1] * 3, False, [0] * 3, 1)
    found = workspace_bytes(CONVOLUTION, call)
    assert found > x.numel() * 4
    assert found == pytest.approx(transient(lambda: CONVOLUTION(*call)), rel=0.02)
