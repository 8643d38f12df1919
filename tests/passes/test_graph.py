"""Questions about graphs: on hand-made nodes, and on the nodes of traced models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tracing import trace
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from xconv_fx.passes import graph
from xconv_fx.passes.graph import closure, inline, is_elementwise, is_reduction, is_view, layer_of, nbytes, source_of

aten = torch.ops.aten


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), nn.Conv2d(8, 8, 1)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            x = stage(x)
        return torch.sigmoid(x)


@pytest.fixture(scope="module")
def nested():
    """Nodes of a traced `Nested` by name."""
    gm = trace(Nested(), torch.randn(2, 3, 8, 8)).gm
    return {node.name: node for node in gm.graph.nodes}


def traced(function, *inputs):
    gm = make_fx(function, tracing_mode="fake")(*inputs)
    return {node.name: node for node in gm.graph.nodes}


def test_layers_are_paths_of_modules(nested):
    assert layer_of(nested["convolution"]) == "stages.0.0"
    assert layer_of(nested["relu"]) == "stages.0.1"
    assert layer_of(nested["convolution_1"]) == "stages.1"
    assert layer_of(nested["sigmoid"]) == ""
    assert layer_of(nested["primals_1"]) == ""


def test_nodes_of_the_backward_carry_the_layer_of_their_forward(nested):
    layers = [layer_of(n) for n in nested.values() if n.target is aten.convolution_backward.default]
    assert layers == ["stages.1", "stages.0.0"]


def test_source_is_the_innermost_line_of_the_user(nested):
    lines = Path(__file__).read_text().splitlines()
    path, line = source_of(nested["sigmoid"]).rsplit(":", 1)
    assert Path(path) == Path(__file__)
    assert lines[int(line) - 1].strip() == "return torch.sigmoid(x)"
    assert source_of(nested["primals_1"]) == ""


def test_bytes_count_expanded_dims_in_full():
    nodes = traced(lambda x: (x.expand(3, 5), x.half(), x.topk(2)), torch.randn(5))
    assert nbytes(nodes["expand"]) == 60
    assert nbytes(nodes["_to_copy"]) == 10
    assert nbytes(nodes["topk"]) == 0  # A tuple: its parts have the bytes.
    assert graph.numel(nodes["getitem"]) == 2


def test_kinds_of_operations():
    nodes = traced(
        lambda x: torch.relu(x.view(-1)[2:]).sum() + torch.mm(x, x).amax() + torch.var_mean(x)[0], torch.randn(4, 4)
    )
    assert {name for name, node in nodes.items() if is_view(node)} == {"view", "slice_1", "getitem", "getitem_1"} & set(
        nodes
    )
    assert {name for name, node in nodes.items() if is_elementwise(node)} == {"relu", "add", "add_1"}
    assert {name for name, node in nodes.items() if is_reduction(node)} == {"sum_1", "amax", "var_mean"} & set(nodes)


def test_closure_follows_users():
    nodes = traced(lambda x, y: (x.exp() + y, y.sin()), torch.randn(2), torch.randn(2))
    assert {node.name for node in closure([nodes["exp"]])} == {"exp", "add", "output"}


def test_inlined_operations_are_decomposed_and_keep_the_given_origin():
    gm = make_fx(lambda x: x * 2, tracing_mode="fake")(torch.randn(4))
    x, product = (
        gm.graph.find_nodes(op="placeholder")[0],
        gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor)[0],
    )
    with gm.graph.inserting_before(product):
        first, second = inline(gm.graph, lambda a: (torch.nn.functional.silu(a), a + 1), [x], {"stack_trace": "here"})
    product.replace_all_uses_with(first)
    gm.graph.lint()
    gm.recompile()
    assert aten.silu.default not in {node.target for node in gm.graph.nodes}
    assert {first.meta["stack_trace"], second.meta["stack_trace"]} == {"here"}
    assert tuple(second.meta["val"].shape) == (4,)
    value = torch.randn(4)
    torch.testing.assert_close(gm(value), torch.nn.functional.silu(value))
