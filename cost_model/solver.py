"""Choose one option for every residual: least noise, then least time, with the peak within a byte budget.

`solve` minimises two costs in turn, each with the mixed-integer program of `program.py`: the noise, then the time among
the plans that are within `TIE` of the least noise. Two programs instead of one weighted sum, because the weight that
makes noise come first must exceed time's whole range, and noise alone spans some seven decades (8-bit rounding 1e-4,
folds 1e3): one sum would drown in HiGHS's absolute tolerance. Each program is scaled to O(1) by what it can reach:
bytes by the budget, costs by the best plan known so far, and an option that alone costs more than that plan is struck
out; a much better plan is found at its own scale.

The first incumbent comes from `greedy.py`, the next from rounding the linear relaxation, and HiGHS has to beat them; it
runs only when the relaxation leaves room for something better. So there is an answer when time runs out. HiGHS works in
floating point: a plan counts as fitting only when its bytes, added up as integers, do.

Known gaps: plans are the same on every run only while HiGHS finishes within the time limit, or when `nodes` stops it
before; else how far it came depends on the machine. `gap` says what is left open. HiGHS looks at its clock between
operations and can overrun a limit somewhat.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .greedy import Costs, Mask, Table, descend, relax
from .limits import NO_LIMITS, Limits
from .memory import Problem, peak
from .program import RELATIVE_GAP, TOLERANCE, Answer, Cap, Effort, Program
from .segments import segmented

# Plans whose first objective is within this fraction of the least are told apart by the second one. The noise model is
# no better than that, and a looser cap lets the second program find plans quickly.
TIE = 1e-2
# Of the starts in segments, so many are followed up.
TRIED = 2


@dataclass(frozen=True)
class Solution:
    """A plan: `choice[i]` is the option of item i. Peak in bytes, reached first at `step`.

    `objective` is what was minimised (noise, or noise + tradeoff * time, or the peak), `bound` what no plan can go
    below, `gap` = (objective - bound) / objective, of which up to `TIE` is what a tie allows. `tie_gap` is the same for
    the second objective, among plans that tie in the first one.
    """

    choice: tuple[int, ...]
    objective: float
    bound: float
    gap: float
    peak: int
    step: int
    noise: float = 0.0
    time: float = 0.0
    tie_gap: float = 0.0


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


class OverLimits(Exception):
    """No plan is within the limits, however large the budget: an item has no option that is."""


def solve(
    problem: Problem,
    budget: int,
    *,
    time_limit: float = 2.0,
    nodes: int | None = None,
    tradeoff: float = 0.0,
    limits: Limits = NO_LIMITS,
    start: Sequence[int] | None = None,
) -> Solution:
    """The plan of least noise, then least time, whose peak is at most `budget` bytes, and which is within `limits`.

    `tradeoff` is the noise that saving one second a step is worth. 0, the default, is lossless first: noise is accepted
    only for bytes that no lossless option can save, and time only breaks ties (to within `TIE`). A positive number
    minimises noise + tradeoff * time, for those who would rather add 0.01 noise than replay a convolution; for a
    relative price, divide it by the seconds a step takes. `math.inf` minimises time and lets noise break ties.
    `time_limit` is in seconds; half as much again may go into the smallest peak when nothing fits. `nodes` bounds each
    search tree of HiGHS, which unlike seconds gives the same plan on every machine. `start` is a plan that is known to
    be within the budget and the limits. Raises `Infeasible` with the
    smallest peak of the plans within the limits, `OverLimits` when "keep" (option 0) of every item is not, and
    `ValueError` for a negative tradeoff.
    """
    if not tradeoff >= 0:
        raise ValueError(f"tradeoff: {tradeoff!r} is not a number from 0 (lossless first) to inf (fastest first)")
    end = time.monotonic() + time_limit
    table = Table(problem, limits)
    if not table.keeps([0] * len(table.sizes)):
        raise OverLimits
    first, second = _objectives(problem, tradeoff)
    everything = table.permitted
    quick = _quick_plan(table, budget, first, second)
    if start is not None:
        quick = _better(table, budget, first, None, quick, relax(table, start, budget, first, everything))
    stage = _minimise(table, budget, first, quick, everything, None, Effort(end - 0.4 * time_limit, nodes))
    best = stage.choice
    if best is None:
        lowest = _lowest_plan(problem, budget, time_limit / 2, nodes, limits)
        best = relax(table, lowest, budget, first, everything)
    extra = first - _least(table, first)[table.owner]
    cap = table.cost(extra, best) * (1 + TIE)
    no_dearer = first <= first[table.columns(best)][table.owner]
    relaxed = relax(table, best, budget, second, no_dearer)
    final = _minimise(table, budget, second, relaxed, everything & (extra <= cap), (extra, cap), Effort(end, nodes))
    assert final.choice is not None, "the second objective starts from a plan that fits"
    plan = _describe(problem, final.choice)
    objective, tie = table.cost(first, final.choice), table.cost(second, final.choice)
    return replace(
        plan,
        objective=objective,
        bound=min(stage.bound, objective),
        gap=_gap(objective, stage.bound),
        tie_gap=_gap(tie, final.bound),
    )


def _lowest_plan(
    problem: Problem, budget: int, time_limit: float, nodes: int | None, limits: Limits
) -> tuple[int, ...]:
    """The plan of smallest peak. Raises `Infeasible` when even that is over the budget."""
    lowest = minimum_peak(problem, time_limit=time_limit, nodes=nodes, limits=limits)
    if lowest.peak > budget:
        raise Infeasible(
            budget=budget, smallest=lowest.peak, choice=lowest.choice, step=lowest.step, bound=lowest.bound
        )
    return lowest.choice


def minimum_peak(
    problem: Problem, *, time_limit: float = 2.0, nodes: int | None = None, limits: Limits = NO_LIMITS
) -> Solution:
    """The plan with the smallest peak within the limits, whatever its noise and time. `objective` and `bound` are
    bytes; see `solve`."""
    table = Table(problem, limits)
    best = _lowest_greedy(table)
    top = int(table.alive(best).max())
    lowest = _floor(table)
    if top > lowest:
        answer = Program(table, top).lower_peak(Effort(time.monotonic() + time_limit, nodes))
        lowest = max(lowest, answer.bound * (1 - TOLERANCE))
        valid = answer.choice is not None and table.legal(answer.choice) and table.keeps(answer.choice)
        if answer.choice is not None and valid and table.alive(answer.choice).max() < top:
            best = answer.choice
            top = int(table.alive(best).max())
    return replace(
        _describe(problem, best), objective=float(top), bound=min(lowest, top), gap=_gap(top, min(lowest, top))
    )


@dataclass(frozen=True)
class _Stage:
    """What minimising one cost gave: a plan that fits or None, and a proven lower bound of the cost."""

    choice: list[int] | None
    bound: float


def _objectives(problem: Problem, tradeoff: float) -> tuple[Costs, Costs]:
    """First and second cost of every column."""
    options = [option for item in problem.items for option in item.options]
    noise = np.array([option.noise for option in options], dtype=np.float64)
    seconds = np.array([option.time for option in options], dtype=np.float64)
    if math.isinf(tradeoff):
        return seconds, noise
    return noise + tradeoff * seconds, seconds


def _quick_plan(table: Table, budget: int, first: Costs, second: Costs) -> list[int] | None:
    """The best greedy plan that fits, or None. It begins with everything kept, to change it without paying in the first
    cost, without options that have needs (one of those can pin its neighbours for good), or at all; where none of these
    fits, in segments."""
    if not table.sizes:
        return [] if table.base.max() <= budget else None
    blend = _unit(first) + 1e-6 * _unit(second)
    everything = table.permitted
    free = everything & (first <= _least(table, first)[table.owner])
    simple = everything.copy()
    simple[table.needing] = False
    keep = [0] * len(table.sizes)
    lowered = [descend(table, budget, blend, allowed, keep) for allowed in (free, simple, everything)]
    fitting = [choice for choice in lowered if table.alive(choice).max() <= budget]
    if not fitting:
        starts = (start for start in segmented(table.problem) if table.keeps(start))
        lowered = [descend(table, budget, blend, everything, start) for start in starts]
        fitting = [choice for choice in lowered if table.alive(choice).max() <= budget]
        fitting = sorted(fitting, key=lambda choice: table.cost(blend, choice))[:TRIED]
    relaxed = [relax(table, choice, budget, blend, everything) for choice in fitting]
    return min(
        relaxed, key=lambda choice: (table.cost(first, choice), table.cost(second, choice), choice), default=None
    )


def _minimise(
    table: Table, budget: int, costs: Costs, best: list[int] | None, allowed: Mask, cap: Cap | None, effort: Effort
) -> _Stage:
    """Least `costs` from the incumbent `best` (None: none known).

    A round is the relaxation (a bound, and a plan by rounding), then the program itself. There is another round only
    for a plan so much cheaper than the last that it deserves its own scale, or after one that exceeds the budget by
    HiGHS's tolerance, with a limit that much lower.
    """
    if not table.sizes:
        return _Stage(best, 0.0)
    least = _least(table, costs)
    extra = costs - least[table.owner]
    program = Program(table, budget)
    limit, bound = budget, 0.0
    for _ in range(6):
        if best is not None and table.cost(extra, best) * (1 - RELATIVE_GAP) <= bound:
            break
        scale = _scale(table, extra, best)
        usable = allowed & (extra <= scale)
        relaxed = program.cheapest(extra / scale, limit, usable, cap, effort, relax=True)
        rounded = _repair(table, budget, extra, usable, relaxed)
        best = _better(table, budget, extra, cap, best, rounded)
        bound = max(bound, (relaxed.bound - TOLERANCE) * scale) if limit == budget else bound
        if relaxed.infeasible or (best is not None and table.cost(extra, best) * (1 - RELATIVE_GAP) <= bound):
            break
        answer = program.cheapest(extra / scale, limit, usable, cap, effort)
        bound = max(bound, (answer.bound - TOLERANCE) * scale) if limit == budget else bound
        if answer.choice is None:
            break
        over = int(table.alive(answer.choice).max()) - budget
        best = _better(table, budget, extra, cap, best, answer.choice)
        if over > 0:
            limit = min(limit, budget) - over
        elif best is None or table.cost(extra, best) > 1e-3 * scale:
            break
    if best is not None:
        bound = min(bound, table.cost(extra, best))
    return _Stage(best, bound + float(least.sum()))


def _least(table: Table, costs: Costs) -> Costs:
    """Every item's smallest cost."""
    return np.minimum.reduceat(costs, table.first) if table.sizes else costs


