"""Search for how a graph is run within its budget: all of the batch at once, or in how many slices, how many held.

Every candidate has a plan of its own: how much noise its codecs add, and how much longer the step takes (codecs,
forwards that are run again, smaller kernels). `prefer` says how the two are weighed. Candidates are compared on
predicted plans, from a trace alone (`comparison.py`), and code is generated for the best one. When the audit rules that
out, all are compared again with what it found (`feedback.py`), so that none is taken that is worse than another one
that fits.

When none is left, the plan of least predicted peak decides, which does not depend on the budget: its audited peak, or
that of the plain step, is the smallest budget that an error names, and any budget from there on ends at that plan at
the latest.

Known gap: a plan of least peak is the same in every run as long as the solver is not stopped by its clock, which takes
problems of thousands of residuals.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from xconv_fx.errors import BudgetInfeasibleError
from xconv_fx.options import Options, Probes
from xconv_fx.options.budget import Budget
from xconv_fx.planner.solve import Bounds

from .candidates import FULL_BATCH, Candidate, Variant
from .capture import CaptureRequest
from .comparison import Comparison
from .feedback import NOTHING_FOUND, Feedback
from .generate import Generated, generate, plan
from .outcome import Outcome, PlanFacts
from .plain_step import PlainStep
from .refusals import Lowest

# Plans that are generated before the one of least peak is.
ATTEMPTS = 8
# Two plans whose predicted peaks are this close may come out the other way round in the audit.
CLOSE = 0.05


def search(request: CaptureRequest) -> Outcome:
    """Code within the budget of the request's options, and what is known of its plan.

    Raises `BudgetInfeasibleError` when nothing fits, `OptionError` for a limit that nothing within the budget keeps.
    """
    options, plain = request.options, PlainStep(request)
    assert options.mem_budget is not None, "without a budget there is nothing to search for"
    budget = options.mem_budget.bytes
    baseline = None if budget is None else plain.beyond(budget)
    if baseline is None:
        baseline = plain.generated.peak
        budget = request.session.resolve(options.mem_budget, baseline, request.graph)
        if options.limit(budget).allows(baseline) and plain.will_do:
            return Outcome(plain.generated, PlanFacts(baseline, budget))
        request = request.within(budget)
    return Search(Comparison(request), plain, PlanFacts(baseline, budget)).outcome()


@dataclass(frozen=True)
class _Attempt:
    """A candidate, its code, how many plans were generated up to it, and what audits had found before.

    `generated` is None where the planner saw no plan of the candidate any more.
    """

    candidate: Candidate
    generated: Generated | None
    tried: int
    feedback: Feedback


@dataclass(frozen=True)
class Search:
    """The search for one graph. `facts` are those of its plain step, and the budget."""

    comparison: Comparison
    plain: PlainStep
    facts: PlanFacts

    @property
    def request(self) -> CaptureRequest:
        """What is compiled, under a budget in bytes."""
        return self.comparison.request

    @property
    def usable(self) -> int:
        """Bytes that a peak may have."""
        return self.request.options.limit().usable

    def outcome(self) -> Outcome:
        """The best candidate whose generated code fits, else the step of least peak if that does."""
        foreseen, tried = None, 0
        for attempt in self.attempts():
            generated, tried = attempt.generated, attempt.tried
            if generated is None:
                continue
            foreseen = foreseen or generated.foreseen
            if generated.step is not None:
                candidate, generated, tried = self._exact_instead(attempt) or (attempt.candidate, generated, tried)
                return self._outcome(candidate, generated, tried, foreseen)
        return self._least(tried, foreseen)

    def attempts(self) -> Iterator[_Attempt]:
        """Candidates and their code, best first by predictions that the audit of every one before corrects."""
        feedback = NOTHING_FOUND
        for tried in range(1, ATTEMPTS + 1):
            candidates = (one for one in self.comparison.candidates(feedback) if not feedback.repeats(one.variant))
            candidate = next(candidates, None)
            if candidate is None:
                return
            generated = self.attempt(candidate.variant, feedback)
            yield _Attempt(candidate, generated, tried, feedback)
            feedback = feedback.without(candidate.variant) if generated is None else feedback.after(generated)

    def attempt(self, variant: Variant, feedback: Feedback) -> Generated | None:
        """Code for a candidate; None where the planner sees no plan of it any more, by what audits found."""
        try:
            planned = plan(
                self.request, variant, feedback.corrections(variant), Bounds(self.comparison.allowed(variant))
            )
        except BudgetInfeasibleError:
            return None
        return generate(self.request, variant, planned)

    def _outcome(self, candidate: Candidate, generated: Generated, tried: int, foreseen: float | None) -> Outcome:
        seconds = self.comparison.extra_seconds(candidate)
        facts = replace(self.facts, attempts=tried, foreseen=foreseen, time=seconds)
        return Outcome(generated, facts, self.comparison.notes)

    def _exact_instead(self, noisy: _Attempt) -> tuple[Candidate, Generated, int] | None:
        """The plain step, or the exact candidate of least peak, where that is better than a noisy one and fits.

        What is exact and predicted to fit was compared already. But predictions err, and corrections as well: what
        other plans were found to be short of may be less for these. So one that is predicted to exceed the budget is
        generated, unless that is by far more than the noisy one's audit was off.
        """
        options = self.request.options
        if noisy.candidate.noise == 0 or options.codecs.exact or options.probes != Probes():
            return None
        assert noisy.generated is not None
        doubtful = self.usable * (1 + CLOSE) + _overestimated(noisy.generated)
        if self.plain.will_do and self.plain.predicted <= doubtful and self.plain.generated.peak <= self.usable:
            return Candidate(FULL_BATCH, 0.0, 0.0), self.plain.generated, noisy.tried
        exact = replace(options, max_noise=0.0)
        found = self.comparison.lowest(exact, noisy.feedback)
        if found is None or not self.usable < found.predicted <= doubtful:
            return None
        generated = self._generated(found, exact, noisy.feedback)
        candidate = self.comparison.candidate_of(found.variant, generated.planned)
        better = candidate.cost(options.prefer) < noisy.candidate.cost(options.prefer)
        return (candidate, generated, noisy.tried + 1) if better and generated.peak <= self.usable else None

    def _generated(self, found: Lowest, options: Options, feedback: Feedback = NOTHING_FOUND) -> Generated:
        """The code of a plan of least peak, whatever its peak turns out to be."""
        needed = options.smallest_for(found.predicted)
        request = replace(self.request, options=replace(options, mem_budget=Budget(bytes=needed)))
        bounds = Bounds(self.comparison.allowed(found.variant), found.found.choice)
        planned = plan(request, found.variant, feedback.corrections(found.variant), bounds)
        return generate(request, found.variant, planned, enforced=False)

    def _least(self, tried: int, foreseen: float | None) -> Outcome:
        """The step of least peak: of the plans of least predicted peak, one of them exact, and of the plain step.

        Nothing here depends on the budget, nor on what audits found under it. Raises `BudgetInfeasibleError` with the
        audited peak as the smallest budget when that is over the budget, or `OptionError` for a limit that is.
        """
        options = self.request.options
        found = self.comparison.lowest(options)
        steps = self._lowest_steps(found)
        best = min(steps, key=lambda step: step.peak, default=None)
        if best is not None and best.peak <= self.usable:
            candidate = self.comparison.candidate_of(best.variant, best.planned)
            return self._outcome(candidate, best, tried + len(steps), foreseen or best.foreseen)
        if self.plain.will_do:
            plain = self.plain.generated
            if plain.peak <= self.usable:
                return Outcome(plain, replace(self.facts, baseline_peak=plain.peak), self.comparison.notes)
            steps = [*steps, plain]
        raise self.comparison.refusal(found, options.smallest_for(min((step.peak for step in steps), default=0)))

    def _lowest_steps(self, found: Lowest | None) -> list[Generated]:
        """The code of the plan of least predicted peak, and of the exact one where its peak may be lower still."""
        options = self.request.options
        if found is None:
            return []
        steps = [self._generated(found, options)]
        if options.probes == Probes():
            quiet = replace(options, max_noise=0.0)
            exact = self.comparison.lowest(quiet)
            if exact is not None and _might_be_lower(exact, found, steps[0]):
                steps.append(self._generated(exact, quiet))
        return steps


def _might_be_lower(exact: Lowest, found: Lowest, generated: Generated) -> bool:
    """Whether the exact plan of least predicted peak is another one than the plan found, and may have a lower peak than
    that was audited to have."""
    another = (exact.variant, exact.found.choice) != (found.variant, found.found.choice)
    return another and exact.predicted <= generated.peak * (1 + CLOSE) + _overestimated(generated)


def _overestimated(generated: Generated) -> int:
    """By how much a plan's predicted peak is above its audited one, in bytes."""
    assert generated.planned is not None
    return max(0, generated.planned.plan.predicted_peak - generated.peak)
