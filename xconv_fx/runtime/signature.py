"""By what a graph that was seen ahead of time is known again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx


@dataclass(frozen=True)
class Signature:
    """By what a graph is known again when it is compiled: the sizes of its tensors, and what it calls."""

    inputs: tuple[tuple[int, ...], ...]
    calls: tuple[str, ...]

    @staticmethod
    def of(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Signature:
        """The same whether Dynamo took sizes to be dynamic or not."""
        sizes = tuple(tuple(map(int, value.shape)) for value in example_inputs if isinstance(value, Tensor))
        calls = tuple(
            getattr(node.target, "__name__", str(node.target))
            for node in gm.graph.nodes
            if node.op in ("call_function", "call_method", "call_module") and not _is_number(node)
        )
        return Signature(sizes, calls)


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))
