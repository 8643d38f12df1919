"""Foreseen lifetimes against peaks worked out by hand. Every square matrix here has `B` bytes."""

from __future__ import annotations

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from xconv_fx.device.workspace import node_workspace
from xconv_fx.passes.liveness import timeline

A = torch.randn(16, 16)
B = 16 * 16 * 4


def graph_of(function, *inputs):
    return make_fx(function, tracing_mode="fake")(*inputs).graph


def names(line):
    return [step.name for step in line.steps]


def spans(line):
    """First and last step of every buffer."""
    return {buffer.node.name: (buffer.first, buffer.last) for buffer in line.buffers}


def test_nothing_is_computed():
    line = timeline(graph_of(lambda a: a, A))
    assert (line.steps, line.buffers, line.profile()) == ((), (), [])


def test_an_elementwise_value_takes_the_place_of_what_it_was_made_from():
    line = timeline(graph_of(lambda a: torch.relu(a @ a) @ a, A))
    assert names(line) == ["mm", "relu", "mm_1"]
    assert spans(line) == {"mm": (0, 0), "relu": (1, 2), "mm_1": (2, 2)}
    assert line.profile() == [B, B, 2 * B]


def test_an_elementwise_value_read_by_loops_alone_owns_nothing():
    line = timeline(graph_of(lambda a: torch.relu((a @ a).sin() + 1) @ a, A))
    assert names(line) == ["mm", "relu", "mm_1"]
    assert line.profile() == [B, B, 2 * B]


def test_what_is_read_again_is_not_overwritten():
    def function(a):
        b = a @ a
        return torch.relu(b) @ b

    line = timeline(graph_of(function, A))
    assert spans(line) == {"mm": (0, 2), "relu": (1, 2), "mm_1": (2, 2)}
    assert line.profile() == [B, 2 * B, 3 * B]


def test_views_own_nothing_and_keep_their_base_alive():
    line = timeline(graph_of(lambda a: torch.mm((a @ a).t(), a), A))
    assert spans(line) == {"mm": (0, 1), "mm_1": (1, 1)}


def test_a_reduction_reads_its_producer_s_sources():
    def function(a):
        b = a @ a
        return b.exp().sum(0), b.relu().mean()

    line = timeline(graph_of(function, A))
    assert names(line) == ["mm", "sum_1", "mean"]
    assert line.profile() == [B, B + 64, B + 64 + 4]


def test_another_size_cannot_be_overwritten():
    line = timeline(graph_of(lambda a: (a @ a)[:, :8].exp() @ a[:8], A))
    assert spans(line) == {"mm": (0, 1), "exp": (1, 2), "mm_1": (2, 2)}
    assert line.profile() == [B, B + B // 2, B // 2 + B]


def test_results_live_to_the_end_unless_they_are_dropped():
    def function(a):
        b = a @ a
        c = b @ a
        return b, c @ a

    graph = graph_of(function, A)
    assert timeline(graph).profile() == [B, 2 * B, 3 * B]
    (dropped,) = (node for node in graph.nodes if node.name == "mm")
    assert timeline(graph, [dropped]).profile() == [B, 2 * B, 2 * B]


def test_inputs_own_no_buffer_and_their_reads_are_known():
    graph = graph_of(lambda a: torch.mm(a @ a, a.relu() + 1), A)
    line = timeline(graph)
    placeholder = graph.find_nodes(op="placeholder")[0]
    assert names(line) == ["mm", "add", "mm_1"]
    assert line.read_at[placeholder] == [0, 1]
    assert placeholder not in {buffer.node for buffer in line.buffers}


def test_a_value_of_many_reads_is_computed_once():
    def function(a, b, c, d, e):
        total = a + b + c + d + e
        return total.sin() @ a, total.cos() @ a

    assert "add_3" in names(timeline(graph_of(function, *torch.randn(5, 16, 16))))
    few = graph_of(lambda a, b: ((a + b).sin() @ a, (a + b).cos() @ a), *torch.randn(2, 16, 16))
    assert names(timeline(few)) == ["sin", "mm", "cos", "mm_1"]


def test_the_step_at_or_after_a_node():
    graph = graph_of(lambda a: torch.relu((a @ a).sin() + 1) @ a, A)
    line, by_name = timeline(graph), {node.name: node for node in graph.nodes}
    assert [line.step_of(by_name[name]) for name in ("a_1", "mm", "sin", "add", "relu", "mm_1")] == [0, 0, 1, 1, 1, 2]


def test_workspace_is_alive_during_its_step_only():
    x, weight = torch.randn(1, 4, 8, 8, 8), torch.randn(4, 4, 3, 3, 3)
    graph = graph_of(lambda x, w: torch.conv3d(x, w, padding=1, dilation=2).relu(), x, weight)
    line = timeline(graph)
    assert line.workspace == (node_workspace(line.steps[0]), 0)
    assert line.workspace[0] > 0
    output = line.steps[0].meta["val"].numel() * 4
    assert line.profile() == [line.workspace[0] + output, output]
