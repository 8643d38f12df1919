"""A greedy plan: a fraction of a second, no solver, never wrong about fitting.

From "keep everything": while a step is over the budget, look at the highest one and take, of all option changes that
lower it, the one with the most bytes (no more than are missing) for its cost. Every change must shrink the total
excess, the sum over steps of bytes above the budget, so the walk ends. A reverse pass then takes back what turned out
not to be needed, dearest items first.

It gives the exact solver (`solver.py`) an incumbent to prune with, and an answer when the solver's time runs out.
Known gaps: one item changes at a time, so a pair of options that only fits together is not found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from .limits import NO_LIMITS, SLACK, Limits
from .memory import Bytes, Problem, dominant_steps, first_columns, load_matrix

Costs = NDArray[np.float64]
Mask = NDArray[np.bool_]


class Table:
    """A problem as arrays: one row a step that matters, one column an option of an item, items side by side.

    `caps` has a row for each limit, whose sum over a plan may be 1 at most; `permitted` are the columns that do not
    break one alone.
    """

    def __init__(self, problem: Problem, limits: Limits = NO_LIMITS) -> None:
        self.problem = problem
        self.steps = dominant_steps(problem)
        self.base: Bytes = np.asarray([problem.base[step] for step in self.steps], dtype=np.int64)
        self.loads = load_matrix(problem, self.steps)
        self.first = first_columns(problem)
        self.sizes = [len(item.options) for item in problem.items]
        self.owner = np.repeat(np.arange(len(self.sizes)), self.sizes)
        self.needing, self.forbidden = _needs(self)
        caps = limits.rows(problem)
        alone = (caps > 1 + SLACK) & (caps.min(axis=1, initial=0.0) >= 0)[:, None]
        self.permitted: Mask = ~alone.any(axis=0)
        self.caps: Costs = np.where(np.isfinite(caps), caps, 0.0)
        # A row a column of `caps`: an option takes of few of them.
        self.taking = sparse.csr_array(self.caps.T)

    def columns(self, choice: Sequence[int]) -> NDArray[np.int64]:
        """The column of every item's chosen option."""
        return self.first + np.asarray(choice, dtype=np.int64)

    def alive(self, choice: Sequence[int]) -> Bytes:
        """Bytes alive at the steps that matter."""
        return self.base + self.loads[:, self.columns(choice)].sum(axis=1)

    def cost(self, costs: Costs, choice: Sequence[int]) -> float:
        """Sum of a cost (one a column) over the chosen options."""
        return float(costs[self.columns(choice)].sum())

    def used(self, choice: Sequence[int]) -> Costs:
        """What the plan takes of every limit."""
        return np.asarray(self.taking[self.columns(choice)].sum(axis=0))

    def keeps(self, choice: Sequence[int]) -> bool:
        """Whether the plan is within every limit."""
        return bool(self.permitted[self.columns(choice)].all() and (self.used(choice) <= 1 + SLACK).all())

    def within(self, choice: Sequence[int], among: NDArray[np.int64]) -> Mask:
        """Which of the columns `among` a single item may change to within every limit, or no further above it."""
        used = self.used(choice)
        added = self.taking[among] - self.taking[self.columns(choice)[self.owner[among]]]
        after = used[added.indices] + added.data
        broken = np.repeat(np.arange(len(among)), np.diff(added.indptr))[
            after > np.maximum(1 + SLACK, used[added.indices])
        ]
        result = self.permitted[among]
        result[broken] = False
        return result

    def blocked(self, choice: Sequence[int]) -> Mask:
        """Columns that no single item may change to: what they need is missing, or another item needs otherwise."""
        taken = np.zeros(self.owner.size, dtype=np.int64)
        taken[self.columns(choice)] = 1
        result = self.forbidden.T @ taken[self.needing] > 0
        result[self.needing[self.forbidden @ taken > 0]] = True
        return result

    def legal(self, choice: Sequence[int]) -> bool:
        """Whether every chosen option has what it needs."""
        return not self.blocked(choice)[self.columns(choice)].any()


