"""Seconds that a forward or backward graph takes, by the roofline over its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import fx

from xconv_fx.cost_model.device import DeviceSpec
from xconv_fx.cost_model.timing import conv_flops, few_channels, linear_flops, seconds

from .graph import MATMULS, arguments, nbytes, shape_of
from .liveness import Timeline

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
        x, weight, output = shape_of(arguments(node)[0]), shape_of(arguments(node)[1]), shape_of(node)
        return _conv(x, weight, output, transposed=arguments(node)[6], groups=arguments(node)[8])
    if node.target is aten.convolution_backward.default:
        return _conv_backward(node) if arguments(node)[10][0] else 0
    if node.target in MATMULS:
        left, right = (shape_of(part) for part in arguments(node)[-2:])
        return linear_flops(prod(left[:-1]), left[-1], right[-1])
    return 0


def _weight_flops(node: fx.Node) -> int:
    """The same of a convolution's weight gradient."""
    wanted = node.target is aten.convolution_backward.default and arguments(node)[10][1]
    return _conv_backward(node) if wanted else 0


def _conv_backward(node: fx.Node) -> int:
    """Operations of either gradient."""
    grad, x, weight = (shape_of(part) for part in arguments(node)[:3])
    return _conv(x, weight, grad, transposed=arguments(node)[7], groups=arguments(node)[9])


def _conv(x: Sequence[int], weight: Sequence[int], output: Sequence[int], transposed: bool, groups: int) -> int:
    spatial = x[2:] if transposed else output[2:]
    flops = conv_flops(x[0], x[1], output[1], weight[2:], spatial, groups)
    return round(flops * few_channels(x[1] // groups, output[1] // groups))


def _dtype(node: fx.Node) -> str:
    value = node.meta.get("val")
    first = value if isinstance(value, torch.Tensor) else next((v for v in value or () if v is not None), None)
    return str(getattr(first, "dtype", "float32"))
