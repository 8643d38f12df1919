"""The planning problem of a whole step, from the problem of one run of its graph.

The problem of a graph has one forward, one loss and one backward. Where the step runs in slices of the batch, or calls
the graph several times, it has several moments that may be its peak (`peak_scenarios.py`): the last slice's forward,
the loss, the first slice's backward, a later one beside the gradients summed so far, a forward that is run again. Each
becomes a copy of the steps of its phase, with what is alive besides that run: bytes that depend on no choice, and the
payloads of the other slices and calls that are held.
"""

from __future__ import annotations

from dataclasses import replace

from xconv_fx.cost_model.memory import Problem

from .microbatches import Microbatches, PeakScenario
from .peak_scenarios import ONCE, scenarios
from .problem import PlanningProblem
from .storage import StorageCandidate, items_of

Load = tuple[int, int, int]


def slice_step(planning: PlanningProblem, microbatches: Microbatches | None) -> PlanningProblem:
    """The problem of the whole step, whose slices (None: whose only one) `planning` describes."""
    if microbatches is None and planning.calls == ONCE:
        return planning
    base: list[int] = []
    labels: list[str] = []
    phases: list[str] = []
    moved: list[tuple[PeakScenario, range, int]] = []
    for scenario in scenarios(microbatches, planning.calls, planning.ends):
        found = planning.steps(scenario.phase)
        if not found:
            continue
        steps = range(found[0], found[-1] + 1)
        moved.append((scenario, steps, len(base) - steps.start))
        base += [planning.problem.base[step] + scenario.extra + scenario.others * planning.rest for step in steps]
        labels += [planning.problem.labels[step] for step in steps]
        phases += [scenario.phase] * len(steps)
    rows = tuple(tuple(_moved(candidate, moved) for candidate in row) for row in planning.candidates)
    problem = Problem(tuple(base), items_of(planning.residuals, rows), tuple(labels))
    return replace(planning, problem=problem, candidates=rows, phases=tuple(phases))


def _moved(candidate: StorageCandidate, moved: list[tuple[PeakScenario, range, int]]) -> StorageCandidate:
    """The loads in every scenario: the run's own, where they fall into the phase, and what others hold."""
    loads: list[Load] = []
    for scenario, steps, shift in moved:
        for first, last, size in candidate.option.loads:
            start, end = max(first, steps.start), min(last, steps.stop - 1)
            if start <= end:
                loads.append((start + shift, end + shift, size))
        if scenario.others:
            held = scenario.others * candidate.choice.bytes_after
            loads.append((steps.start + shift, steps.stop - 1 + shift, held))
    return replace(candidate, option=replace(candidate.option, loads=tuple(loads)))