def descend(table: Table, budget: int, costs: Costs, allowed: Mask, start: Sequence[int] | None = None) -> list[int]:
    """Lower the highest step until every step is within `budget` or no change of a single item helps.

    `costs` and `allowed` have one entry a column. `start` is a legal plan, "keep everything" when there is none, and
    may itself hold what is not allowed. The result is legal but fits only if `table.alive` of it says so.
    """
    choice = [0] * len(table.sizes) if start is None else list(start)
    alive = table.alive(choice)
    while (excess := _excess(alive, budget)) > 0:
        for item, option in _changes(table, choice, alive, budget, costs, allowed):
            after = (
                alive + table.loads[:, table.first[item] + option] - table.loads[:, table.first[item] + choice[item]]
            )
            if _excess(after, budget) < excess:
                choice[item], alive = option, after
                break
        else:
            return choice
    return choice


def relax(table: Table, choice: Sequence[int], budget: int, costs: Costs, allowed: Mask) -> list[int]:
    """Take back what is not needed: cheaper options of single items while the plan stays legal and within budget."""
    result = list(choice)
    alive = table.alive(result)
    changed = True
    while changed:
        changed = False
        usable = _usable(table, result, allowed)
        for item in np.argsort(-costs[table.columns(result)], kind="stable").tolist():
            for option in _cheaper(table, item, result[item], costs, usable):
                start = table.first[item]
                after = alive + table.loads[:, start + option] - table.loads[:, start + result[item]]
                if after.max() <= budget:
                    result[item], alive, changed = option, after, True
                    usable = _usable(table, result, allowed)
                    break
    return result


def _usable(table: Table, choice: Sequence[int], allowed: Mask) -> Mask:
    """Which of the allowed columns a single item may change to."""
    usable = allowed & ~table.blocked(choice)
    among = np.flatnonzero(usable)
    usable[among] = table.within(choice, among)
    return usable


def _needs(table: Table) -> tuple[NDArray[np.int64], sparse.csr_array]:
    """One row a need: the column that has it, and ones at the columns that it rules out."""
    needing: list[int] = []
    rows: list[int] = []
    columns: list[int] = []
    for item, start in zip(table.problem.items, table.first.tolist(), strict=True):
        for number, option in enumerate(item.options):
            for other, allowed in option.needs:
                ruled_out = [
                    int(table.first[other]) + index for index in range(table.sizes[other]) if index not in allowed
                ]
                rows += [len(needing)] * len(ruled_out)
                columns += ruled_out
                needing.append(start + number)
    ones = np.ones(len(rows), dtype=np.int64)
    matrix = sparse.csr_array((ones, (rows, columns)), shape=(len(needing), table.owner.size))
    return np.asarray(needing, dtype=np.int64), matrix


def _changes(
    table: Table, choice: list[int], alive: Bytes, budget: int, costs: Costs, allowed: Mask
) -> Iterator[tuple[int, int]]:
    """Option changes that lower the highest step, best first: free ones by bytes, then by bytes for their cost."""
    top = int(alive.argmax())
    taken = table.columns(choice)[table.owner]
    saved = table.loads[top, taken] - table.loads[top]
    found = np.flatnonzero(_usable(table, choice, (saved > 0) & allowed))
    price = costs[found] - costs[taken[found]]
    useful = np.minimum(saved[found], alive[top] - budget).astype(np.float64)
    free = price <= 0
    rate = np.where(free, useful, useful / np.where(free, 1.0, price))
    for place in np.lexsort((found, -rate, ~free)).tolist():
        item = int(table.owner[found[place]])
        yield item, int(found[place] - table.first[item])


def _cheaper(table: Table, item: int, option: int, costs: Costs, allowed: Mask) -> list[int]:
    """Allowed options of an item that cost less than the one given, cheapest first."""
    start = int(table.first[item])
    prices = costs[start : start + table.sizes[item]]
    return [
        int(other)
        for other in np.argsort(prices, kind="stable")
        if prices[other] < prices[option] and allowed[start + other]
    ]


def _excess(alive: Bytes, budget: int) -> int:
    """Total bytes above the budget, summed over the steps."""
    return int(np.maximum(alive - budget, 0).sum())
