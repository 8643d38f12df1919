"""What is alive in a step besides one of its graphs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Surroundings:
    """Bytes that are none of a graph's tensors.

    `throughout` are alive in all of its step; besides, `inside` at the most between its forward and its backward, where
    other graphs run, and `returning` while its backward runs. `spare` is left to those other graphs besides: their
    predictions may be short of so much.
    """

    throughout: int = 0
    inside: int = 0
    returning: int = 0
    spare: int = 0


ALONE = Surroundings()
