"""Keep Inductor's kernels in the order of the graph.

The rewrite places every encode right after its producer, every decode right before its reader, and the weight half of
a convolution's backward before its input half. Inductor's scheduler is free to choose any topological order, and its
own reordering estimates memory without buffer reuse: it often runs the input half first, which keeps a decoded tensor
alive beside one gradient more. Two things put that right:

* `LocalFusion` refuses to fuse two kernels that only share an input when an extern kernel (a convolution, a matrix
  product) stands between them in the graph. Such a fusion would decode for the one long before, or long after, the
  other needs it.
* `GraphOrder`, run after fusion, takes among the kernels that are ready the one whose operations stand first.

Leans on private API of Inductor's scheduler, checked against torch 2.12 to 2.15.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import networkx as nx
from torch._inductor.choices import InductorChoices
from torch._inductor.virtualized import V

from .scheduler_pass import SchedulerPass


def in_order(key: str) -> dict[str, Any]:
    """Inductor settings that keep the graph's order; `key` stands for this file in its cache keys."""
    return {
        "reorder_for_peak_memory": False,
        "reorder_for_locality": False,
        "_post_fusion_custom_pass": GraphOrder(key),
    }


class LocalFusion(InductorChoices):
    """Inductor's choices, but for fusion across the `extern` kernels: operators that run as calls.

    `late` are operators whose results are made where they stand in the graph, whatever makes what they read.
    """

    def __init__(self, extern: Collection[Any], late: Collection[Any] = ()) -> None:
        super().__init__()
        self.extern, self.late = frozenset(extern), frozenset(late)

    def can_fuse_horizontal(  # type: ignore[override]  # static there, and called on the instance
        self, scheduler: Any, node1: Any, node2: Any, shared_data_score: int
    ) -> bool:
        if self.apart(node1, node2):
            return False
        return InductorChoices.can_fuse_horizontal(scheduler, node1, node2, shared_data_score)

    def can_fuse_vertical(  # type: ignore[override]
        self, scheduler: Any, node1: Any, node2: Any, shared_data_score: int
    ) -> bool:
        late = any(origin.target in self.late for origin in _origins(node2))
        if late and self.apart(node1, node2):
            return False
        return InductorChoices.can_fuse_vertical(scheduler, node1, node2, shared_data_score)

    def apart(self, node1: Any, node2: Any) -> bool:
        """Whether an extern kernel stands between the two in the graph."""
        place = _places()
        first, last = sorted((_position(node1, place), _position(node2, place)))
        return any(node.target in self.extern and first < index < last for node, index in place.items())


def _places() -> dict[Any, int]:
    """Position of every node of the graph that is being lowered; kept with the graph."""
    graph: Any = V.graph
    if not hasattr(graph, "xconv_places"):
        graph.xconv_places = {node: index for index, node in enumerate(graph.graph.nodes)}
    return graph.xconv_places


class GraphOrder(SchedulerPass):
    """A scheduler pass; `key` stands for it in Inductor's cache keys."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(self, nodes: list[Any]) -> list[Any]:
        return in_graph_order(nodes)

    def uuid(self) -> str:
        return self.key


def in_graph_order(nodes: list[Any]) -> list[Any]:
    """The scheduler's nodes in the topological order that follows the FX graph most closely."""
    place = _places()
    rank = {node: (_position(node, place), index) for index, node in enumerate(nodes)}
    producer = {name: node for node in nodes for name in node.get_buffer_names()}
    order = nx.DiGraph()
    order.add_nodes_from(nodes)
    for node in nodes:
        needs = (producer[dep.name] for dep in node.unmet_dependencies if dep.name in producer)
        order.add_edges_from((need, node) for need in needs if need is not node)
    return list(nx.lexicographical_topological_sort(order, key=rank.__getitem__))


def _position(node: Any, place: dict[Any, int]) -> int:
    """Where the last operation that a kernel computes stands in the graph; 0 for kernels of no known origin."""
    return max((place[origin] for origin in _origins(node) if origin in place), default=0)


def _origins(node: Any) -> Iterator[Any]:
    """The graph's nodes that a kernel computes."""
    return (origin for part in node.get_nodes() if part.node is not None for origin in part.node.get_origins())
