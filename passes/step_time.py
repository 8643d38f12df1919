"""Seconds that a forward or backward graph takes, by the roofline over its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import fx

from xconv_fx.cost_model.device import DeviceSpec
from xconv_fx.cost_model.timing import conv_flops, few_channels, linear_flops, seconds
from xconv_fx.ops.conv import ConvBackward, Convolution, Geometry

from .graph import arguments, nbytes, shape_of
from .liveness import Timeline
from .op_table import has

aten = torch.ops.aten


def step_seconds(line: Timeline, machine: DeviceSpec) -> float:
    """Time of all steps of a timeline, one kernel each, every one limited by its arithmetic or by its traffic.

    Traffic is what it reads and writes. Workspaces hold rearranged operands, which are written before and read after.
    """
    traffic = [nbytes(node) for node in line.steps]
    for source, steps in line.read_at.items():
        for step in steps:
            traffic[step] += nbytes(source)
    return sum(
        _node_seconds(node, moved, 2 * work, machine)
        for node, moved, work in zip(line.steps, traffic, line.workspace, strict=True)
    )


def _node_seconds(node: fx.Node, traffic: int, rearranged: int, machine: DeviceSpec) -> float:
    weight_flops = _weight_flops(node)
    return seconds(node_flops(node), traffic, machine, _dtype(node), weight_flops=weight_flops, rearranged=rearranged)


def node_flops(node: fx.Node) -> int:
    """Operations of a convolution, its input gradient, or a matrix product, as many as a wide layer does in its time.

    So convolutions of few channels count for more than they do. 0 for the rest.
    """
    if node.target is aten.convolution.default:
        call = Convolution.of(node)
        return _conv(shape_of(call.x), shape_of(call.weight), shape_of(node), call.geometry)
    if node.target is aten.convolution_backward.default:
        backward = ConvBackward.of(node)
        return _conv_backward(backward) if backward.of_input else 0
    if has(node, "product"):
        left, right = (shape_of(part) for part in arguments(node)[-2:])
        return linear_flops(prod(left[:-1]), left[-1], right[-1])
    return 0


def _weight_flops(node: fx.Node) -> int:
    """The same of a convolution's weight gradient."""
    if node.target is not aten.convolution_backward.default:
        return 0
    call = ConvBackward.of(node)
    return _conv_backward(call) if call.of_weight else 0


def _conv_backward(call: ConvBackward) -> int:
    """Operations of either gradient."""
    return _conv(shape_of(call.x), shape_of(call.weight), shape_of(call.grad), call.geometry)


def _conv(x: Sequence[int], weight: Sequence[int], output: Sequence[int], geometry: Geometry) -> int:
    spatial, groups = x[2:] if geometry.transposed else output[2:], geometry.groups
    flops = conv_flops(x[0], x[1], output[1], weight[2:], spatial, groups)
    return round(flops * few_channels(x[1] // groups, output[1] // groups))


def _dtype(node: fx.Node) -> str:
    value = node.meta.get("val")
    first = value if isinstance(value, torch.Tensor) else next((v for v in value or () if v is not None), None)
    return str(getattr(first, "dtype", "float32"))
