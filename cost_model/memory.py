"""The peak model: bytes alive at every step of a training step, as a function of what is chosen for each residual.

A training step is a sequence of steps t = 0..T-1, the kernels of the forward and then those of the backward. `base[t]`
bytes are alive at step t whatever is chosen. Every residual is an `Item`; option o of item i adds `loads`, a few
rectangles (first, last, bytes) that are alive during the closed interval first..last. So with one option o_i an item,

    profile(t) = base[t] + sum over items i of load(i, o_i, t)          peak = max over t of profile(t)

which is linear in the one-hot encoding of the choice: the solver's memory constraints are these rows.

Most rows are redundant. Between two interval ends only `base` varies, and a step that lies below another one whatever
is chosen can never be the only one over a budget. `dominant_steps` keeps the rest.

Known gaps: sizes are what tensors hold, so rounding to allocator blocks and fragmentation are the caller's to add.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.int64]


@dataclass(frozen=True)
class Option:
    """One way to hold a residual.

    `loads` are (first step, last step, bytes), both ends included; negative bytes release part of `base`. `noise` is
    the variance it adds to the gradients (see `noise.py`; 0 for lossless codecs), `time` the extra seconds a step, and
    `layers` the variance that it adds to the gradient of each layer, relative to that gradient's own yardstick.
    `needs` lists (item, options): this option is allowed only while that item takes one of those options, for every
    entry of the list. `segment` counts how long a part of the step it makes something again for at once (None: it is
    not made again).
    """

    name: str
    loads: tuple[tuple[int, int, int], ...]
    noise: float = 0.0
    time: float = 0.0
    needs: tuple[tuple[int, frozenset[int]], ...] = ()
    layers: tuple[tuple[str, float], ...] = ()
    segment: int | None = None


@dataclass(frozen=True)
class Item:
    """A residual and its options. Option 0 is "keep": the tensor itself, which needs nothing of other items."""

    name: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Problem:
    """`base` in bytes a step, the items, and a label a step (or none). Raises `ValueError` when it is malformed."""

    base: tuple[int, ...]
    items: tuple[Item, ...]
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.base:
            raise ValueError("base: a problem has at least one step")
        if self.labels and len(self.labels) != len(self.base):
            raise ValueError(f"labels: {len(self.labels)} labels for {len(self.base)} steps")
        for item in self.items:
            if not item.options or item.options[0].needs:
                raise ValueError(f"item {item.name!r}: option 0 must exist and need nothing of other items")
            for option in item.options:
                self._check(item, option)

    def _check(self, item: Item, option: Option) -> None:
        where = f"item {item.name!r}, option {option.name!r}"
        for first, last, _ in option.loads:
            if not 0 <= first <= last < len(self.base):
                raise ValueError(f"{where}: load {first}..{last} is not an interval within 0..{len(self.base) - 1}")
        if not (0 <= option.noise < float("inf") and abs(option.time) < float("inf")):
            raise ValueError(f"{where}: noise {option.noise} and time {option.time} must be finite, noise not negative")
        for layer, noise in option.layers:
            if not 0 <= noise < float("inf"):
                raise ValueError(f"{where}: noise {noise} of layer {layer!r} must be finite and not negative")
        for other, allowed in option.needs:
            if not 0 <= other < len(self.items) or self.items[other] is item:
                raise ValueError(f"{where}: needs item {other}, which is not another one of {len(self.items)} items")
            if not all(0 <= index < len(self.items[other].options) for index in allowed):
                raise ValueError(f"{where}: needs options {sorted(allowed)} of {self.items[other].name!r}")


def profile(problem: Problem, choice: Sequence[int]) -> Bytes:
    """Bytes alive at every step (int64, one a step) when item i takes option `choice[i]`."""
    change = np.zeros(len(problem.base) + 1, dtype=np.int64)
    for item, index in zip(problem.items, choice, strict=True):
        for first, last, size in item.options[index].loads:
            change[first] += size
            change[last + 1] -= size
    return np.asarray(problem.base, dtype=np.int64) + np.cumsum(change[:-1])


def peak(problem: Problem, choice: Sequence[int]) -> tuple[int, int]:
    """The largest number of bytes alive, and the first step at which it is reached."""
    alive = profile(problem, choice)
    step = int(alive.argmax())
    return int(alive[step]), step


def first_columns(problem: Problem) -> NDArray[np.int64]:
    """Index of every item's option 0 in the flat list of all options (items in order, their options in order)."""
    sizes = [len(item.options) for item in problem.items]
    return np.concatenate(([0], np.cumsum(sizes[:-1], dtype=np.int64))) if sizes else np.zeros(0, dtype=np.int64)


def load_matrix(problem: Problem, steps: Sequence[int]) -> Bytes:
    """Bytes that every option adds at the given ascending steps: int64, one row a step, one column an option."""
    columns = [option for item in problem.items for option in item.options]
    change = np.zeros((len(steps) + 1, len(columns)), dtype=np.int64)
    places = np.asarray(steps)
    for column, option in enumerate(columns):
        for first, last, size in option.loads:
            change[np.searchsorted(places, first), column] += size
            change[np.searchsorted(places, last, side="right"), column] -= size
    return np.cumsum(change, axis=0)[:-1]


def dominant_steps(problem: Problem) -> tuple[int, ...]:
    """Ascending steps that can be the peak; all others lie at or below one of these whatever is chosen.

    Step t dominates step s when profile(s) <= profile(t) for every choice. Items choose independently (needs only
    remove choices), so that is exactly

        base[t] - base[s] + sum over items of (min over its options of load(t) - load(s)) >= 0,

    which holds in particular when `base` and every load are larger at t. Neighbours are compared until none dominates
    the next, one pass with a stack: loads are intervals, so what dominates a step tends to be next to it. Some
    dominated steps may remain; none that matters is dropped.
    """
    steps = _tallest_of_segments(problem)
    loads = load_matrix(problem, steps)
    groups = first_columns(problem)

    def below(low: int, high: int) -> bool:
        margin = problem.base[steps[high]] - problem.base[steps[low]]
        return margin + int(np.minimum.reduceat(loads[high] - loads[low], groups).sum()) >= 0

    if not problem.items:
        return tuple(steps)
    kept: list[int] = []
    for row in range(len(steps)):
        while kept and below(kept[-1], row):
            kept.pop()
        if not kept or not below(row, kept[-1]):
            kept.append(row)
    return tuple(steps[row] for row in kept)


def _tallest_of_segments(problem: Problem) -> list[int]:
    """The step with the largest base of every run of steps during which no load begins or ends."""
    loads = [load for item in problem.items for option in item.options for load in option.loads]
    starts = {0} | {first for first, _, _ in loads} | {last + 1 for _, last, _ in loads}
    edges = sorted(starts | {len(problem.base)})
    return [max(range(a, b), key=problem.base.__getitem__) for a, b in pairwise(edges)]
