"""Graphs that are moved to a device that is not there."""

from __future__ import annotations

import pytest
import torch
from helpers.tracing import trace
from torch import nn

from xconv_fx.compiler import pipeline
from xconv_fx.passes.graph import is_primal, nbytes, tensor_of
from xconv_fx.passes.move_device import place


def wide() -> nn.Module:
    """A network that Inductor lays out channels-last on CUDA."""
    return nn.Sequential(nn.Conv2d(3, 80, 3), nn.ReLU(), nn.Conv2d(80, 80, 3))


def narrowing() -> nn.Module:
    """One that it does not, as U-Nets: a convolution has half as many channels after it as before."""
    return nn.Sequential(nn.Conv2d(3, 80, 3), nn.ReLU(), nn.Conv2d(80, 40, 3))


@pytest.mark.parametrize(("build", "channels_last"), [(wide, True), (narrowing, False)])
def test_moved_graphs(build, channels_last):
    job = pair(build(), "cuda")
    for half in (job.pair.forward, job.pair.backward):
        for node in half.graph.nodes:
            value = tensor_of(node)
            assert value is None or value.device == torch.device("cuda:0")
            if node.target in (torch.ops.aten.convolution.default, torch.ops.aten.relu.default):
                assert value.is_contiguous(memory_format=torch.channels_last) == channels_last
            if is_primal(node):
                assert value.is_contiguous()
            assert "device" not in node.kwargs or torch.device(node.kwargs["device"]).type == "cuda"


def test_blocks_on_cuda():
    forward = pair(wide(), "cuda").pair.forward
    sizes = {nbytes(node) for node in forward.graph.nodes if tensor_of(node) is not None}
    assert sizes and all(size % 512 == 0 for size in sizes)


def test_graphs_that_stay():
    job = pair(wide(), None)
    assert {tensor_of(node).device.type for node in job.pair.forward.graph.nodes if tensor_of(node) is not None} == {
        "cpu"
    }


def pair(model: nn.Module, device: str | None) -> pipeline.Analysed:
    """The graphs after the move."""
    return trace(model, torch.randn(2, 3, 16, 16)).analysed(device=device)


def test_place_takes_graphs_without_values():
    graph = torch.fx.symbolic_trace(lambda x: x + 1)
    place((graph, graph), "cuda")
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_function", "output"]
