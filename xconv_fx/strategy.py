"""Choose how a graph is run under its budget: the whole batch at once, or in how many slices, of which how many held.

Every way has a plan of its own: how much noise its codecs add, and how much longer the step takes (codecs, forwards
that are run again, smaller kernels). `prefer` says how the two are weighed. Ways are compared on predicted plans, from
a trace alone; code is generated for the best one, and for the next only when the audit rules that one out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .compilation import ATTEMPTS, Compilation, Traced
from .errors import BudgetInfeasibleError, OptionError, XConvError
from .log import log
from .options import Probes
from .passes.pipeline import Job
from .passes.planning import plan
from .passes.problem import Posed
from .passes.volumes import volume_convolutions
from .plan import Plan
from .sizes import Budget
from .slices import Batch, Slicing
from .ways import AT_ONCE, NEGLIGIBLE, Route, Way, best_ways, select, slowdown

# Attempts at the second-best and the third-best way.
FEW = 1
# Shares of the residuals' bytes that torch's partitioner is asked to save, besides all.
SAVED = (0.5, 0.25)
# Nodes of the largest joint graph of which torch's partitioner is asked for smaller cuts.
LARGEST_CUT = 2000
# A plain step predicted to exceed its budget by more than this share is not generated to make sure.
DOUBT = 0.1


class Strategy:
    """The search for a way to run one graph within its budget."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self.jobs: dict[Route, Job] = {}
        self.seconds = 0.0
        self.whole: Job | None = None
        self.planned: Compilation | None = None

    @property
    def posed(self) -> dict[Route, Posed]:
        """The planning problems that were compared, by their routes."""
        return {route: job.posed for route, job in self.jobs.items() if job.posed is not None}

    def pose(self, route: Route) -> Job | None:
        """The job of a route up to its planning problem; None for a graph without a backward."""
        return Compilation(self.traced, route).pose()

    def compile(self) -> Callable[..., Any]:
        """The compiled step. Raises `BudgetInfeasibleError` when no way fits the budget."""
        options = self.traced.options
        if options.codecs.preset:
            return self._preset()
        if options.mem_budget is None:
            return _finished(Compilation(self.traced))
        plain: int | None = None
        if options.mem_budget.bytes is None or not (known := self._beyond_doubt(options.mem_budget.bytes)):
            inductor = Compilation(self.traced.plain())
            inductor.generate()
            plain = inductor.peak
            budget = self._budget(options.mem_budget, plain)
            known = {"baseline_peak": plain, "budget": budget}
            if plain <= options.usable(budget) and options.probes == inductor.traced.options.probes:
                return _finished(inductor, **known)
            self.traced = self.traced.within(budget)
        ways = self.ways()
        tried = 0
        for way, attempts in zip(ways, (ATTEMPTS, FEW, FEW), strict=False):
            compilation = Compilation(self.traced, way.route)
            compiled = compilation.attempt(attempts)
            tried += compilation.attempts
            if compiled is not None:
                compilation.report(attempts=tried, **known, **self._time(way))
                return compiled
        return self._least(plain, tried, **known)

    def _budget(self, wanted: Budget, plain: int) -> int:
        """The budget in bytes, of a step that takes `plain` without xconv."""
        return self.traced.session.resolve(wanted, plain, self.traced.graph)

    def _preset(self) -> Callable[..., Any]:
        """The step with everything held as a published system holds it, if that fits the budget."""
        options, known = self.traced.options, {}
        if options.mem_budget is not None:
            plain = 0
            if options.mem_budget.bytes is None:
                inductor = Compilation(self.traced.plain())
                inductor.generate()
                plain = inductor.peak
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
        select([Way(AT_ONCE, plan.noise, slowdown(job.posed, job.posed, None, plan.time))], options)

    def _beyond_doubt(self, budget: int) -> dict[str, int]:
        """What is known of the plain step without its code, when it is predicted to exceed the budget by far.

        Empty when the prediction leaves a doubt.
        """
        self.whole = self.pose(AT_ONCE)
        if self.whole is None or self.whole.posed is None:
            return {}
        predicted = self.whole.posed.baseline_peak()
        return {"baseline_peak": predicted, "budget": budget} if predicted > budget * (1 + DOUBT) else {}

    def plan(self) -> Plan | None:
        """The plan to start from, on predictions alone; None for a graph without a backward.

        A budget in percent is one of the predicted peak. Raises `BudgetInfeasibleError`.
        """
        route, known = AT_ONCE, {}
        if self.traced.options.codecs.preset:
            return self._plan_preset()
        if self.traced.options.mem_budget is not None:
            self.whole = job = self.pose(AT_ONCE)
            if job is None or job.posed is None:
                return None
            baseline = job.posed.baseline_peak()
            budget = self._budget(self.traced.options.mem_budget, baseline)
            self.traced = self.traced.within(budget)
            ways = self.ways()
            if not ways:
                error, _ = self._lowest()
                raise BudgetInfeasibleError(budget, error.smallest, error.consumers, self.traced.notes)
            route = ways[0].route
            known = {"baseline_peak": baseline, **self._time(ways[0])}
        self.planned = Compilation(self.traced, route)
        self.planned.plan(self.jobs.get(_compared(route)))
        return self.planned.report(**known)

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

    def ways(self) -> list[Way]:
        """The ways whose predicted plans fit the budget, best first.

        Keeps the problems that it poses on the way (`posed`, of one slice with none held), and notes why there are no
        slices.
        """
        options = self.traced.options
        whole = self.whole = self.whole or self.pose(AT_ONCE)
        if whole is None or whole.posed is None:
            return [Way(AT_ONCE, 0.0, 0.0)]
        found = []
        self.seconds = sum(whole.posed.seconds.values())
        at_once = options.slices in (None, 1)
        if at_once:
            self.jobs[AT_ONCE] = whole
            found = best_ways(whole.posed, options, whole.posed, AT_ONCE)
        if not _settled(found):
            found = self._in_slices(whole, found)
        if at_once and not _settled(found):
            found = found + self._at_once(whole)
        return select(found, options)

    def _in_slices(self, whole: Job, found: list[Way]) -> list[Way]:
        """What was found, and ways to run the batch in more and more slices, until they get no better."""
        options, batch = self.traced.options, self.traced.batch
        if options.slices == 1:
            return found
        graphs = "a replayed CUDA graph overwrites what the slice before it holds"
        mixing = graphs if options.inductor_config().get("triton.cudagraphs") else whole.mixing
        if batch is None or mixing:
            self._cannot_slice(mixing)
            return found
        assert whole.posed is not None
        for wanted in self._slicings(batch, whole):
            sliced = self._sliced(wanted)
            if sliced is None:
                break
            slicing, job = sliced
            assert job.posed is not None
            route = Route(slicing)
            self.jobs[route] = job
            best = min((way.cost(options.prefer) for way in found), default=None)
            found = found + best_ways(job.posed, options, whole.posed, route)
            log.debug("ways up to %d slices: %s", slicing.count, found)
            if best is not None and best <= min(way.cost(options.prefer) for way in found):
                break
        return found

    def _time(self, way: Way) -> dict[str, float]:
        """The predicted extra seconds of a way that is more than codecs, which is all that a plan knows of."""
        return {"time": way.slowdown * self.seconds} if way.route != AT_ONCE else {}

    def _at_once(self, whole: Job) -> list[Way]:
        """Other ways to run all of the batch: contiguous volumes, and recomputed convolutions from a smaller cut.

        The cut takes torch longer than all else in a large graph.
        """
        options = self.traced.options
        assert whole.posed is not None
        routes = [Route(relayout=False)] if volume_convolutions(self.traced.gm) else []
        small = len(whole.joint.graph.nodes) <= LARGEST_CUT
        if small and "recompute" in options.codecs and options.probes == Probes():
            routes += [Route(saved=saved) for saved in SAVED]
        found: list[Way] = []
        for route in routes:
            job = self.pose(route)
            if job is not None and job.posed is not None:
                self.jobs[route] = job
                found += best_ways(job.posed, options, whole.posed, route)
        log.debug("other ways at once: %s", found)
        return found

    def _slicings(self, batch: Batch, whole: Job) -> list[Slicing]:
        """What to compare: numbers of slices that cut the batch into equal parts, each about twice the one before."""
        counts, fixed = batch.counts(), self.traced.options.slices
        if fixed is not None and fixed not in counts:
            some = f"write one of {', '.join(map(str, counts))}, which divide a batch of {batch.size}, 1, or None"
            raise OptionError("slices", fixed, some)
        chosen: list[int] = []
        for count in counts:
            if count == counts[-1] or not chosen or count >= 2 * chosen[-1]:
                chosen.append(count)
        return [Slicing(batch, n, 0, whole.random, *whole.relaid) for n in (chosen if fixed is None else [fixed])]

    def _sliced(self, slicing: Slicing) -> tuple[Slicing, Job] | None:
        """The job of a slice; None, with a note, when the graph is not the same for a slice.

        Weights laid out channels-last make channels-last activations, of which a model's `view` may not be possible:
        then every slice lays them out for itself.
        """
        for way in dict.fromkeys((slicing, replace(slicing, relaid=(), copies=0))):
            try:
                job = self.pose(Route(way))
            except XConvError:
                raise
            except Exception as error:  # The model wrote the batch's size into its graph: whatever it then fails at.
                reason = str(error).partition("\n")[0]
                continue
            if job is not None and not job.mixing:
                return way, job
            reason = "" if job is None else job.mixing
            break
        self._cannot_slice(f"it cannot be traced for {slicing.samples} samples: {reason}")
        return None

    def _cannot_slice(self, reason: str) -> None:
        if self.traced.options.slices is not None:
            raise OptionError("slices", self.traced.options.slices, f"the batch cannot be sliced: {reason}")
        note = f"the batch is not run in slices: {reason}"
        self.traced = replace(self.traced, notes=(*self.traced.notes, note))

    def _least(self, plain: int | None, tried: int, **known: Any) -> Callable[..., Any]:
        """The step of the plan of least predicted peak, which what the audit found of other plans does not rule out.

        Raises `BudgetInfeasibleError` when its code is over the budget as well, with its audited peak as the smallest
        budget: one that is known to work.
        """
        options = self.traced.options
        assert options.mem_budget is not None
        budget = options.mem_budget.resolve(0)
        error, route = self._lowest()
        lowest = Compilation(self.traced.within(error.smallest), route, enforced=False)
        lowest.generate()
        smallest = options.needed(lowest.peak if plain is None else min(lowest.peak, plain))
        if smallest > budget:
            raise BudgetInfeasibleError(budget, smallest, error.consumers, self.traced.notes)
        return _finished(lowest, attempts=tried + 1, **known, **self._time_of(lowest))

    def _time_of(self, compilation: Compilation) -> dict[str, float]:
        """The predicted extra seconds of what was generated."""
        job, whole = compilation.job, self.whole
        assert job is not None and job.posed is not None and job.plan is not None
        assert whole is not None and whole.posed is not None
        slower = slowdown(job.posed, whole.posed, compilation.route.slicing, job.plan.time)
        return self._time(Way(compilation.route, job.plan.noise, slower))

    def _lowest(self) -> tuple[BudgetInfeasibleError, Route]:
        """Among the routes that were compared the one of least predicted peak, and what the planner says of it."""
        errors: dict[Route, BudgetInfeasibleError] = {}
        for route, posed in self.posed.items():
            try:
                plan(posed, self.traced.within(1).options, route.slicing)
            except BudgetInfeasibleError as error:
                errors[route] = error
        lowest = min(errors, key=lambda route: errors[route].smallest)
        return errors[lowest], lowest


def _compared(route: Route) -> Route:
    """The route whose problem was posed for `route`: the same whatever number of slices is held."""
    return route if route.slicing is None else replace(route, slicing=replace(route.slicing, held=0))


def _settled(ways: list[Way]) -> bool:
    """Whether there is an exact way that is so fast that no other is looked for."""
    return any(way.noise == 0 and way.slowdown <= NEGLIGIBLE for way in ways)


def _finished(compilation: Compilation, **known: Any) -> Callable[..., Any]:
    """The step of code that is run whatever its peak."""
    compilation.enforced = False
    compiled = compilation.compiled or compilation.generate()
    assert compiled is not None
    compilation.load()
    compilation.report(**known)
    return compiled
