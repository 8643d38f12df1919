"""The step of a plan that was made before: one that the options give, or one that was kept on disk."""

from __future__ import annotations

from dataclasses import replace

from xconv_fx.errors import BudgetInfeasibleError, OptionError
from xconv_fx.plan import Plan
from xconv_fx.plan.log import log

from .candidates import Variant
from .capture import CaptureRequest
from .comparison import Comparison
from .generate import Generated, generate
from .outcome import Outcome, PlanFacts
from .pipeline import planned_as
from .stored_plans import StoredPlan, full_batch_of


def as_stored(request: CaptureRequest, stored: StoredPlan) -> Outcome | None:
    """What a plan that was kept comes to; None where that is not what it came to before."""
    assert request.options.mem_budget is not None, "plans are kept of budgets"
    budget = request.session.resolve(request.options.mem_budget, stored.baseline_peak, request.graph)
    limited = request.within(budget)
    limited = limited.plain() if stored.plan.inductor else limited
    try:
        generated = _of(limited, stored.variant(limited), stored.plan, budget)
    except ValueError as error:
        log.debug("a stored plan is not one of this graph: %s", error)
        return None
    if generated.step is None:
        log.debug("a stored plan takes more than its budget: %s", generated.audited.peaks)
        return None
    plan = stored.plan
    facts = PlanFacts(stored.baseline_peak, budget, plan.attempts, plan.foreseen, plan.time, plan.gap)
    return Outcome(generated, facts, stored.notes)


def as_given(request: CaptureRequest) -> Outcome:
    """What the plan that the options name comes to. Raises `OptionError` where none of them is one of this graph, and
    `BudgetInfeasibleError` where its step is over the budget."""
    given, reasons = request.session.given, []
    for number in given.left(request.graph.key):
        plan = given.plans[number]
        try:
            generated, budget = _given(request, plan)
        except ValueError as error:
            reasons.append(f"plan {number + 1} of {len(given.plans)} is not one of this graph: {error}")
            continue
        given.take(number, request.graph.key)
        if budget is not None and not request.options.limit(budget).allows(generated.peak):
            needed = request.options.smallest_for(generated.peak)
            note = "the option plan fixes how everything is held; without it, other plans are looked for"
            raise BudgetInfeasibleError(budget, needed, notes=(*request.notes, note))
        return Outcome(generated, PlanFacts(plan.baseline_peak, budget, time=plan.time, gap=plan.gap))
    first = reasons[0] if reasons else f"all of its {len(given.plans)} plans are taken by other graphs"
    hint = "write the file of a plan that was made for this model and these sizes, with the same other options"
    raise OptionError("plan", str(request.options.plan), f"{first}; {hint}")


def _given(request: CaptureRequest, plan: Plan) -> tuple[Generated, int | None]:
    """Code for a plan, and the budget in bytes that it is to keep. Raises `ValueError` where it is another's."""
    wanted = request.options.mem_budget
    budget = plan.budget if wanted is None else request.session.resolve(wanted, plan.baseline_peak, request.graph)
    if plan.inductor:
        request = request.plain()
    variant = full_batch_of(plan)
    if plan.slices > 1:
        sliced = replace(request, options=replace(request.options, slices=plan.slices))
        microbatches = Comparison(sliced).asked_slices()
        if microbatches is None:
            raise ValueError("it runs in slices, and this graph does not")
        variant = replace(variant, microbatches=replace(microbatches, held=plan.held_slices))
    return _of(request, variant, plan, budget, enforced=False), budget


def _of(
    request: CaptureRequest, variant: Variant, plan: Plan, budget: int | None, *, enforced: bool = True
) -> Generated:
    """Code for a plan; abandoned when it is over the budget, while that is `enforced`.

    Raises `ValueError`, which says why, where the plan is not one of this graph.
    """
    analysed, planning = request.analysed(variant), request.problem(variant)
    if analysed is None or planning is None:
        raise ValueError("the graph has no backward")
    if variant.microbatches is not None and analysed.mixing:
        raise ValueError(f"it runs in slices, and samples are not apart: {analysed.mixing}")
    planned = planned_as(analysed, planning, request.options, plan.choices, budget, variant.microbatches)
    return generate(request, variant, planned, enforced=enforced)
