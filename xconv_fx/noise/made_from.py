"""Which normalisation layers a layer's input was made from, as autograd recorded it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# Backward nodes of activations whose result has the sign of what they read.
SIGNED = ("ReluBackward", "LeakyReluBackward")


class Makers:
    """What makes a step's tensors: `add` the result of every layer, and `of` tells those that a tensor was made from
    by anything that is no layer, such as activations and sums. `signed` are the results, by their backward nodes, that
    were seen to be read by an activation that needs no more than their sign."""

    def __init__(self) -> None:
        self.layers: dict[Any, Any] = {}
        self.signed: set[Any] = set()

    def add(self, result: Tensor, layer: Any) -> None:
        """`layer` stands for the one that returned `result`, before anything is done to it in place."""
        self.layers[result.grad_fn] = layer

    def of(self, value: Tensor) -> list[tuple[Any, Any]]:
        """(backward node, layer) of the nearest layers before, the last that ran first."""
        found = []
        stack, seen = [value.grad_fn], {None, value.grad_fn}
        while stack:
            node = stack.pop()
            if node in self.layers:
                found.append((node, self.layers[node]))
                continue
            if node is None:
                continue
            before = [following for following, _ in node.next_functions]
            if node.name().startswith(SIGNED):
                self.signed.update(node for node in before if node in self.layers)
            stack += [node for node in before if node not in seen]
            seen.update(before)
        return found
