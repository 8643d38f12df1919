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
from dataclasses import replace
from typing import Any

from xconv_fx.errors import BudgetInfeasibleError, XConvError
from xconv_fx.options import Options, Probes
from xconv_fx.options.budget import Budget
from xconv_fx.plan import Plan
from xconv_fx.planner.solve import Bounds

from .attempt import Compilation, Traced
from .candidates import AT_ONCE, Route, Way, select, slowdown
from .comparison import Comparison, compared_route
from .pipeline import Job
from .refusals import Lowest, refusal

# Plans that are generated before the one of least peak is.
ATTEMPTS = 8
# A plain step predicted to exceed its budget by more than this share is not generated to make sure.
DOUBT = 0.1
# Passes change what keeping everything takes: of a graph predicted with them, only this much is beyond doubt.
FAR = 1.5
# Two plans whose predicted peaks are this close may come out the other way round in the audit.
CLOSE = 0.05


class Strategy(Comparison):
    """The search for a way to run one graph within its budget."""

    def __init__(self, traced: Traced) -> None:
        super().__init__(traced)
        self.planned: Compilation | None = None
        # Ways that were rejected, with the corrections that they were planned with.
        self.rejected: dict[Route, dict[str, int]] = {}
        self.tried = 0
        self.foreseen: float | None = None

    def compile(self) -> Callable[..., Any]:
        """The compiled step. Raises `BudgetInfeasibleError` when no way fits the budget."""
        options = self.traced.options
        if options.codecs.preset:
            return self._preset()
        if options.mem_budget is None:
            return self._without_budget()
        plain: Compilation | None = None
        if options.mem_budget.bytes is None or not (known := self._beyond_doubt(options.mem_budget.bytes)):
            plain = self._plain()
            budget = self._budget(options.mem_budget, plain.peak)
            known = {"baseline_peak": plain.peak, "budget": budget}
            if plain.peak <= options.usable(budget) and self._plain_will_do:
                return _finished(plain, **known)
            self.traced = self.traced.within(budget)
        found = self._search()
        if found is None:
            return self._least(plain, **known)
        way, compilation = found
        return _finished(compilation, attempts=self.tried, foreseen=self.foreseen, **known, **self._time(way))

    def _without_budget(self) -> Callable[..., Any]:
        """The step as it is, or in as many slices as the user wants, all of them held."""
        route = self._wanted_route()
        compilation = Compilation(self.traced, route)
        compilation.generate()
        self._check_limits(compilation.job)
        return _finished(compilation)

    def _wanted_route(self) -> Route:
        """The route of a step without a budget. Raises `OptionError` where the batch cannot be sliced as wanted."""
        if self.traced.options.slices in (None, 1):
            return AT_ONCE
        whole = self.whole = self.pose(AT_ONCE)
        if whole is None or self.unsliceable(whole):
            return AT_ONCE
        ((slicing, _),) = filter(None, self.slices(whole))
        return Route(replace(slicing, held=slicing.count))

    def _plain(self) -> Compilation:
        """The code that Inductor generates by itself, without kernels."""
        inductor = Compilation(self.traced.plain(), enforced=False)
        inductor.generate()
        return inductor

    @property
    def _plain_will_do(self) -> bool:
        """Whether the plain step is what the options ask for, if it fits."""
        options = self.traced.options
        return options.probes == Probes() and options.slices in (None, 1)

    def _search(self) -> tuple[Way, Compilation] | None:
        """The best way whose generated code fits, by predictions that are corrected by every audit."""
        while self.tried < ATTEMPTS:
            way = next((way for way in self.ways() if not self._repeats(way)), None)
            if way is None:
                return None
            corrections = self.corrections.setdefault(compared_route(way.route), {})
            self.rejected[way.route] = dict(corrections)
            bounds = Bounds(self.allowed(way.route))
            compilation = Compilation(self.traced, way.route, corrections, bounds=bounds)
            self.tried += 1
            compiled = compilation.attempt(1)
            self.foreseen = self.foreseen or compilation.foreseen
            if compiled is not None:
                return self._exact_instead(way, compilation) or (way, compilation)
        return None

    def _repeats(self, way: Way) -> bool:
        """Whether the way was rejected, and nothing is known since that would change its plan."""
        return self.rejected.get(way.route) == self.corrections.get(compared_route(way.route), {})

    def _exact_instead(self, noisy: Way, generated: Compilation) -> tuple[Way, Compilation] | None:
        """The plain step, or the exact way of least peak, where that is better than a noisy one and its code fits.

        Predictions err, and corrections as well: what other plans were found to be short of may be less for these. So
        they are generated, unless they are predicted to exceed the budget by far more than the noisy one's audit was
        off.
        """
        options = self.traced.options
        if noisy.noise == 0 or options.codecs.exact or options.probes != Probes():
            return None
        assert options.mem_budget is not None
        usable = options.usable(options.mem_budget.resolve(0))
        doubtful = usable * (1 + CLOSE) + _overestimated(generated)
        if self._plain_will_do and self._plain_predicted <= doubtful:
            plain = self._plain()
            if plain.peak <= usable:
                return Way(AT_ONCE, 0.0, 0.0), plain
        exact = replace(options, max_noise=0.0)
        found = self.lowest(exact, self.corrections)
        if found is None or found.predicted > doubtful:
            return None
        corrections = self.corrections.get(compared_route(found.route), {})
        compilation = self._generated(found, exact, dict(corrections))
        way = self._way_of(compilation)
        better = way.cost(options.prefer) < noisy.cost(options.prefer)
        return (way, compilation) if better and compilation.peak <= usable else None

    def _generated(self, found: Lowest, options: Options, corrections: dict[str, int]) -> Compilation:
        """The code of a plan of least peak, whatever its peak turns out to be."""
        needed = options.needed(found.predicted)
        traced = replace(self.traced, options=replace(options, mem_budget=Budget(bytes=needed)))
        bounds = Bounds(self.allowed(found.route), found.found.choice)
        compilation = Compilation(traced, found.route, corrections, enforced=False, bounds=bounds)
        self.tried += 1
        compilation.generate()
        return compilation

    def _budget(self, wanted: Budget, plain: int) -> int:
        """The budget in bytes, of a step that takes `plain` without xconv."""
        return self.traced.session.resolve(wanted, plain, self.traced.graph)

    def _preset(self) -> Callable[..., Any]:
        """The step with everything held as a published system holds it, if that fits the budget."""
        options, known = self.traced.options, {}
        if options.mem_budget is not None:
            plain = 0
            if options.mem_budget.bytes is None:
                plain = self._plain().peak
                known["baseline_peak"] = plain
            known["budget"] = self._budget(options.mem_budget, plain)
        compilation = Compilation(self.traced, enforced=False)
        compilation.generate()
        if compilation.job is not None:
            self._check_preset(compilation.job, compilation.peak, known.get("budget"))
        return _finished(compilation, **known)

    def _check_preset(self, job: Job, reached: int, budget: int | None) -> None:
        """Raise unless the plan of a preset, whose peak is `reached`, is within the budget and the limits."""
        options, plan = self.traced.options, job.plan
        assert plan is not None and job.posed is not None
        if budget is not None and reached > options.usable(budget):
            largest = [(c.layer or c.residual, c.bytes_after) for c in plan.choices]
            largest.append(("parameters, buffers and inputs", plan.fixed_bytes))
            note = f"codecs={options.codecs.preset!r} fixes how everything is held; 'all' lets it be planned"
            raise BudgetInfeasibleError(budget, options.needed(reached), largest, (*self.traced.notes, note))
        self._check_limits(job)

    def _check_limits(self, job: Job | None) -> None:
        """Raise `OptionError` where a plan that the options name breaks a limit of theirs."""
        if job is None or job.plan is None or job.posed is None:
            return
        layer = max((noise for _, noise in job.plan.layers), default=0.0)
        slower = slowdown(
            job.posed, self.whole.posed if self.whole and self.whole.posed else job.posed, job.slicing, job.plan.time
        )
        select([Way(AT_ONCE, job.plan.noise, slower, layer)], self.traced.options)

    def _beyond_doubt(self, budget: int) -> dict[str, int]:
        """What is known of the plain step without its code, when it is predicted to exceed the budget by far.

        Empty when the prediction leaves a doubt.
        """
        self.whole = self.pose(AT_ONCE)
        if self.whole is None or self.whole.posed is None:
            return {}
        predicted = self.whole.posed.baseline_peak()
        if budget * (1 + DOUBT) < predicted <= budget * FAR:
            predicted = self._plain_predicted
        return {"baseline_peak": predicted, "budget": budget} if predicted > budget * (1 + DOUBT) else {}

    @functools.cached_property
    def _plain_predicted(self) -> int:
        """The predicted peak of the graph as Inductor compiles it, without what passes do to it under a budget."""
        job = Compilation(self.traced.plain()).pose()
        assert job is not None and job.posed is not None
        return job.posed.baseline_peak()

    def plan(self) -> Plan | None:
        """The plan to start from, on predictions alone; None for a graph without a backward.

        A budget in percent is one of the predicted peak. Raises `BudgetInfeasibleError`.
        """
        options = self.traced.options
        if options.codecs.preset:
            return self._plan_preset()
        if options.mem_budget is None:
            self.planned = Compilation(self.traced, self._wanted_route())
            self.planned.plan()
            return self.planned.report()
        self.whole = job = self.pose(AT_ONCE)
        if job is None or job.posed is None:
            return None
        baseline = job.posed.baseline_peak()
        self.traced = self.traced.within(self._budget(options.mem_budget, baseline))
        self.planned = self._first_planned() or self._lowest_planned()
        return self.planned.report(baseline_peak=baseline, **self._time(self._way_of(self.planned)))

    def _first_planned(self) -> Compilation | None:
        """The plan of the best way; None where the solver, stopped by its clock, found none."""
        for way in self.ways()[:1]:
            planned = Compilation(self.traced, way.route, bounds=Bounds(self.allowed(way.route)))
            with contextlib.suppress(BudgetInfeasibleError):
                planned.plan(self.jobs.get(compared_route(way.route)))
                return planned
        return None

    def _lowest_planned(self) -> Compilation:
        """The plan that starts from the one of least peak. Raises why there is none."""
        options = self.traced.options
        assert options.mem_budget is not None
        found = self.lowest(options)
        if found is None or found.predicted > options.usable(options.mem_budget.resolve(0)):
            raise self._refusal(found)
        bounds = Bounds(self.allowed(found.route), found.found.choice)
        planned = Compilation(self.traced, found.route, bounds=bounds)
        planned.plan(self.jobs.get(found.route))
        return planned

    def _plan_preset(self) -> Plan | None:
        """The predicted plan of a published system. Raises `BudgetInfeasibleError` where that exceeds the budget."""
        self.planned = Compilation(self.traced)
        job = self.planned.plan()
        if job is None or job.plan is None:
            return None
        budget = self.traced.options.mem_budget
        known = {} if budget is None else {"budget": self._budget(budget, job.plan.baseline_peak)}
        self._check_preset(job, job.plan.predicted_peak, known.get("budget"))
        return self.planned.report(**known)

    def _time(self, way: Way) -> dict[str, float]:
        """The predicted extra seconds of a way that is more than codecs, which is all that a plan knows of."""
        return {"time": way.slowdown * self.seconds} if way.route != AT_ONCE else {}

    def _least(self, plain: Compilation | None, **known: Any) -> Callable[..., Any]:
        """The step of least peak: of the plans of least predicted peak, one of them exact, and of the plain step.

        Nothing here depends on the budget, nor on what audits found under it. Raises `BudgetInfeasibleError` with the
        audited peak as the smallest budget when that is over the budget, or `OptionError` for a limit that is.
        """
        options = self.traced.options
        assert options.mem_budget is not None
        usable = options.usable(options.mem_budget.resolve(0))
        found = self.lowest(options)
        steps = [] if found is None else [self._generated(found, options, {})]
        if steps and options.probes == Probes():
            quiet = replace(options, max_noise=0.0)
            exact = self.lowest(quiet)
            if exact is not None and self._might_be_lower(exact, found, steps[0]):
                steps.append(self._generated(exact, quiet, {}))
        best = min(steps, key=lambda step: step.peak, default=None)
        if best is not None and best.peak <= usable:
            foreseen = self.foreseen or best.foreseen
            return _finished(best, attempts=self.tried, foreseen=foreseen, **known, **self._time(self._way_of(best)))
        if self._plain_will_do:
            plain = plain or self._plain()
            if plain.peak <= usable:
                return _finished(plain, **{**known, "baseline_peak": plain.peak})
            steps.append(plain)
        smallest = options.needed(min((step.peak for step in steps), default=0))
        raise self._refusal(found, smallest)

    def _might_be_lower(self, exact: Lowest, found: Lowest | None, generated: Compilation) -> bool:
        """Whether the exact plan of least predicted peak is another one than the plan found, and may have a lower peak
        than that was audited to have."""
        another = found is None or (exact.route, exact.found.choice) != (found.route, found.found.choice)
        return another and exact.predicted <= generated.peak * (1 + CLOSE) + _overestimated(generated)

    def _refusal(self, found: Lowest | None, smallest: int | None = None) -> XConvError:
        """Why there is no plan; by predictions the smallest budget is that of the plan `found`."""
        options = self.traced.options
        if smallest is None:
            smallest = 0 if found is None else options.needed(found.predicted)

        def ways(lax: Options) -> list[Way]:
            return [way for route in self.posed for way in self.ways_of(route, lax)]

        return refusal(options, smallest, found, ways, self.lowest, self.traced.notes)

    def _way_of(self, compilation: Compilation) -> Way:
        """The way that was generated."""
        job, whole = compilation.job, self.whole
        assert job is not None and job.posed is not None and job.plan is not None
        assert whole is not None and whole.posed is not None
        slower = slowdown(job.posed, whole.posed, compilation.route.slicing, job.plan.time)
        return Way(compilation.route, job.plan.noise, slower)


def _overestimated(compilation: Compilation) -> int:
    """By how much a plan's predicted peak is above its audited one, in bytes."""
    assert compilation.job is not None and compilation.job.plan is not None
    return max(0, compilation.job.plan.predicted_peak - compilation.peak)


def _finished(compilation: Compilation, **known: Any) -> Callable[..., Any]:
    """The step of code that is run whatever its peak."""
    compilation.enforced = False
    compiled = compilation.compiled or compilation.generate()
    assert compiled is not None
    compilation.load()
    compilation.report(**known)
    return compiled