def _scale(table: Table, extra: Costs, best: list[int] | None) -> float:
    """What the objective is divided by: the incumbent's cost, or the dearest option's."""
    return (float(extra.max(initial=0.0)) if best is None else table.cost(extra, best)) or 1.0


def _repair(table: Table, budget: int, costs: Costs, allowed: Mask, relaxed: Answer) -> list[int] | None:
    """A plan from the rounded relaxation: legal by keeping what lacks its needs, then lowered and relaxed greedily."""
    if relaxed.choice is None:
        return None
    choice = _within_limits(table, list(relaxed.choice))
    while not table.legal(choice):
        missing = table.blocked(choice)[table.columns(choice)]
        choice = [0 if lacks else option for lacks, option in zip(missing.tolist(), choice, strict=True)]
    choice = descend(table, budget, costs, allowed, choice)
    return relax(table, choice, budget, costs, allowed) if table.alive(choice).max() <= budget else None


def _within_limits(table: Table, choice: list[int]) -> list[int]:
    """The plan with "keep" for what takes most of a limit that it breaks, until it breaks none."""
    permitted = table.permitted[table.columns(choice)]
    choice = [option if allowed else 0 for option, allowed in zip(choice, permitted, strict=True)]
    while not table.keeps(choice):
        row = int(table.used(choice).argmax())
        item = int((table.caps[row, table.columns(choice)] - table.caps[row, table.first]).argmax())
        if choice[item] == 0:
            break  # Nothing is left to keep.
        choice[item] = 0
    return choice


