"""Inductor's interface to a partitioner of our own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn


class Partitioner(CustomPartitionerFn):
    """`function(gm, joint_inputs, **arguments)` as Inductor's partitioner; `key` stands for it in cache keys."""

    def __init__(self, function: Callable[..., tuple[fx.GraphModule, fx.GraphModule]], key: str) -> None:
        self.function, self.key = function, key

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **arguments: Any) -> Any:
        return self.function(gm, joint_inputs, **arguments)

    def uuid(self) -> str:
        return self.key

    def __reduce__(self) -> Any:
        # Inductor pickles its whole configuration into the cache key.
        return (str, (self.key,))
