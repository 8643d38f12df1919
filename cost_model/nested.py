"""One problem for a training step that runs several graphs: the later ones lie inside the earlier ones.

A model of several graphs runs the forward of graph 1, then of graph 2, and so on; after the loss, the backwards run in
the opposite order. So the forward and the backward of graph 2 lie between those of graph 1, where graph 1 alone would
have its loss, and what graph 1 holds from forward to backward is alive during all of graph 2's steps:

    forward 1, forward 2, ..., forward n, the loss, backward n, ..., backward 2, backward 1

`nest` puts the graphs' problems together in this order, as one problem for the same solver, which so shares the budget
by what each graph can give. A graph may run several times in a step; all of its runs have the same choices.

Known gap: where a graph runs several times, noise is that of one run. Its gradients are summed, and so are the
variances, so that relative to their energy they stay as they are if the runs are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from .memory import Item, Option, Problem, profile

Load = tuple[int, int, int]


@dataclass(frozen=True)
class Part:
    """A graph of a step: its problem, in which step `turn` stands for what happens between forward and backward.

    What is alive in all of the step is no part of the problem's base. Raises `ValueError` for a turn that is no step.
    """

    problem: Problem
    turn: int

    def __post_init__(self) -> None:
        if not 0 <= self.turn < len(self.problem.base):
            raise ValueError(f"turn: {self.turn} is none of {len(self.problem.base)} steps")

    @property
    def after(self) -> int:
        """How many steps follow the turn."""
        return len(self.problem.base) - self.turn - 1


@dataclass(frozen=True)
class Run:
    """One run of a part in a step. In bytes: what else is alive in its `forward`, and in its `backward`."""

    part: int
    forward: int = 0
    backward: int = 0


@dataclass(frozen=True)
class Nested:
    """The step's `problem`; for each run, the first steps of its forward, of what lies inside it, and of its backward.

    The items of part i are those from `first[i]` on.
    """

    parts: tuple[Part, ...]
    runs: tuple[Run, ...]
    problem: Problem
    places: tuple[tuple[int, int, int], ...]
    first: tuple[int, ...]

    def choice_of(self, part: int, choice: Sequence[int]) -> tuple[int, ...]:
        """The choices for one part's items, of those for all."""
        start = self.first[part]
        return tuple(choice[start : start + len(self.parts[part].problem.items)])

    def held(self, part: int, choice: Sequence[int]) -> int:
        """Bytes that one run of a part holds from its forward to its backward, by the choices for all items."""
        found = self.parts[part]
        return int(profile(found.problem, self.choice_of(part, choice))[found.turn])

    def inside(self, part: int, choice: Sequence[int]) -> int:
        """The most bytes alive between a forward and a backward of this part, in runs of others and in the loss.

        What its own runs hold is not counted.
        """
        alive = profile(self.problem, choice)
        held, others = self.held(part, choice), np.zeros(len(alive), dtype=bool)
        for run, (_, inner, after) in zip(self.runs, self.places, strict=True):
            if run.part == part:
                alive[inner:after] -= held
                others[inner:after] = True
        for run, (start, inner, after) in zip(self.runs, self.places, strict=True):
            if run.part == part:
                others[start:inner] = others[after : after + self.parts[part].after] = False
        return int(alive[others].max(initial=0))

    def own_peak(self, part: int, choice: Sequence[int]) -> int:
        """The most bytes alive in the forwards and backwards of a part."""
        alive = profile(self.problem, choice)
        tops = [0]
        for run, (start, inner, after) in zip(self.runs, self.places, strict=True):
            if run.part == part:
                tops += [int(alive[start:inner].max(initial=0))]
                tops += [int(alive[after : after + self.parts[part].after].max(initial=0))]
        return max(tops)


def nest(parts: Sequence[Part], runs: Sequence[Run], between: int = 0) -> Nested:
    """The problem of a step that runs these parts in this order. Raises `ValueError` without a run.

    So many bytes `between` are alive besides after the last forward and before the first backward.
    """
    if not runs:
        raise ValueError("runs: a step has at least one")
    places = _places(parts, runs)
    first = tuple(accumulate((len(part.problem.items) for part in parts[:-1]), initial=0))
    items = [
        _item(item, [(place, part.turn) for run, place in zip(runs, places, strict=True) if run.part == index], shift)
        for index, (part, shift) in enumerate(zip(parts, first, strict=True))
        for item in part.problem.items
    ]
    used = {run.part for run in runs}
    labels = _labels(parts, runs) if all(parts[index].problem.labels for index in used) else ()
    problem = Problem(tuple(_base(parts, runs, between)), tuple(items), labels)
    return Nested(tuple(parts), tuple(runs), problem, places, first)


def _places(parts: Sequence[Part], runs: Sequence[Run]) -> tuple[tuple[int, int, int], ...]:
    turns = [parts[run.part].turn for run in runs]
    starts = list(accumulate(turns, initial=0))
    after = starts[-1] + 1
    ends: list[int] = []
    for run in reversed(runs):
        ends.insert(0, after)
        after += parts[run.part].after
    return tuple(zip(starts[:-1], starts[1:], ends, strict=True))


def _base(parts: Sequence[Part], runs: Sequence[Run], between: int) -> list[int]:
    outer = list(accumulate((parts[run.part].problem.base[parts[run.part].turn] for run in runs), initial=0))
    base: list[int] = []
    for run, around in zip(runs, outer[:-1], strict=True):
        part = parts[run.part]
        base += [size + around + run.forward for size in part.problem.base[: part.turn]]
    base.append(outer[-1] + runs[-1].forward + between)
    for run, around in zip(reversed(runs), reversed(outer[:-1]), strict=True):
        part = parts[run.part]
        base += [size + around + run.backward for size in part.problem.base[part.turn + 1 :]]
    return base


def _labels(parts: Sequence[Part], runs: Sequence[Run]) -> tuple[str, ...]:
    forward = [label for run in runs for label in parts[run.part].problem.labels[: parts[run.part].turn]]
    last = parts[runs[-1].part]
    backward = [label for run in reversed(runs) for label in parts[run.part].problem.labels[parts[run.part].turn + 1 :]]
    return (*forward, last.problem.labels[last.turn], *backward)


def _item(item: Item, places: Sequence[tuple[tuple[int, int, int], int]], shift: int) -> Item:
    return replace(item, options=tuple(_option(option, places, shift) for option in item.options))


def _option(option: Option, places: Sequence[tuple[tuple[int, int, int], int]], shift: int) -> Option:
    """The option in all runs of its part, whose items are `shift` further on."""
    return replace(
        option,
        loads=tuple(_moved(load, place, turn) for place, turn in places for load in option.loads),
        time=option.time * len(places),
        needs=tuple((other + shift, allowed) for other, allowed in option.needs),
    )


def _moved(load: Load, place: tuple[int, int, int], turn: int) -> Load:
    """A load in one run: one over the turn is alive during all that lies inside."""
    start, _, after = place
    first, last, size = load
    begins = start + first if first <= turn else after + first - turn - 1
    ends = start + last if last < turn else after + last - turn - 1
    # What lies inside begins at `start + turn` and ends before `after`.
    return begins, ends, size