def _better(
    table: Table, budget: int, costs: Costs, cap: Cap | None, best: list[int] | None, other: list[int] | None
) -> list[int] | None:
    """The other plan if it is cheaper, fits to the byte, has what it needs and keeps the cap and all limits; else the
    best so far."""
    if other is None or table.alive(other).max() > budget or not table.legal(other) or not table.keeps(other):
        return best
    if cap is not None and table.cost(cap[0], other) > cap[1] * (1 + TOLERANCE):
        return best
    return other if best is None or table.cost(costs, other) < table.cost(costs, best) else best


def _lowest_greedy(table: Table) -> list[int]:
    """The lowest peak that the greedy walk reaches, by bisection over budgets."""
    keep = [0] * len(table.sizes)
    segments = sorted(
        (start for start in segmented(table.problem) if table.keeps(start)),
        key=lambda start: int(table.alive(start).max()),
    )
    lowered = [_lowered(table, start) for start in (keep, *segments[:TRIED])]
    return min(lowered, key=lambda choice: int(table.alive(choice).max()))


def _lowered(table: Table, start: list[int]) -> list[int]:
    """The lowest peak that the greedy walk reaches from a plan."""
    nothing = np.zeros(table.loads.shape[1])
    best = start
    low, high = int(_floor(table)), int(table.alive(best).max())
    for _ in range(8):
        if low >= high:
            break
        choice = descend(table, (low + high) // 2, nothing, table.permitted, start)
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


def _describe(problem: Problem, choice: Sequence[int]) -> Solution:
    """A solution's own numbers, without an objective."""
    top, step = peak(problem, choice)
    taken = [item.options[index] for item, index in zip(problem.items, choice, strict=True)]
    return Solution(
        choice=tuple(int(index) for index in choice),
        objective=0.0,
        bound=0.0,
        gap=0.0,
        peak=top,
        step=step,
        noise=math.fsum(option.noise for option in taken),
        time=math.fsum(option.time for option in taken),
    )


def _gap(value: float, bound: float) -> float:
    """Relative distance of a value to its lower bound; 0 when they are equal, also at 0."""
    return 0.0 if value <= bound else (value - bound) / max(abs(value), 1e-300)


def _unit(costs: Costs) -> Costs:
    """Costs over their largest magnitude."""
    return costs / (float(np.abs(costs).max(initial=0.0)) or 1.0)
