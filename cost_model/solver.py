"""Choose one option for every residual: least noise, then least time, with the peak within a byte budget.

With x[i, o] = 1 when item i takes option o, the plan is a small mixed-integer program for HiGHS:

    minimise  sum cost[i, o] x[i, o]     subject to    sum_o x[i, o] = 1                             for every item i
              base[t] + sum load[i, o, t] x[i, o] <= budget                                    for every step t
              x[i, o] + sum of x[j, o'] over the options o' that (i, o) rules out for j <= 1      for every need

solved twice: for the noise, then for the time among the plans that are within `TIE` of the least noise. Two programs
instead of one weighted sum, because the weight that makes noise come first must exceed time's whole range, and noise
alone spans some seven decades (8-bit rounding 1e-4, folds 1e3): one sum would drown in HiGHS's absolute `TOLERANCE`.
Each program is scaled to O(1) by what it can reach: bytes by the budget, costs by the best plan known so far, and an
option that alone costs more than that plan is struck out; a much better plan is found at its own scale.

HiGHS works in floating point, so a plan counts as fitting only when its bytes, added up as integers, do. `greedy.py`
gives the first incumbent, and the answer when time runs out.

Known gaps: plans are deterministic only while HiGHS finishes within the time limit; when it does not, how far it came
depends on the machine, `gap` says what is left open. HiGHS looks at its clock between operations and can overrun a
limit somewhat.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from xconv_fx.cost_model.greedy import Costs, Table, descend, relax
from xconv_fx.cost_model.memory import Problem

# Plans whose first objective is within this fraction of the least are told apart by the second one. The noise model is
# no better than that, and a looser cap lets the second program find plans quickly.
TIE = 1e-2
# HiGHS may stop at this relative gap, well within a tie.
RELATIVE_GAP = 1e-3
# What HiGHS lets constraints and objectives be off by, at scale 1: its bounds are worth no more than that.
TOLERANCE = 1e-6

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Solution:
    """A plan: `choice[i]` is the option of item i. Peak in bytes, reached first at `step`.

    `objective` is what was minimised (noise, or noise + tradeoff * time, or the peak), `bound` what no plan can go
    below, `gap` = (objective - bound) / objective. `time_gap` is the same for the second objective, among plans that
    tie in the first one.
    """

    choice: tuple[int, ...]
    objective: float
    bound: float
    gap: float
    peak: int
    step: int
    noise: float = 0.0
    time: float = 0.0
    time_gap: float = 0.0


class Infeasible(Exception):
    """No plan was found within the budget.

    `smallest` is the smallest peak found, in bytes: a budget that does work. `choice` is the plan that reaches it, at
    `step`; below `bound` no plan exists (so the budget is proven infeasible when it is below `bound`).
    """

    def __init__(self, *, budget: int, smallest: int, choice: tuple[int, ...], step: int, bound: float) -> None:
        super().__init__(f"no plan within {budget} bytes: the smallest peak found is {smallest} bytes, at step {step}")
        self.budget = budget
        self.smallest = smallest
        self.choice = choice
        self.step = step
        self.bound = bound


def solve(problem: Problem, budget: int, *, time_limit: float = 2.0, tradeoff: float = 0.0) -> Solution:
    """The plan of least noise, then least time, whose peak is at most `budget` bytes.

    `tradeoff` is the noise that saving one second a step is worth. 0, the default, is lossless first: noise is accepted
    only for bytes that no lossless option can save, and time only breaks ties (to within `TIE`). A positive number
    minimises noise + tradeoff * time, for those who would rather add 0.01 noise than replay a convolution; for a
    relative price, divide it by the seconds a step takes. `math.inf` minimises time and lets noise break ties.
    `time_limit` is in seconds. Raises `Infeasible` with the smallest peak, `ValueError` for a negative tradeoff.
    """
    if not tradeoff >= 0:
        raise ValueError(f"tradeoff: {tradeoff!r} is not a number from 0 (lossless first) to inf (fastest first)")
    end = time.monotonic() + time_limit
    table = Table(problem)
    first, second = _objectives(problem, tradeoff)
    start = _quick_plan(table, budget, first, second)
    stage = _minimise(table, budget, first, start, np.ones(first.size, dtype=bool), None, end - time_limit * 0.4)
    if stage is None:
        smallest = minimum_peak(problem, time_limit=max(end - time.monotonic(), time_limit / 2))
        if smallest.peak > budget:
            raise Infeasible(
                budget=budget, smallest=smallest.peak, choice=smallest.choice, step=smallest.step, bound=smallest.bound
            )
        stage = _Stage(list(smallest.choice), 0.0)
    cap = table.cost(first, stage.choice) * (1 + TIE)
    tied = first <= cap
    start = relax(
        table, stage.choice, budget, second, tied & (first <= first[table.columns(stage.choice)][table.owner])
    )
    final = _minimise(table, budget, second, start, tied, (first, cap), end)
    assert final is not None, "the second objective starts from a plan that fits"
    return _solution(problem, table, tradeoff, stage, final, first, second)


def minimum_peak(problem: Problem, *, time_limit: float = 2.0) -> Solution:
    """The plan with the smallest peak, whatever its noise and time. `objective` and `bound` are bytes."""
    table = Table(problem)
    best = _lowest_greedy(table)
    top = int(table.alive(best).max())
    lowest = _floor(table)
    if top > lowest:
        program = _Program(table, scale=max(top, 1))
        answer = program.lower_peak(time_limit)
        lowest = max(lowest, answer.bound * (1 - TOLERANCE))
        if answer.choice is not None and table.legal(answer.choice) and table.alive(answer.choice).max() < top:
            best = answer.choice
            top = int(table.alive(best).max())
    return replace(
        _describe(problem, table, best), objective=float(top), bound=min(lowest, top), gap=_gap(top, min(lowest, top))
    )


@dataclass(frozen=True)
class _Stage:
    """What minimising one cost gave: a plan that fits, and a proven lower bound of the cost."""

    choice: list[int]
    bound: float


@dataclass(frozen=True)
class _Answer:
    """What HiGHS gave: a plan or None, a lower bound of the objective, and whether it says that there is no plan."""

    choice: list[int] | None
    bound: float
    infeasible: bool


class _Program:
    """The constraints as HiGHS takes them. Variables: one a column of the table, then the scaled bytes of each step.

    Bytes of a step are written as those of the step before plus what begins and minus what ends there. That gives two
    non-zeros a load instead of one for every step it lives through.
    """

    def __init__(self, table: Table, scale: float) -> None:
        self.table = table
        self.scale = scale
        steps, columns = table.loads.shape
        changes = np.diff(table.loads, axis=0, prepend=np.zeros((1, columns), dtype=np.int64)) / scale
        level = sparse.eye(steps) - sparse.eye(steps, k=-1)
        rises = np.diff(table.base, prepend=0) / scale
        one_hot = sparse.csr_array((np.ones(columns), (table.owner, np.arange(columns))), (len(table.sizes), columns))
        self.rows = [
            LinearConstraint(sparse.hstack([one_hot, sparse.csr_array((len(table.sizes), steps))]), 1, 1),
            LinearConstraint(sparse.hstack([sparse.csr_array(-changes), level]), rises, rises),
        ]
        needs = table.needing.size
        if needs:
            own = sparse.csr_array((np.ones(needs), (np.arange(needs), table.needing)), (needs, columns))
            both = own + table.forbidden
            self.rows.append(LinearConstraint(sparse.hstack([both, sparse.csr_array((needs, steps))]), 0, 1))

    def cheapest(
        self, costs: Costs, limit: int, allowed: Mask, cap: tuple[Costs, float] | None, left: float
    ) -> _Answer:
        """Least `costs` within `limit` bytes, with only `allowed` columns and, with a cap, its costs at most that."""
        steps = len(self.table.steps)
        rows = list(self.rows)
        if cap is not None and cap[1] > 0:
            row = np.concatenate((np.where(allowed, cap[0], 0) / cap[1], np.zeros(steps)))
            rows.append(LinearConstraint(row[None, :], -np.inf, 1))
        upper = np.concatenate((allowed.astype(float), np.full(steps, limit / self.scale)))
        objective = np.concatenate((np.where(allowed, costs, 0.0), np.zeros(steps)))
        return self._run(objective, upper, rows, left)

    def lower_peak(self, left: float) -> _Answer:
        """The smallest peak; the bound is in bytes."""
        steps, columns = self.table.loads.shape
        objective = np.zeros(columns + steps + 1)
        objective[-1] = 1
        rows = [
            LinearConstraint(sparse.hstack([row.A, sparse.csr_array((row.A.shape[0], 1))]), row.lb, row.ub)
            for row in self.rows
        ]
        under = [sparse.csr_array((steps, columns)), sparse.eye(steps), sparse.csr_array(-np.ones((steps, 1)))]
        rows.append(LinearConstraint(sparse.hstack(under), -np.inf, 0))
        answer = self._run(objective, np.concatenate((np.ones(columns), np.full(steps + 1, np.inf))), rows, left)
        return replace(answer, bound=answer.bound * self.scale)

    def _run(self, objective: Costs, upper: Costs, rows: list[LinearConstraint], left: float) -> _Answer:
        columns = self.table.loads.shape[1]
        lower = np.concatenate((np.zeros(columns), np.full(objective.size - columns, -np.inf)))
        integral = np.concatenate((np.ones(columns), np.zeros(objective.size - columns)))
        options = {"time_limit": max(left, 0.01), "mip_rel_gap": RELATIVE_GAP}
        found = milp(objective, integrality=integral, bounds=Bounds(lower, upper), constraints=rows, options=options)
        bound = getattr(found, "mip_dual_bound", None)
        bound = float(bound) if bound is not None and np.isfinite(bound) else -math.inf
        if found.x is None:
            return _Answer(None, bound, infeasible=found.status == 2)
        parts = np.split(found.x[:columns], self.table.first[1:])
        return _Answer([int(part.argmax()) for part in parts], bound, infeasible=False)


def _objectives(problem: Problem, tradeoff: float) -> tuple[Costs, Costs]:
    """First and second cost of every column."""
    options = [option for item in problem.items for option in item.options]
    noise = np.array([option.noise for option in options], dtype=np.float64)
    seconds = np.array([option.time for option in options], dtype=np.float64)
    if math.isinf(tradeoff):
        return seconds, noise
    return noise + tradeoff * seconds, seconds


def _quick_plan(table: Table, budget: int, first: Costs, second: Costs) -> list[int] | None:
    """The best greedy plan that fits, or None. Three starts: without paying in the first cost, without options that
    have needs (one of those can pin its neighbours for good), and with everything."""
    if not table.sizes:
        return [] if table.base.max() <= budget else None
    blend = _unit(first) + 1e-6 * _unit(second)
    free = first <= np.minimum.reduceat(first, table.first)[table.owner]
    everything = np.ones_like(free)
    simple = everything.copy()
    simple[table.needing] = False
    found = []
    for allowed in (free, simple, everything):
        choice = descend(table, budget, blend, allowed)
        if table.alive(choice).max() <= budget:
            choice = relax(table, choice, budget, blend, everything)
            found.append((table.cost(first, choice), table.cost(second, choice), choice))
    return min(found)[2] if found else None


def _minimise(
    table: Table,
    budget: int,
    costs: Costs,
    best: list[int] | None,
    allowed: Mask,
    cap: tuple[Costs, float] | None,
    end: float,
) -> _Stage | None:
    """Least `costs` from the incumbent `best` (None: none known); None when no plan was found. `end` on the clock.

    Repeats while there is a reason to: a plan so much cheaper than the last that it deserves its own scale, or one that
    exceeds the budget by HiGHS's tolerance and asks for a limit that much lower.
    """
    least = np.minimum.reduceat(costs, table.first) if costs.size else costs
    extra = costs - least[table.owner]
    limit, bound = budget, 0.0
    for _ in range(6):
        scale = float(extra.max(initial=0.0)) if best is None else table.cost(extra, best)
        if best is not None and (scale <= 0 or bound >= scale * (1 - RELATIVE_GAP)):
            break
        usable = allowed & (extra <= scale)
        program = _Program(table, scale=max(budget, 1))
        answer = program.cheapest(extra / (scale or 1.0), limit, usable, cap, end - time.monotonic())
        if limit == budget:
            bound = max(bound, (answer.bound - TOLERANCE) * scale)
        if answer.choice is None:
            break
        over = int(table.alive(answer.choice).max()) - budget
        if over > 0:
            limit = min(limit, budget) - over
            continue
        cost = table.cost(extra, answer.choice)
        capped = cap is None or table.cost(cap[0], answer.choice) <= cap[1] * (1 + TOLERANCE)
        if not capped or not table.legal(answer.choice) or (best is not None and cost >= scale):
            break
        best = answer.choice
        if cost > 1e-3 * scale:
            break
    if best is None:
        return None
    return _Stage(best, min(bound, table.cost(extra, best)) + float(least.sum()))


def _lowest_greedy(table: Table) -> list[int]:
    """The lowest peak that the greedy walk reaches, by bisection over budgets."""
    nothing = np.zeros(table.loads.shape[1])
    allowed = np.ones(nothing.size, dtype=bool)
    best = [0] * len(table.sizes)
    low, high = int(_floor(table)), int(table.alive(best).max())
    for _ in range(12):
        if low >= high:
            break
        choice = descend(table, (low + high) // 2, nothing, allowed)
        top = int(table.alive(choice).max())
        if top < int(table.alive(best).max()):
            best = choice
        low, high = ((low + high) // 2 + 1, high) if top > (low + high) // 2 else (low, top)
    return best


def _floor(table: Table) -> float:
    """A peak that no plan goes below: every step with the least that each item can add to it."""
    if not table.sizes:
        return float(table.base.max())
    return float((table.base + np.minimum.reduceat(table.loads, table.first, axis=1).sum(axis=1)).max())


def _describe(problem: Problem, table: Table, choice: Sequence[int]) -> Solution:
    """A solution's own numbers, without an objective."""
    alive = table.alive(choice)
    row = int(alive.argmax())
    taken = [item.options[index] for item, index in zip(problem.items, choice, strict=True)]
    return Solution(
        choice=tuple(int(index) for index in choice),
        objective=0.0,
        bound=0.0,
        gap=0.0,
        peak=int(alive[row]),
        step=table.steps[row],
        noise=math.fsum(option.noise for option in taken),
        time=math.fsum(option.time for option in taken),
    )


def _solution(
    problem: Problem, table: Table, tradeoff: float, first: _Stage, final: _Stage, costs: Costs, ties: Costs
) -> Solution:
    """Put the two stages together."""
    objective = table.cost(costs, final.choice)
    bound = min(first.bound, objective)
    tie = table.cost(ties, final.choice)
    return replace(
        _describe(problem, table, final.choice),
        objective=objective,
        bound=bound,
        gap=_gap(objective, bound),
        time_gap=_gap(tie, min(final.bound, tie)),
    )


def _gap(value: float, bound: float) -> float:
    """Relative distance of a value to its lower bound; 0 when they are equal, also at 0."""
    return 0.0 if value <= bound else (value - bound) / max(abs(value), 1e-300)


def _unit(costs: Costs) -> Costs:
    """Costs over their largest magnitude."""
    return costs / (float(np.abs(costs).max(initial=0.0)) or 1.0)
