"""Memory over a training step, as a plan predicts it: who holds how many bytes at which operation.

The planner's own problem says it: what is alive whatever is chosen, and what each residual adds from the operation that
makes it to the last one that reads it (`cost_model/memory.py`). A step of thousands of operations is cut into a few
hundred columns, each of which stands for the operation of its run of operations at which most is alive; the peak is
always among them.

A step in slices of the batch is shown as the moments that may be its peak (`xconv_fx/planner/microbatch.py`), one after
another, not as the many slices that run.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np

from xconv_fx.cost_model.memory import profile
from xconv_fx.plan import Choice, Plan
from xconv_fx.planner.problem import PlanningProblem
from xconv_fx.planner.storage import StorageCandidate

COLUMNS = 400


# First and last column, both included, and bytes.
Load = tuple[int, int, int]


@dataclass(frozen=True)
class Memory:
    """What is alive in every column of a step, in bytes.

    `labels` name the columns' operations. `phases` are runs of columns, (name, first column). `fixed` is alive all the
    time; `rest[t]` is whatever else no choice changes: transients, gradients, results. `residuals[i]` are the loads of
    the plan's choice i.
    """

    labels: tuple[str, ...]
    phases: tuple[tuple[str, int], ...]
    fixed: int
    rest: tuple[int, ...]
    residuals: tuple[tuple[Load, ...], ...]

    @property
    def total(self) -> list[int]:
        """All bytes alive, a number a column."""
        alive = np.asarray(self.rest, dtype=np.int64) + self.fixed
        for first, last, size in (load for loads in self.residuals for load in loads):
            alive[first : last + 1] += size
        return [int(size) for size in alive]


def memory_of(planning: PlanningProblem, plan: Plan, columns: int = COLUMNS) -> Memory:
    """Memory over the step of a plan of this problem, which for slices of the batch is that of the whole step."""
    chosen = [_chosen(row, choice) for row, choice in zip(planning.candidates, plan.choices, strict=True)]
    alive = profile(planning.problem, chosen)
    steps = [max(run, key=alive.__getitem__) for run in _runs(planning.phases, columns)]
    rest = [planning.problem.base[step] - planning.fixed_bytes for step in steps]
    residuals = []
    for row, index in zip(planning.candidates, chosen, strict=True):
        loads = []
        for first, last, size in row[index].option.loads:
            begin, end = int(np.searchsorted(steps, first)), int(np.searchsorted(steps, last, side="right")) - 1
            if begin > end:
                continue
            if size > 0:
                loads.append((begin, end, size))
            for column in range(begin, end + 1) if size < 0 else ():
                # It releases what is alive otherwise.
                rest[column] += size
        residuals.append(tuple(loads))
    names = [planning.phases[step] for step in steps]
    starts = [next(group)[0] for _, group in groupby(enumerate(names), key=lambda pair: pair[1])]
    return Memory(
        labels=tuple(planning.problem.labels[step] for step in steps),
        phases=tuple((names[start], start) for start in starts),
        fixed=planning.fixed_bytes,
        rest=tuple(rest),
        residuals=tuple(residuals),
    )


def _runs(phases: tuple[str, ...], columns: int) -> list[range]:
    """The steps in order, cut into runs that are nearly equal and do not cross from phase to phase."""
    runs = []
    start = 0
    for _, group in groupby(phases):
        length = len(list(group))
        pieces = max(1, min(length, round(columns * length / len(phases))))
        edges = [start + length * piece // pieces for piece in range(pieces + 1)]
        runs += [range(a, b) for a, b in pairwise(edges)]
        start += length
    return runs


def _chosen(row: tuple[StorageCandidate, ...], choice: Choice) -> int:
    """Which candidate a choice of a plan is."""
    return next(i for i, candidate in enumerate(row) if candidate.choice == choice)
