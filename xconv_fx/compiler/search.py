"""Choose how a graph is run under its budget: the whole batch at once, or in how many slices, of which how many held.

Every way has a plan of its own: how much noise its codecs add, and how much longer the step takes (codecs, forwards
that are run again, smaller kernels). `prefer` says how the two are weighed. Ways are compared on predicted plans, from
a trace alone, and code is generated for the best one. When the audit rules that out, all ways are compared again with
what it found, so that no way is taken that is worse than another one that fits.

When none is left, the plan of least predicted peak decides, which does not depend on the budget: its audited peak, or
that of the plain step, is the smallest budget that an error names, and any budget from there on ends at that plan at
the latest.

Known gap: a plan of least peak is the same in every run as long as the solver is not stopped by its clock, which takes
problems of thousands of residuals.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xconv_fx.errors import BudgetInfeasibleError, OptionError, XConvError
from xconv_fx.options import Options, Probes
from xconv_fx.options.budget import Budget
from xconv_fx.plan import Plan
from xconv_fx.plan.log import log
from xconv_fx.planner.solve import Bounds

from .candidates import FULL_BATCH, Candidate, Variant, select, slowdown
from .capture import CaptureRequest
from .comparison import Comparison
from .feedback import NOTHING_FOUND, Feedback
from .generate import Audited, Generated, generate, plan, report
from .pipeline import Planned, planned_as
from .refusals import Lowest, refusal
from .stored_plans import StoredPlan, find, keep

# Plans that are generated before the one of least peak is.
ATTEMPTS = 8
# A plain step predicted to exceed its budget by more than this share is not generated to make sure.
DOUBT = 0.1
# Passes change what keeping everything takes: of a graph predicted with them, only this much is beyond doubt.
FAR = 1.5
# Two plans whose predicted peaks are this close may come out the other way round in the audit.
CLOSE = 0.05


@dataclass(frozen=True)
class PlannedGraph:
    """What a graph was planned as, on predictions alone: its variant, its plan, and that as it was recorded."""

    variant: Variant
    planned: Planned
    plan: Plan


@dataclass(frozen=True)
class _Taken:
    """The way that was taken, its code, and how many plans were generated on the way there."""

    way: Candidate
    generated: Generated
    tried: int
    foreseen: float | None


class Search:
    """The search for a way to run one graph within its budget."""

    def __init__(self, request: CaptureRequest) -> None:
        self.comparison = Comparison(request)
        # Where a plan that is searched for is kept.
        self.place: Path | None = None

    @property
    def request(self) -> CaptureRequest:
        """What is compiled."""
        return self.comparison.request

    def compile(self) -> Callable[..., Any]:
        """The compiled step. Raises `BudgetInfeasibleError` when no way fits the budget."""
        options = self.request.options
        if options.plan is not None:
            return self._as_given()
        if options.codecs.preset:
            return self._preset()
        if options.mem_budget is None:
            return self._without_budget()
        place, stored = find(self.request)
        if stored is not None and (step := self._as_stored(stored, options.mem_budget)) is not None:
            return step
        self.place = place
        try:
            return self._searched(options.mem_budget)
        except BudgetInfeasibleError as error:
            keep(place, error)
            raise

    def _searched(self, wanted: Budget) -> Callable[..., Any]:
        """The step of a plan that is looked for."""
        options = self.request.options
        plain: Generated | None = None
        if wanted.bytes is None or not (known := self._beyond_doubt(wanted.bytes)):
            plain = self._plain
            budget = self._budget(wanted, plain.peak)
            known = {"baseline_peak": plain.peak, "budget": budget}
            if options.limit(budget).allows(plain.peak) and self._plain_will_do:
                return self._finished(plain, **known)
            self.comparison.request = self.request.within(budget)
        taken = self._search()
        if isinstance(taken, _Taken):
            return self._finished(
                taken.generated, attempts=taken.tried, foreseen=taken.foreseen, **known, **self._time(taken.way)
            )
        return self._least(plain, *taken, **known)

    def _as_stored(self, stored: StoredPlan, wanted: Budget) -> Callable[..., Any] | None:
        """The step of a plan that was found before; None where it does not come out as it did."""
        budget = self._budget(wanted, stored.baseline_peak)
        request = self.request.within(budget)
        request = request.plain() if stored.plan.inductor else request
        try:
            generated = self._of(request, stored.variant(request), stored.plan, budget)
        except ValueError as error:
            log.debug("a stored plan is not one of this graph: %s", error)
            return None
        if generated.step is None:
            log.debug("a stored plan takes more than its budget: %s", generated.audited.peaks)
            return None
        known = {name: getattr(stored.plan, name) for name in ("attempts", "foreseen", "time", "gap")}
        self.comparison.request = replace(request, notes=(*self.request.notes, *stored.notes))
        return self._finished(generated, baseline_peak=stored.baseline_peak, budget=budget, **known)

    def _of(
        self, request: CaptureRequest, variant: Variant, plan: Plan, budget: int | None, *, enforced: bool = True
    ) -> Generated:
        """Code for a plan that was made before; abandoned when it is over the budget, while that is `enforced`.

        Raises `ValueError`, which says why, where the plan is not one of this graph.
        """
        analysed, planning = request.analysed(variant), request.problem(variant)
        if analysed is None or planning is None:
            raise ValueError("the graph has no backward")
        if variant.microbatches is not None and analysed.mixing:
            raise ValueError(f"it runs in slices, and samples are not apart: {analysed.mixing}")
        planned = planned_as(analysed, planning, request.options, plan.choices, budget, variant.microbatches)
        return generate(request, variant, planned, enforced=enforced)

    def _as_given(self) -> Callable[..., Any]:
        """The step of the plan that the options name. Raises `OptionError` where none of them is one of this graph."""
        given, reasons = self.request.session.given, []
        for number in given.left(self.request.graph.key):
            plan = given.plans[number]
            try:
                generated, budget = self._given(plan)
            except ValueError as error:
                reasons.append(f"plan {number + 1} of {len(given.plans)} is not one of this graph: {error}")
                continue
            given.take(number, self.request.graph.key)
            if budget is not None and not self.request.options.limit(budget).allows(generated.peak):
                needed = self.request.options.smallest_for(generated.peak)
                note = "the option plan fixes how everything is held; without it, other plans are looked for"
                raise BudgetInfeasibleError(budget, needed, notes=(*self.request.notes, note))
            known = {name: getattr(plan, name) for name in ("baseline_peak", "time", "gap")}
            return self._finished(generated, budget=budget, **known)
        first = reasons[0] if reasons else f"all of its {len(given.plans)} plans are taken by other graphs"
        hint = "write the file of a plan that was made for this model and these sizes, with the same other options"
        raise OptionError("plan", str(self.request.options.plan), f"{first}; {hint}")

    def _given(self, plan: Plan) -> tuple[Generated, int | None]:
        """Code for a plan, and the budget in bytes that it is to keep. Raises `ValueError` where it is another's."""
        wanted, request = self.request.options.mem_budget, self.request
        budget = plan.budget if wanted is None else self._budget(wanted, plan.baseline_peak)
        if plan.inductor:
            request = request.plain()
        variant = replace(FULL_BATCH, saved=plan.saved_share, relayout=plan.relayout)
        if plan.slices > 1:
            sliced = replace(request, options=replace(request.options, slices=plan.slices))
            microbatches = Comparison(sliced).asked_slices()
            if microbatches is None:
                raise ValueError("it runs in slices, and this graph does not")
            variant = replace(variant, microbatches=replace(microbatches, held=plan.held_slices))
        return self._of(request, variant, plan, budget, enforced=False), budget

    def _without_budget(self) -> Callable[..., Any]:
        """The step as it is, or in as many slices as the user wants, all of them held."""
        variant = self._wanted_variant()
        planned = plan(self.request, variant)
        self._check_limits(planned)
        return self._finished(generate(self.request, variant, planned))

    def _wanted_variant(self) -> Variant:
        """The variant of a step without a budget. Raises `OptionError` where the batch cannot be sliced as wanted."""
        microbatches = self.comparison.asked_slices()
        return FULL_BATCH if microbatches is None else Variant(replace(microbatches, held=microbatches.count))

    @functools.cached_property
    def _plain(self) -> Generated:
        """The code that Inductor generates by itself, without kernels."""
        plain = self.request.plain()
        return generate(plain, FULL_BATCH, plan(plain, FULL_BATCH), enforced=False)

    @property
    def _plain_will_do(self) -> bool:
        """Whether the plain step is what the options ask for, if it fits."""
        options = self.request.options
        return options.probes == Probes() and options.slices in (None, 1)

    def _search(self) -> _Taken | tuple[int, float | None]:
        """The best way whose generated code fits, by predictions that are corrected by every audit.

        Where there is none, how many were generated, and how well the first was foreseen.
        """
        feedback, tried, foreseen = NOTHING_FOUND, 0, None
        while tried < ATTEMPTS:
            way = next((way for way in self.comparison.ways(feedback) if not feedback.repeats(way.variant)), None)
            if way is None:
                break
            tried += 1
            generated = self._attempt(way.variant, feedback)
            if generated is None:
                feedback = feedback.without(way.variant)
                continue
            foreseen = foreseen or generated.foreseen
            if generated.step is None:
                feedback = feedback.after(generated)
                continue
            found = _Taken(way, generated, tried, foreseen)
            return self._exact_instead(found, feedback) or found
        return tried, foreseen

    def _attempt(self, variant: Variant, feedback: Feedback) -> Generated | None:
        """Code for a way; None where the planner sees no plan of it any more, by what audits found."""
        try:
            planned = plan(
                self.request, variant, feedback.corrections(variant), Bounds(self.comparison.allowed(variant))
            )
        except BudgetInfeasibleError:
            return None
        return generate(self.request, variant, planned)

    def _exact_instead(self, noisy: _Taken, feedback: Feedback) -> _Taken | None:
        """The plain step, or the exact way of least peak, where that is better than a noisy one and its code fits.

        An exact way that is predicted to fit was compared already. But predictions err, and corrections as well: what
        other plans were found to be short of may be less for these. So one that is predicted to exceed the budget is
        generated, unless that is by far more than the noisy one's audit was off.
        """
        options = self.request.options
        if noisy.way.noise == 0 or options.codecs.exact or options.probes != Probes():
            return None
        assert options.mem_budget is not None
        usable = options.limit().usable
        doubtful = usable * (1 + CLOSE) + _overestimated(noisy.generated)
        if self._plain_will_do and self._plain_predicted <= doubtful:
            plain = self._plain
            if plain.peak <= usable:
                return replace(noisy, way=Candidate(FULL_BATCH, 0.0, 0.0), generated=plain)
        exact = replace(options, max_noise=0.0)
        found = self.comparison.lowest(exact, feedback)
        if found is None or not usable < found.predicted <= doubtful:
            return None
        generated = self._generated(found, exact, feedback)
        way = self._way_of(found.variant, generated.planned)
        better = way.cost(options.prefer) < noisy.way.cost(options.prefer)
        return _Taken(way, generated, noisy.tried + 1, noisy.foreseen) if better and generated.peak <= usable else None

    def _generated(self, found: Lowest, options: Options, feedback: Feedback = NOTHING_FOUND) -> Generated:
        """The code of a plan of least peak, whatever its peak turns out to be."""
        needed = options.smallest_for(found.predicted)
        request = replace(self.request, options=replace(options, mem_budget=Budget(bytes=needed)))
        bounds = Bounds(self.comparison.allowed(found.variant), found.found.choice)
        planned = plan(request, found.variant, feedback.corrections(found.variant), bounds)
        return generate(request, found.variant, planned, enforced=False)

    def _budget(self, wanted: Budget, plain: int) -> int:
        """The budget in bytes, of a step that takes `plain` without xconv."""
        return self.request.session.resolve(wanted, plain, self.request.graph)

    def _preset(self) -> Callable[..., Any]:
        """The step with everything held as a published system holds it, if that fits the budget."""
        options, known = self.request.options, {}
        if options.mem_budget is not None:
            plain = 0
            if options.mem_budget.bytes is None:
                plain = self._plain.peak
                known["baseline_peak"] = plain
            known["budget"] = self._budget(options.mem_budget, plain)
        planned = plan(self.request, FULL_BATCH)
        generated = generate(self.request, FULL_BATCH, planned, enforced=False)
        if planned is not None:
            self._check_preset(planned, generated.peak, known.get("budget"))
        return self._finished(generated, **known)

    def _check_preset(self, planned: Planned, reached: int, budget: int | None) -> None:
        """Raise unless the plan of a preset, whose peak is `reached`, is within the budget and the limits."""
        options, plan = self.request.options, planned.plan
        if budget is not None and not options.limit(budget).allows(reached):
            largest = [(c.layer or c.residual, c.bytes_after) for c in plan.choices]
            largest.append(("parameters, buffers and inputs", plan.fixed_bytes))
            note = f"codecs={options.codecs.preset!r} fixes how everything is held; 'all' lets it be planned"
            raise BudgetInfeasibleError(budget, options.smallest_for(reached), largest, (*self.request.notes, note))
        self._check_limits(planned)

    def _check_limits(self, planned: Planned | None) -> None:
        """Raise `OptionError` where a plan that the options name breaks a limit of theirs."""
        if planned is None or not self.request.options.given_limits():
            return
        layer = max((noise for _, noise in planned.plan.layers), default=0.0)
        whole = planned.planning if planned.microbatches is None else self.comparison.whole
        slower = slowdown(planned.planning, whole or planned.planning, planned.microbatches, planned.plan.time)
        select([Candidate(FULL_BATCH, planned.plan.noise, slower, layer)], self.request.options)

    def _beyond_doubt(self, budget: int) -> dict[str, int]:
        """What is known of the plain step without its code, when it is predicted to exceed the budget by far.

        Empty when the prediction leaves a doubt.
        """
        if self.comparison.whole is None:
            return {}
        predicted = self.comparison.whole.baseline_peak()
        if budget * (1 + DOUBT) < predicted <= budget * FAR:
            predicted = self._plain_predicted
        return {"baseline_peak": predicted, "budget": budget} if predicted > budget * (1 + DOUBT) else {}

    @functools.cached_property
    def _plain_predicted(self) -> int:
        """The predicted peak of the graph as Inductor compiles it, without what passes do to it under a budget."""
        planning = self.request.plain().problem(FULL_BATCH)
        assert planning is not None
        return planning.baseline_peak()

    def plan(self) -> PlannedGraph | None:
        """The plan to start from, on predictions alone; None for a graph without a backward.

        A budget in percent is one of the predicted peak. Raises `BudgetInfeasibleError`.
        """
        options = self.request.options
        if options.codecs.preset:
            return self._plan_preset()
        if options.mem_budget is None:
            variant = self._wanted_variant()
            return self._planned(variant, plan(self.request, variant))
        if self.comparison.whole is None:
            return None
        baseline = self.comparison.whole.baseline_peak()
        self.comparison.request = self.request.within(self._budget(options.mem_budget, baseline))
        variant, planned = self._first_planned() or self._lowest_planned()
        return self._planned(
            variant, planned, baseline_peak=baseline, **self._time(self._way_of(variant, planned))
        )  # fmt: skip

    def _planned(self, variant: Variant, planned: Planned | None, **known: Any) -> PlannedGraph | None:
        recorded = report(self._noted, variant, planned, Audited(), **known)
        return None if planned is None or recorded is None else PlannedGraph(variant, planned, recorded)

    def _first_planned(self) -> tuple[Variant, Planned] | None:
        """The plan of the best way; None where the solver, stopped by its clock, found none."""
        for way in self.comparison.ways()[:1]:
            with contextlib.suppress(BudgetInfeasibleError):
                planned = plan(self.request, way.variant, bounds=Bounds(self.comparison.allowed(way.variant)))
                assert planned is not None, "a graph without a backward has no budget"
                return way.variant, planned
        return None

    def _lowest_planned(self) -> tuple[Variant, Planned]:
        """The plan that starts from the one of least peak. Raises why there is none."""
        options = self.request.options
        assert options.mem_budget is not None
        found = self.comparison.lowest(options)
        if found is None or found.predicted > options.limit().usable:
            raise self._refusal(found)
        bounds = Bounds(self.comparison.allowed(found.variant), found.found.choice)
        planned = plan(self.request, found.variant, bounds=bounds)
        assert planned is not None, "a graph without a backward has no budget"
        return found.variant, planned

    def _plan_preset(self) -> PlannedGraph | None:
        """The predicted plan of a published system. Raises `BudgetInfeasibleError` where that exceeds the budget."""
        planned = plan(self.request, FULL_BATCH)
        if planned is None:
            return None
        budget = self.request.options.mem_budget
        known = {} if budget is None else {"budget": self._budget(budget, planned.plan.baseline_peak)}
        self._check_preset(planned, planned.plan.predicted_peak, known.get("budget"))
        return self._planned(FULL_BATCH, planned, **known)

    @property
    def _noted(self) -> CaptureRequest:
        """What is compiled, with what was noted on the way."""
        return replace(self.request, notes=self.comparison.notes)

    def _time(self, way: Candidate) -> dict[str, float]:
        """The predicted extra seconds of a way that is more than codecs, which is all that a plan knows of."""
        return {"time": way.slowdown * self.comparison.seconds} if way.variant != FULL_BATCH else {}

    def _least(
        self, plain: Generated | None, tried: int, foreseen: float | None, **known: Any
    ) -> Callable[..., Any]:  # fmt: skip
        """The step of least peak: of the plans of least predicted peak, one of them exact, and of the plain step.

        Nothing here depends on the budget, nor on what audits found under it. Raises `BudgetInfeasibleError` with the
        audited peak as the smallest budget when that is over the budget, or `OptionError` for a limit that is.
        """
        options = self.request.options
        assert options.mem_budget is not None
        usable = options.limit().usable
        found = self.comparison.lowest(options)
        steps = [] if found is None else [self._generated(found, options)]
        if steps and options.probes == Probes():
            quiet = replace(options, max_noise=0.0)
            exact = self.comparison.lowest(quiet)
            if exact is not None and self._might_be_lower(exact, found, steps[0]):
                steps.append(self._generated(exact, quiet))
        best = min(steps, key=lambda step: step.peak, default=None)
        if best is not None and best.peak <= usable:
            attempts = {"attempts": tried + len(steps), "foreseen": foreseen or best.foreseen}
            return self._finished(best, **attempts, **known, **self._time(self._way_of(best.variant, best.planned)))
        if self._plain_will_do:
            plain = plain or self._plain
            if plain.peak <= usable:
                return self._finished(plain, **{**known, "baseline_peak": plain.peak})
            steps.append(plain)
        smallest = options.smallest_for(min((step.peak for step in steps), default=0))
        raise self._refusal(found, smallest)

    def _might_be_lower(self, exact: Lowest, found: Lowest | None, generated: Generated) -> bool:
        """Whether the exact plan of least predicted peak is another one than the plan found, and may have a lower peak
        than that was audited to have."""
        another = found is None or (exact.variant, exact.found.choice) != (found.variant, found.found.choice)
        return another and exact.predicted <= generated.peak * (1 + CLOSE) + _overestimated(generated)

    def _refusal(self, found: Lowest | None, smallest: int | None = None) -> XConvError:
        """Why there is no plan; by predictions the smallest budget is that of the plan `found`."""
        options = self.request.options
        if smallest is None:
            smallest = 0 if found is None else options.smallest_for(found.predicted)
        comparison = self.comparison
        return refusal(options, smallest, found, comparison.ways_by, comparison.lowest, comparison.notes)

    def _way_of(self, variant: Variant, planned: Planned | None) -> Candidate:
        """The way that was planned."""
        assert planned is not None and self.comparison.whole is not None
        slower = slowdown(planned.planning, self.comparison.whole, variant.microbatches, planned.plan.time)
        return Candidate(variant, planned.plan.noise, slower)

    def _finished(self, generated: Generated, **known: Any) -> Callable[..., Any]:
        """The step of code that is run whatever its peak."""
        assert generated.step is not None, "code that was abandoned is not run"
        generated.load()
        known = {"foreseen": generated.foreseen, "inductor": generated.request.options.plain, **known}
        request = replace(generated.request, notes=self.comparison.notes)
        recorded = report(request, generated.variant, generated.planned, generated.audited, **known)
        if recorded is not None and self.place is not None:
            found = self.comparison.found_notes
            keep(self.place, StoredPlan.of(recorded, known["baseline_peak"], found, generated.variant.microbatches))
        return generated.step


def _overestimated(generated: Generated) -> int:
    """By how much a plan's predicted peak is above its audited one, in bytes."""
    assert generated.planned is not None
    return max(0, generated.planned.plan.predicted_peak - generated.peak)
