"""Make the many graphs of a plan faster, by work that a plan of fixed sizes can do without.

Private parts of PyTorch, read in torch 2.13: `torch/fx/_lazy_graph_module.py` and what `torch/fx/graph.py` imports.

A residual network of 150 layers has a joint graph of 12,000 nodes, copied some six times on the way to a plan.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch import fx
from torch.fx import graph
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.utils import _pytree


class _Unsearched:
    """`torch.utils._pytree` for `torch.fx.graph`, which walks the arguments of every new node for one purpose: to warn
    of symbolic sizes among them. Here there are none (`hooks.specialise`)."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_pytree, name)

    @staticmethod
    def tree_iter(_: Any) -> tuple[()]:
        return ()


@contextlib.contextmanager
def cheap_graphs() -> Iterator[None]:
    """While active, new nodes are not searched for symbols, graphs not checked, and cyclic garbage not collected.

    The same passes check their graphs when they compile. Nearly all that tracing allocates lives as long as the graph,
    and the collector would look at it again and again.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        with (
            mock.patch.object(graph, "pytree", _Unsearched()),
            mock.patch.object(graph.Graph, "lint", lambda _: None),
        ):
            yield
    finally:
        if collecting:
            gc.enable()


def graph_module(root: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A module of this graph with the attributes of `root`. Python code is generated when it is called, if ever."""
    return _LazyGraphModule(root, graph)
