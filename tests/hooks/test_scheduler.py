"""The order of kernels, on stand-ins for the scheduler's nodes: what each computes, makes and waits for."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import networkx as nx
import pytest
import torch
from torch import fx

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

aten = torch.ops.aten


@dataclass(eq=False)
class Kernel:
    """One scheduler node that computes `origins` into a buffer of its name, once the buffers in `needs` exist."""

    name: str
    origins: list[fx.Node]
    needs: list[str] = field(default_factory=list)

    def get_nodes(self) -> list[Any]:
        return [SimpleNamespace(node=SimpleNamespace(get_origins=lambda: set(self.origins)) if self.origins else None)]

    def get_buffer_names(self) -> set[str]:
        return {self.name}

    @property
    def unmet_dependencies(self) -> list[Any]:
        return [SimpleNamespace(name=name) for name in self.needs]


@pytest.fixture
def nodes():
    """Nodes of a graph by name, in the order in which they stand while the test runs under Inductor's graph handler."""
    from torch._inductor.virtualized import V

    graph = fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_function(aten.sin.default, (x,))
    b = graph.call_function(aten.cos.default, (x,))
    product = graph.call_function(aten.mm.default, (a, b))
    c = graph.call_function(aten.exp.default, (x,))
    d = graph.call_function(aten.log.default, (c,))
    with V.set_graph_handler(SimpleNamespace(graph=graph)):
        yield {"a": a, "b": b, "mm": product, "c": c, "d": d}


def order(*kernels):
    from xconv_fx.hooks.scheduler import in_graph_order

    return [kernel.name for kernel in in_graph_order(list(kernels))]


def test_independent_kernels_follow_the_graph(nodes):
    kernels = [Kernel(name, [nodes[name]]) for name in ("d", "b", "c", "a")]
    assert order(*kernels) == ["a", "b", "c", "d"]


def test_dependencies_come_before_the_order_of_the_graph(nodes):
    first, second = Kernel("a", [nodes["a"]], needs=["d"]), Kernel("b", [nodes["b"]])
    late = Kernel("d", [nodes["d"]])
    assert order(first, second, late) == ["b", "d", "a"]


def test_a_fused_kernel_stands_where_its_last_operation_does(nodes):
    fused = Kernel("fused", [nodes["a"], nodes["d"]])
    assert order(fused, Kernel("b", [nodes["b"]]), Kernel("c", [nodes["c"]])) == ["b", "c", "fused"]


def test_kernels_of_no_known_origin_come_first_and_keep_their_order(nodes):
    kernels = [Kernel("b", [nodes["b"]]), Kernel("y", []), Kernel("x", [])]
    assert order(*kernels) == ["y", "x", "b"]


def test_buffers_from_outside_and_of_the_kernel_itself_are_no_dependencies(nodes):
    assert order(Kernel("b", [nodes["b"]], needs=["an input", "b"]), Kernel("a", [nodes["a"]])) == ["a", "b"]


def test_nothing_to_order(nodes):
    assert order() == []


def test_a_cycle_is_our_own_bug(nodes):
    with pytest.raises(nx.NetworkXUnfeasible, match="cycle"):
        order(Kernel("a", [nodes["a"]], needs=["b"]), Kernel("b", [nodes["b"]], needs=["a"]))


def test_fusion_does_not_reach_across_an_extern_kernel(nodes):
    from xconv_fx.hooks.scheduler import LocalFusion

    rules = LocalFusion([torch.ops.aten.mm.default])
    kernels = {name: Kernel(name, [node]) for name, node in nodes.items()}
    assert rules.apart(kernels["a"], kernels["c"]) and rules.apart(kernels["c"], kernels["a"])
    assert not rules.apart(kernels["a"], kernels["b"]) and not rules.apart(kernels["c"], kernels["d"])
    assert not rules.can_fuse_horizontal(None, kernels["b"], kernels["d"], 1)


def test_the_pass_is_part_of_the_cache_key():
    from xconv_fx.hooks.scheduler import GraphOrder

    order = GraphOrder("key")
    assert order.uuid() == "key" == pickle.loads(pickle.dumps(order))


def test_code_is_cached_for_each_key():
    """By torch's own hash of what code depends on, of a graph that the pass is the only difference of."""
    from torch._inductor import config
    from torch._inductor.codecache import compiled_fx_graph_hash

    from xconv_fx.hooks.scheduler import in_order

    def found(key: str) -> str:
        gm = fx.symbolic_trace(lambda x: x.sin())
        with config.patch(in_order(key)):
            return compiled_fx_graph_hash(gm, [torch.zeros(2)], {}, [])[0]

    assert found("one") == found("one") != found("another")
