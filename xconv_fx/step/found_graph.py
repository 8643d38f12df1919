"""A graph that was seen ahead of time, and the planning problems of its variants."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from xconv_fx import hooks
from xconv_fx.compiler.candidates import FULL_BATCH, Variant
from xconv_fx.compiler.capture import CaptureRequest
from xconv_fx.compiler.comparison import Comparison
from xconv_fx.compiler.generate import Generated, generate, plan
from xconv_fx.errors import BudgetInfeasibleError, XConvError
from xconv_fx.options import Options
from xconv_fx.planner.problem import PlanningProblem
from xconv_fx.planner.surroundings import Surroundings
from xconv_fx.runtime.session import Graph


class FoundGraph:
    """A graph of a step that is planned as a whole, within whose compilation this is made.

    It is planned beside nothing, and as if its results went on into further graphs: what is around it is counted where
    all graphs are put together. `alone` is what is known of it where it is not planned together with others.
    """

    def __init__(self, request: CaptureRequest, alone: Graph | None = None) -> None:
        self.request, self.comparison, self.alone = request, Comparison(request), alone
        self.compiling = hooks.TracedWithin()

    def problem(self, variant: Variant) -> PlanningProblem | None:
        """The planning problem of a variant, of one slice where it has slices; None for a graph without a backward."""
        with self.compiling.again():
            return self.request.problem(variant)

    def slicings(self) -> Iterator[Variant]:
        """The variants in slices, of which none is held, that the graph can take: fewer slices first."""
        if self.problem(FULL_BATCH) is None or self.request.options.slices == 1:
            return
        with self.compiling.again():
            if not self.comparison.unsliceable():
                for microbatches in self.comparison.slices():
                    if microbatches is not None:
                        yield Variant(microbatches)

    def short_of(
        self, variant: Variant, around: Surroundings, options: Options, corrections: Mapping[str, int]
    ) -> dict[str, int]:
        """What the prediction of each phase is short of, in bytes, by an audit of the code that is generated.

        `corrections` are known already. The graph by itself may need more than the budget, where its surroundings are
        not alike in all of its runs; its backward is short of that as well. Empty when there is no plan of the graph by
        itself.
        """
        beside = replace(self.request, options=options, surroundings=around)
        beyond = 0
        with self.compiling.again():
            try:
                generated = _generated(beside, variant, corrections)
            except BudgetInfeasibleError as error:
                beyond = error.smallest - error.budget
                generated = _generated(beside.within(error.smallest), variant, corrections)
            except XConvError:
                return {}
        assert generated.planned is not None, "graphs without a backward are not among those of a step"
        predicted = generated.planned.phase_peaks
        found = {
            phase: audited - predicted[phase] + corrections.get(phase, 0)
            for phase, audited in generated.audited.peaks.items()
        }
        return {**found, "backward": found["backward"] + beyond}


def _generated(request: CaptureRequest, variant: Variant, corrections: Mapping[str, int]) -> Generated:
    return generate(request, variant, plan(request, variant, corrections), enforced=False)
