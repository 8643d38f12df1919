"""Pairs: what crosses, one value more, one value less."""

from __future__ import annotations

import pytest
import torch
from helpers.tracing import run_pair, trace
from torch import nn

from xconv_fx.passes.graph import is_tangent, output_node


@pytest.fixture(scope="module")
def traced():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3))
    return trace(model, torch.randn(2, 3, 8, 8))


def described(pair):
    """Descriptors of what the forward saves."""
    return output_node(pair.forward.graph).meta["desc"][pair.results :]


def stack_traces(pair):
    """Those of what the forward returns, as they are looked up by its place."""
    return output_node(pair.forward.graph).meta["output_stack_traces"]


def test_saved_values_are_matched_by_name(traced):
    pair = traced.pair()
    assert pair.results == 1
    assert {"relu", "primals_3_matrix"} <= set(pair.saved())
    assert list(pair.residuals()) == ["relu"]
    for name, (node, placeholder) in pair.saved().items():
        assert node.name == placeholder.name == name
        assert node.graph is pair.forward.graph and placeholder.graph is pair.backward.graph


def test_one_value_more(traced):
    pair, (results, gradients) = traced.pair(), run_pair(traced.pair(), traced.primals, traced.tangents())
    before = len(described(pair))
    producer = next(node for node in pair.forward.graph.nodes if node.name == "convolution")
    placeholder = pair.add_saved(producer, "relu")
    assert placeholder.name != "relu", "names in one graph are unique"
    assert placeholder.target == placeholder.name
    assert placeholder.meta["val"] is producer.meta["val"]
    assert [d.idx for d in described(pair)] == list(range(before + 1))
    values = output_node(pair.forward.graph).args[0]
    assert stack_traces(pair) == [value.meta.get("stack_trace") for value in values]
    # What crosses is bound by position: read the new value and see that it is the right one.
    output = output_node(pair.backward.graph)
    output.args = ((*output.args[0], placeholder),)
    for module in (pair.forward, pair.backward):
        module.graph.lint()
        module.recompile()
    same, (*others, crossed) = run_pair(pair, traced.primals, traced.tangents())
    assert torch.equal(same[0], results[0])
    assert all(one is other is None or torch.equal(one, other) for one, other in zip(others, gradients, strict=True))
    weight, bias, x = traced.primals[:3]
    torch.testing.assert_close(crossed, torch.nn.functional.conv2d(x, weight, bias, padding=1))


def test_one_value_less_undoes_one_more(traced):
    pair = traced.pair()
    outputs, placeholders = (
        [*output_node(pair.forward.graph).args[0]],
        pair.backward.graph.find_nodes(op="placeholder"),
    )
    producer = next(node for node in pair.forward.graph.nodes if node.name == "convolution")
    pair.remove_saved(producer, pair.add_saved(producer, "extra"))
    assert [*output_node(pair.forward.graph).args[0]] == outputs
    assert pair.backward.graph.find_nodes(op="placeholder") == placeholders
    assert [d.idx for d in described(pair)] == list(range(len(outputs) - pair.results))


def test_a_result_that_is_saved_too_stays_a_result():
    """Uncrossing removes the saved one of two outputs that are the same node."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh())
    pair = trace(model, torch.randn(2, 3, 8, 8)).pair()
    result = output_node(pair.forward.graph).args[0][0]
    node, placeholder = pair.saved()[result.name]
    assert node is result
    (reader,) = {user for user in placeholder.users if not is_tangent(user)}
    reader.replace_input_with(placeholder, pair.backward.graph.find_nodes(op="placeholder")[-1])
    pair.remove_saved(node, placeholder)
    outputs = output_node(pair.forward.graph).args[0]
    assert outputs[0] is result and result not in outputs[1:]
