"""Why a graph is refused under its budget and its limits, and what would work.

A limit that the user gave is named when a plan within the budget exists without it, with the least that a plan within
the budget reaches. Otherwise the budget is, with the smallest one that works; where the limits that protect learning
are what makes it so large, a note says how to lift them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from xconv_fx.cost_model.solver import Infeasible
from xconv_fx.errors import BudgetInfeasibleError, XConvError
from xconv_fx.options import PROTECTION, Options
from xconv_fx.planner.microbatch import slice_step
from xconv_fx.planner.problem import PlanningProblem
from xconv_fx.planner.solve import infeasible
from xconv_fx.units import sufficient_size

from .candidates import Candidate, Variant, over

# What is asked for to see how far a limit could be kept: the preference that lowers it most.
_LOWERED_BY = {"max_noise": "exact", "max_layer_noise": "exact", "max_slowdown": "speed"}


@dataclass(frozen=True)
class Lowest:
    """The plan of least predicted peak among the variants, and the problem of its variant."""

    variant: Variant
    planning: PlanningProblem
    found: Infeasible

    @property
    def predicted(self) -> int:
        """Its predicted peak in bytes."""
        return self.found.smallest

    def consumers(self, options: Options) -> tuple[tuple[str, int], ...]:
        """The largest holders of memory at its peak."""
        microbatches = self.variant.microbatches
        planning = self.planning if microbatches is None else slice_step(self.planning, microbatches)
        return infeasible(planning, self.found, 0, options).consumers


def refusal(
    options: Options,
    smallest: int,
    lowest: Lowest | None,
    candidates: Callable[[Options], list[Candidate]],
    least: Callable[[Options], Lowest | None],
    notes: tuple[str, ...],
) -> XConvError:
    """The error for options whose budget, in bytes, is below the `smallest` that works.

    `lowest` is the plan of least peak within the limits (None: no plan is, whatever the budget). By other options,
    `candidates` gives those within the budget, and `least` the plan of least peak.
    """
    assert options.mem_budget is not None
    budget = options.mem_budget.resolve(0)
    limits = options.given_limits()
    for lifted in (*([name] for name in limits), list(limits)):
        for name in lifted:
            lax = _without(replace(options, prefer=_LOWERED_BY[name]), lifted)
            values = [candidate.limited(name) for candidate in candidates(lax)]
            if values and min(values) > limits[name]:
                return over(name, limits[name], min(values))
    if lowest is None:
        return over("max_slowdown", limits["max_slowdown"], limits["max_slowdown"])
    if options.protected:
        unprotected = least(_without(options, ["max_noise"]))
        if unprotected is not None and unprotected.predicted < lowest.predicted:
            notes = (*notes, _protection(options.smallest_for(unprotected.predicted)))
    return BudgetInfeasibleError(budget, smallest, lowest.consumers(options), notes)


def _without(options: Options, names: Sequence[str]) -> Options:
    lifted: dict[str, Any] = dict.fromkeys(names)
    return replace(options, **lifted)


def _protection(needed: int) -> str:
    return (
        f"plans that are predicted to add more noise than {PROTECTION.noise:g} of the gradients' energy, or "
        f"{PROTECTION.layer:g} of a layer's, are left out; max_noise=None lifts these limits, and about "
        f"{sufficient_size(needed)} is then enough"
    )
