"""Compile one graph: by the plan that its options give, that was kept on disk, or that is searched for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from xconv_fx.errors import BudgetInfeasibleError

from .asked import preset, without_budget
from .capture import CaptureRequest
from .made_before import as_given, as_stored
from .search import search
from .stored_plans import StoredPlan, find, keep


def compile_graph(request: CaptureRequest) -> Callable[..., Any]:
    """The compiled step. Raises `BudgetInfeasibleError` when no plan fits the budget, `OptionError` for a limit or a
    plan that cannot be kept."""
    options = request.options
    if options.plan is not None:
        return as_given(request).finished()[0]
    if options.codecs.preset:
        return preset(request).finished()[0]
    if options.mem_budget is None:
        return without_budget(request).finished()[0]
    place, stored = find(request)
    outcome = None if stored is None else as_stored(request, stored)
    return _searched(request, place) if outcome is None else outcome.finished()[0]


def _searched(request: CaptureRequest, place: Path | None) -> Callable[..., Any]:
    """The step of a plan that is searched for; what the search comes to is kept in this place."""
    try:
        outcome = search(request)
    except BudgetInfeasibleError as error:
        keep(place, error)
        raise
    step, recorded = outcome.finished()
    if recorded is not None:
        microbatches = outcome.generated.variant.microbatches
        keep(place, StoredPlan.of(recorded, outcome.facts.baseline_peak or 0, outcome.notes, microbatches))
    return step
