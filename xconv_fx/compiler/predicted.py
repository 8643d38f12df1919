"""Plans on predictions alone, without any code: what `explain`, `xconv plan` and `xconv sweep` show."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from xconv_fx.errors import BudgetInfeasibleError
from xconv_fx.plan import Plan
from xconv_fx.planner.solve import Bounds

from .asked import planned_preset, wanted_variant
from .candidates import FULL_BATCH, Variant
from .capture import CaptureRequest, noted
from .comparison import Comparison
from .generate import Audited, plan
from .outcome import PlanFacts, report
from .pipeline import Planned


@dataclass(frozen=True)
class PlannedGraph:
    """What a graph was planned as, on predictions alone: its variant, its plan, and that as it was recorded."""

    variant: Variant
    planned: Planned
    plan: Plan


def plan_graph(request: CaptureRequest) -> PlannedGraph | None:
    """The plan that a search starts from; None for a graph without a backward.

    A budget in percent is one of the predicted peak. Raises `BudgetInfeasibleError`, and `OptionError` for a limit.
    """
    options = request.options
    if options.codecs.preset:
        found = planned_preset(request)
        return None if found is None else _recorded(request, FULL_BATCH, *found)
    if options.mem_budget is None:
        variant = wanted_variant(request)
        return _recorded(request, variant, plan(request, variant), PlanFacts())
    whole = request.problem(FULL_BATCH)
    if whole is None:
        return None
    baseline = whole.baseline_peak()
    comparison = Comparison(request.within(request.session.resolve(options.mem_budget, baseline, request.graph)))
    variant, planned = _first(comparison) or _lowest(comparison)
    facts = PlanFacts(baseline, time=comparison.extra_seconds(comparison.candidate_of(variant, planned)))
    return _recorded(noted(comparison.request, comparison.notes), variant, planned, facts)


def _recorded(
    request: CaptureRequest, variant: Variant, planned: Planned | None, facts: PlanFacts
) -> PlannedGraph | None:
    recorded = report(request, variant, planned, Audited(), facts)
    return None if planned is None or recorded is None else PlannedGraph(variant, planned, recorded)


def _first(comparison: Comparison) -> tuple[Variant, Planned] | None:
    """The plan of the best candidate; None where the solver, stopped by its clock, found none."""
    for candidate in comparison.candidates()[:1]:
        with contextlib.suppress(BudgetInfeasibleError):
            bounds = Bounds(comparison.allowed(candidate.variant))
            return candidate.variant, _planned(comparison.request, candidate.variant, bounds)
    return None


def _lowest(comparison: Comparison) -> tuple[Variant, Planned]:
    """The plan that starts from the one of least peak. Raises why there is none."""
    options = comparison.request.options
    found = comparison.lowest(options)
    if found is None or found.predicted > options.limit().usable:
        raise comparison.refusal(found)
    bounds = Bounds(comparison.allowed(found.variant), found.found.choice)
    return found.variant, _planned(comparison.request, found.variant, bounds)


def _planned(request: CaptureRequest, variant: Variant, bounds: Bounds) -> Planned:
    planned = plan(request, variant, bounds=bounds)
    assert planned is not None, "a graph without a backward has no budget"
    return planned
