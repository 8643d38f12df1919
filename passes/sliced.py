"""The planning problem of a step that runs in slices of the batch, from the problem of one slice.

The problem of a slice has one forward, one loss and one backward. The step has several moments that may be its peak
(`Slicing.episodes`): the last slice's forward, the loss, the first slice's backward, a later one beside the gradients
summed so far, a forward that is run again. Each becomes a copy of the steps of its phase, with what is alive besides
the slice: bytes that depend on no choice, and the payloads of the other slices that are held.
"""

from __future__ import annotations

from dataclasses import replace

from xconv_fx.cost_model.memory import Problem
from xconv_fx.slices import Episode, Slicing

from .problem import LOSS_COPIES, Candidate, Posed, items_of

Load = tuple[int, int, int]


def slice_step(posed: Posed, slicing: Slicing) -> Posed:
    """The problem of the whole step, whose slices `posed` describes."""
    episodes = slicing.episodes(posed.results, posed.tangents, LOSS_COPIES)
    base: list[int] = []
    labels: list[str] = []
    phases: list[str] = []
    moved: list[tuple[Episode, range, int]] = []
    for episode in episodes:
        found = posed.steps(episode.phase)
        if not found:
            continue
        steps = range(found[0], found[-1] + 1)
        moved.append((episode, steps, len(base) - steps.start))
        base += [posed.problem.base[step] + episode.extra + episode.others * posed.rest for step in steps]
        labels += [posed.problem.labels[step] for step in steps]
        phases += [episode.phase] * len(steps)
    rows = tuple(tuple(_moved(candidate, moved) for candidate in row) for row in posed.candidates)
    problem = Problem(tuple(base), items_of(posed.residuals, rows), tuple(labels))
    return replace(posed, problem=problem, candidates=rows, phases=tuple(phases))


def _moved(candidate: Candidate, episodes: list[tuple[Episode, range, int]]) -> Candidate:
    """The loads in every episode: the slice's own, where they fall into the phase, and what other slices hold."""
    loads: list[Load] = []
    for episode, steps, shift in episodes:
        for first, last, size in candidate.option.loads:
            start, end = max(first, steps.start), min(last, steps.stop - 1)
            if start <= end:
                loads.append((start + shift, end + shift, size))
        if episode.others:
            loads.append((steps.start + shift, steps.stop - 1 + shift, episode.others * candidate.choice.bytes_after))
    return replace(candidate, option=replace(candidate.option, loads=tuple(loads)))
