"""Make the many graphs of a plan faster, by work on every node that a plan of fixed sizes can do without.

A residual network of 150 layers has a joint graph of 12,000 nodes, copied some six times on the way to a plan.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch.fx import graph
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
