"""The lowest budget that the backend accepts, found by asking for the impossible: the refusal names what would work."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from xconv_fx.errors import BudgetInfeasibleError

from .worker import MethodError

# A lowest budget that the audit finds too low comes back higher; more than a few rounds would mean it never settles.
ROUNDS = 6

T = TypeVar("T")


def at_lowest_budget(attempt: Callable[[int], T], rounds: int = ROUNDS) -> tuple[int, T]:
    """The budget in bytes, and what `attempt` returns for it, in this process or by a worker.

    Raises `MethodError` when refusals do not settle.
    """
    budget = 1
    for _ in range(rounds):
        try:
            return budget, attempt(budget)
        except (BudgetInfeasibleError, MethodError) as error:
            if error.smallest is None:
                raise
            budget = error.smallest
    raise MethodError(f"the smallest feasible budget was infeasible {rounds} times, at last {budget} bytes", budget)
