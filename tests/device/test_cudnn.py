"""The assumed workspaces of cuDNN."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from xconv_fx.device import cudnn
from xconv_fx.device.cudnn import cudnn_workspace, is_channels_last
from xconv_fx.device.workspace import node_workspace
from xconv_fx.hooks.fake import cudnn_layouts, fake_mode

aten = torch.ops.aten
GEOMETRY = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
X, WEIGHT = 2 * 4 * 8 * 8 * 4, 6 * 4 * 3 * 3 * 4
Y = 2 * 6 * 8 * 8 * 4


def step(x, weight, gradient):
    return (
        aten.convolution(x, weight, None, *GEOMETRY),
        aten.convolution_backward(gradient, x, weight, None, *GEOMETRY, [True, False, False])[0],
        aten.convolution_backward(gradient, x, weight, None, *GEOMETRY, [False, True, False])[1],
        x + 1,
    )


def workspaces(order: torch.memory_format) -> list[int]:
    """Of a convolution, its input gradient, its weight gradient, and an addition."""
    with fake_mode(), cudnn_layouts():
        operands = [torch.randn(size).to(memory_format=order) for size in ((2, 4, 8, 8), (6, 4, 3, 3), (2, 6, 8, 8))]
        graph = make_fx(step)(*operands).graph
    wanted = (aten.convolution.default, aten.convolution_backward.default, aten.add.Tensor)
    calls = [node for node in graph.nodes if node.target in wanted]
    return [
        cudnn_workspace(node.target, fx.node.map_arg(node.args, lambda arg: arg.meta["val"]), node.meta["val"])
        for node in calls
    ]


def test_what_is_not_channels_last_is_copied():
    assert workspaces(torch.contiguous_format) == [X + Y, X + Y, X + Y + WEIGHT, 0]
    assert workspaces(torch.channels_last) == [0, 0, WEIGHT, 0]


def test_the_limit(monkeypatch):
    monkeypatch.setattr(cudnn, "WORKSPACE_LIMIT", 1000)
    assert workspaces(torch.contiguous_format) == [1000, 1000, 1000, 0]


@pytest.mark.parametrize(
    ("size", "order", "expected"),
    [
        ((2, 4, 8, 8), torch.contiguous_format, False),
        ((2, 4, 8, 8), torch.channels_last, True),
        ((2, 4, 8, 8, 8), torch.contiguous_format, False),
        ((2, 4, 8, 8, 8), torch.channels_last_3d, True),
        ((2, 1, 8, 8), torch.contiguous_format, True),
        ((2, 4, 8), torch.contiguous_format, True),
    ],
)
def test_layouts(size, order, expected):
    assert is_channels_last(torch.empty(size).to(memory_format=order)) == expected


def test_graphs_on_cuda_count_images_as_inductor_will_lay_them_out():
    """Traced on CUDA they are contiguous: a plan must not assume copies that the generated code does not need."""
    with fake_mode():
        x, weight = (torch.empty(size, device="cuda") for size in ((2, 4, 8, 8), (6, 4, 3, 3)))
        y = torch.empty(2, 6, 8, 8, device="cuda")
    graph = fx.Graph()
    operands = [graph.placeholder(name) for name in "xw"]
    for operand, value in zip(operands, (x, weight), strict=True):
        operand.meta["val"] = value
    node = graph.call_function(aten.convolution.default, (*operands, None, *GEOMETRY))
    node.meta["val"] = y
    assert node_workspace(node, images_last=True) == 0
    assert node_workspace(node, images_last=False) == X + Y
