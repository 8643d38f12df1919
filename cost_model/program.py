"""The mixed-integer program behind a plan, as HiGHS takes it.

With x[i, o] = 1 when item i takes option o:

    minimise  sum cost[i, o] x[i, o]     subject to    sum_o x[i, o] = 1                             for every item i
              base[t] + sum load[i, o, t] x[i, o] <= budget                                    for every step t
              x[i, o] + sum of x[j, o'] over the options o' that (i, o) rules out for j <= 1      for every need
              sum cap[i, o] x[i, o] <= 1                                                       for every limit

HiGHS (Huangfu, Hall: Parallelizing the dual revised simplex method, 2018) is reached through `scipy.optimize.milp`.

Known gaps: scipy passes HiGHS no starting plan and no tolerance of ours, so the caller checks what comes back.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from .greedy import Costs, Mask, Table

# HiGHS may stop at this relative gap, well within what the solver calls a tie.
RELATIVE_GAP = 1e-3
# What HiGHS lets constraints and objectives be off by, at scale 1: its bounds are worth no more than that.
TOLERANCE = 1e-6

# Constraints of bytes run up to this number, so that the tolerance is 8 bytes at 8 GB: less than a tensor.
BYTE_RANGE = 1e3

# A cost a column, and what their sum over a plan may be at most.
Cap: TypeAlias = tuple[Costs, float]


@dataclass(frozen=True)
class Effort:
    """What HiGHS may spend: until `end` on the monotonic clock, and so many `nodes` of a search tree (None: any)."""

    end: float
    nodes: int | None = None

    def options(self) -> dict[str, float]:
        """As `scipy.optimize.milp` takes it, from now on."""
        limits: dict[str, float] = {"time_limit": max(self.end - time.monotonic(), 0.01)}
        return limits if self.nodes is None else {**limits, "node_limit": self.nodes}


@dataclass(frozen=True)
class Answer:
    """What HiGHS gave: a plan or None, a lower bound of the objective, and whether it says that there is no plan.

    The plan of a relaxation takes the largest fraction of every item; it need not fit or have what it needs.
    """

    choice: list[int] | None
    bound: float
    infeasible: bool


class Program:
    """Constraints shared by all objectives. Variables: one a column of the table, then the scaled bytes of each step.

    Bytes of a step are written as those of the step before plus what begins and minus what ends there. That gives two
    non-zeros a load instead of one for every step it lives through. `largest` is a number of bytes near the peak.
    """

    def __init__(self, table: Table, largest: int) -> None:
        self.table = table
        self.scale = max(largest, 1) / BYTE_RANGE
        steps, columns = table.loads.shape
        items, needs = len(table.sizes), table.needing.size
        changes = np.diff(table.loads, axis=0, prepend=np.zeros((1, columns), dtype=np.int64)) / self.scale
        rises = np.diff(table.base, prepend=0) / self.scale
        level = sparse.eye_array(steps) - sparse.eye_array(steps, k=-1)
        one_hot = sparse.csr_array((np.ones(columns), (table.owner, np.arange(columns))), (items, columns))
        own = sparse.csr_array((np.ones(needs), (np.arange(needs), table.needing)), (needs, columns))
        self.rows = [
            LinearConstraint(_beside(one_hot, _zeros(items, steps)), 1, 1),
            LinearConstraint(_beside(sparse.csr_array(-changes), level), rises, rises),
        ]
        if needs:
            self.rows.append(LinearConstraint(_beside(own + table.forbidden, _zeros(needs, steps)), 0, 1))
        if table.caps.size:
            caps = sparse.csr_array(np.where(table.permitted, table.caps, 0.0))
            self.rows.append(LinearConstraint(_beside(caps, _zeros(caps.shape[0], steps)), -np.inf, 1))

    def cheapest(
        self, costs: Costs, limit: int, allowed: Mask, cap: Cap | None, effort: Effort, *, relax: bool = False
    ) -> Answer:
        """Least `costs` within `limit` bytes, with `allowed` columns only and `cap` kept.

        `relax` lets options be taken in fractions: a linear program, whose optimum bounds that of every plan.
        """
        steps = len(self.table.steps)
        rows = list(self.rows)
        if cap is not None and cap[1] > 0:
            row = np.concatenate((np.where(allowed, cap[0], 0) / cap[1], np.zeros(steps)))
            rows.append(LinearConstraint(row[None, :], -np.inf, 1))
        upper = np.concatenate((allowed.astype(float), np.full(steps, limit / self.scale)))
        objective = np.concatenate((np.where(allowed, costs, 0.0), np.zeros(steps)))
        return self._run(objective, upper, rows, effort, relax)

    def lower_peak(self, effort: Effort) -> Answer:
        """The smallest peak; the bound is in bytes."""
        steps, columns = self.table.loads.shape
        objective = np.zeros(columns + steps + 1)
        objective[-1] = 1
        rows = [LinearConstraint(_beside(row.A, _zeros(row.A.shape[0], 1)), row.lb, row.ub) for row in self.rows]
        under = _beside(_zeros(steps, columns), sparse.eye_array(steps), sparse.csr_array(-np.ones((steps, 1))))
        rows.append(LinearConstraint(under, -np.inf, 0))
        upper = np.concatenate((self.table.permitted.astype(float), np.full(steps + 1, np.inf)))
        answer = self._run(objective, upper, rows, effort, relax=False)
        return replace(answer, bound=answer.bound * self.scale)

    def _run(self, objective: Costs, upper: Costs, rows: list[LinearConstraint], effort: Effort, relax: bool) -> Answer:
        columns = self.table.loads.shape[1]
        others = objective.size - columns
        found = milp(
            objective,
            integrality=np.concatenate((np.full(columns, 0 if relax else 1), np.zeros(others))),
            bounds=Bounds(np.concatenate((np.zeros(columns), np.full(others, -np.inf))), upper),
            constraints=rows,
            options={**effort.options(), "mip_rel_gap": RELATIVE_GAP},
        )
        proven = found.fun if relax and found.status == 0 else found.mip_dual_bound
        bound = float(proven) if proven is not None and math.isfinite(proven) else -math.inf
        if found.x is None:
            return Answer(None, bound, infeasible=found.status == 2)
        parts = np.split(found.x[:columns], self.table.first[1:])
        return Answer([int(part.argmax()) for part in parts], bound, infeasible=False)


def _beside(*blocks: sparse.sparray) -> sparse.csr_array:
    """Blocks in one row."""
    return sparse.csr_array(sparse.hstack(blocks))


def _zeros(rows: int, columns: int) -> sparse.csr_array:
    """A block without entries."""
    return sparse.csr_array((rows, columns))
