"""Where the samples of a batch are in a value: what the rules of `batch_rules.py` read and find.

Every value is either *batched* along one dimension, whose index is sample-major (sample times m plus a position within
the sample), or *shared*: computed from parameters and constants, the same for every slice of the batch. Of a shared
value the dimensions along which all its elements are equal are known too: there it may stand beside samples, as the
zeros of a first recurrent state do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from .graph import layer_of, shape_of


@dataclass(frozen=True)
class Shared:
    """A value that is the same for every slice.

    It is `constant` along these dimensions; along `counts` its elements are 0, 1, 2 and so on, and do not depend on
    the other dimensions (None: there is no such dimension).
    """

    constant: frozenset[int] = frozenset()
    counts: int | None = None


# The batch dimension of a value, or what is known of a shared one.
Dim = int | Shared


class Mixing(Exception):
    """An operation that may mix samples: the proof stops at `node`, for `reason`."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        place = layer_of(node)
        super().__init__(f"{reason} ({node.name}{' in ' + place if place else ''})")
        self.node, self.reason = node, reason


class SampleDims:
    """The batch dimension of every value found so far, for a batch of `batch` samples."""

    def __init__(self, known: dict[fx.Node, int], batch: int) -> None:
        self.batch = batch
        self.found: dict[fx.Node, Dim] = dict(known)

    def of(self, node: fx.Node) -> Dim:
        return self.found[node]

    def is_batched(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and isinstance(self.found[node], int)

    def batched(self, node: fx.Node) -> int:
        """The batch dimension of a value that must have one."""
        dim = self.found[node]
        assert isinstance(dim, int)
        return dim

    def shared(self, node: fx.Node) -> Shared:
        """What is known of a value that must not be batched."""
        dim = self.found[node]
        assert isinstance(dim, Shared)
        return dim

    def sole(self, node: fx.Node) -> int:
        """The batch dimension of an operation whose first operand alone may be batched."""
        first, *rest = node.all_input_nodes
        if not self.is_batched(first) or any(self.is_batched(arg) for arg in rest):
            raise Mixing(node, f"{node.target} reads samples where weights are expected")
        return self.batched(first)

    def line_up(self, node: fx.Node, operands: list[fx.Node], shape: tuple[int, ...]) -> int:
        """The batch dimension of a result of this shape, to which all operands are broadcast."""
        places: set[int] = set()
        for arg in operands:
            if self.is_batched(arg):
                dim = self.batched(arg)
                place = dim - len(shape_of(arg)) + len(shape)
                if shape_of(arg)[dim] != shape[place]:
                    raise Mixing(node, "samples are broadcast against something else")
                places.add(place)
        if len(places) != 1:
            raise Mixing(node, "samples are combined with other samples")
        place = places.pop()
        for arg in operands:
            if not self.is_batched(arg) and not self.fits(arg, place - len(shape) + len(shape_of(arg))):
                raise Mixing(node, "each sample meets a constant of its own")
        return place

    def fits(self, node: fx.Node, place: int) -> bool:
        """Whether an operand has samples along `place`, or is the same for all of them. It may be negative: absent."""
        dim = self.found[node]
        if isinstance(dim, int):
            return dim == place
        return place < 0 or shape_of(node)[place] == 1 or place in dim.constant
