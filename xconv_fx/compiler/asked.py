"""Steps that the options say all of, so that nothing is searched for: presets, and steps without a budget."""

from __future__ import annotations

from dataclasses import replace

from xconv_fx.errors import BudgetInfeasibleError

from .candidates import FULL_BATCH, Candidate, Variant, select, slowdown
from .capture import CaptureRequest
from .comparison import Comparison
from .generate import generate, plan
from .outcome import Outcome, PlanFacts
from .pipeline import Planned
from .plain_step import PlainStep


def without_budget(request: CaptureRequest) -> Outcome:
    """The step as it is, or in as many slices as the user wants, all of them held."""
    variant = wanted_variant(request)
    planned = plan(request, variant)
    _check_limits(request, planned)
    return Outcome(generate(request, variant, planned), PlanFacts())


def wanted_variant(request: CaptureRequest) -> Variant:
    """The variant of a step without a budget. Raises `OptionError` where the batch cannot be sliced as wanted."""
    microbatches = Comparison(request).asked_slices()
    return FULL_BATCH if microbatches is None else Variant(replace(microbatches, held=microbatches.count))


def preset(request: CaptureRequest) -> Outcome:
    """The step with everything held as a published system holds it. Raises `BudgetInfeasibleError` where that is over
    the budget, and `OptionError` where it is over a limit."""
    wanted, facts = request.options.mem_budget, PlanFacts()
    if wanted is not None:
        known = PlainStep(request).generated.peak if wanted.bytes is None else None
        facts = PlanFacts(known, request.session.resolve(wanted, known or 0, request.graph))
    planned = plan(request, FULL_BATCH)
    generated = generate(request, FULL_BATCH, planned, enforced=False)
    if planned is not None:
        _check_preset(request, planned, generated.peak, facts.budget)
    return Outcome(generated, facts)


def planned_preset(request: CaptureRequest) -> tuple[Planned, PlanFacts] | None:
    """The same on predictions alone; None for a graph without a backward."""
    planned, wanted, facts = plan(request, FULL_BATCH), request.options.mem_budget, PlanFacts()
    if planned is None:
        return None
    if wanted is not None:
        facts = PlanFacts(budget=request.session.resolve(wanted, planned.plan.baseline_peak, request.graph))
    _check_preset(request, planned, planned.plan.predicted_peak, facts.budget)
    return planned, facts


def _check_preset(request: CaptureRequest, planned: Planned, reached: int, budget: int | None) -> None:
    """Raise unless the plan of a preset, whose peak is `reached`, is within the budget and the limits."""
    options, plan = request.options, planned.plan
    if budget is not None and not options.limit(budget).allows(reached):
        largest = [(c.layer or c.residual, c.bytes_after) for c in plan.choices]
        largest.append(("parameters, buffers and inputs", plan.fixed_bytes))
        note = f"codecs={options.codecs.preset!r} fixes how everything is held; 'all' lets it be planned"
        raise BudgetInfeasibleError(budget, options.smallest_for(reached), largest, (*request.notes, note))
    _check_limits(request, planned)


def _check_limits(request: CaptureRequest, planned: Planned | None) -> None:
    """Raise `OptionError` where a plan that the options name breaks a limit of theirs."""
    if planned is None or not request.options.given_limits():
        return
    layer = max((noise for _, noise in planned.plan.layers), default=0.0)
    whole = planned.planning if planned.microbatches is None else request.problem(FULL_BATCH)
    slower = slowdown(planned.planning, whole or planned.planning, planned.microbatches, planned.plan.time)
    select([Candidate(FULL_BATCH, planned.plan.noise, slower, layer)], request.options)
