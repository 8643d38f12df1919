"""When residuals are made again that are not held: just before they are read, or for a segment at once.

What is made again reads what comes before it in the forward, which the backward reads later. So a chain of
convolutions, of whose values only the first is held, is run again from there on as soon as its last value is read, and
its values are held until the backward comes to them: a *segment*, as between two checkpoints. What can be made again
is, in the forward's order, the leaves of a tree of segments; each segment is split where the forward holds least, not
far from the middle. A residual may be made again for any segment that it is in, so that the solver chooses how long
segments are, where they are, and what is held inside of one. What loops alone make is never held: it is there from a
step on when its sources are.

For what is run again at the same step but before others, only what exceeds those others adds to the peak: they are not
there yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from xconv_fx.passes.rematerialize import RecomputeSubgraph
from xconv_fx.passes.residuals import Residual

from .step_timeline import StepTimeline


@dataclass(frozen=True)
class Start:
    """A step of the backward before which a residual is made again, where `after` bytes are run again behind it.

    `length` is that of the segment, on a logarithmic scale of how many residuals can be made again in it.
    """

    step: int
    after: int
    length: int


def starts(
    residuals: Mapping[str, Residual], chains: Mapping[str, RecomputeSubgraph], line: StepTimeline
) -> dict[str, tuple[Start, ...]]:
    """By name, when each residual that has a chain may be made again: the latest first."""
    names = sorted((name for name in residuals if name in chains), key=lambda name: residuals[name].forward)
    read = {name: min(line.read(residual)) for name, residual in residuals.items()}
    found = {name: _alone(name, read, chains) for name in names}
    for segment in _segments(names, _alive_before(names, residuals, line)):
        step, after, length = min(read[name] for name in segment), 0, (len(segment) - 1).bit_length()
        for name in reversed(segment):
            if step < found[name][-1].step:
                found[name].append(Start(step, after, length))
            after += residuals[name].bytes * chains[name].reruns
    return {name: tuple(some) for name, some in found.items()}


def _alone(name: str, read: Mapping[str, int], chains: Mapping[str, RecomputeSubgraph]) -> list[Start]:
    """Where the residual is first read, and where those are that loops make of it."""
    made = [other for other, chain in chains.items() if name in chain.sources and not chain.reruns]
    steps = {read[name], *(read[other] for other in made if read[other] < read[name])}
    return [Start(step, 0, 0) for step in sorted(steps, reverse=True)]


def _alive_before(names: Sequence[str], residuals: Mapping[str, Residual], line: StepTimeline) -> list[int]:
    """The least that is alive in the forward between each of these residuals and the one before it, in bytes."""
    alive = line.forward.profile()
    places = [line.forward.step_of(residuals[name].forward) for name in names]
    return [min(alive[before : max(place, before) + 1]) for before, place in pairwise([0, *places])]


def _segments(names: Sequence[str], alive: Sequence[int]) -> Iterator[Sequence[str]]:
    """All segments, those inside of one before it."""
    if len(names) > 1:
        quarter, middle = len(names) // 4, len(names) / 2
        cut = min(range(max(1, quarter), len(names) - quarter), key=lambda at: (alive[at], abs(at - middle)))
        yield from _segments(names[:cut], alive[:cut])
        yield from _segments(names[cut:], alive[cut:])
    if names:
        yield names
