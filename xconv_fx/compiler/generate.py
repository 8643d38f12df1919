"""Generate code for a plan, and audit it: the one place where a plan becomes a step.

Kernels are compiled only of code that is taken (`Generated.load`), and nothing runs before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from xconv_fx import hooks
from xconv_fx.errors import find_ours
from xconv_fx.passes.batch_separability import NOTHING
from xconv_fx.passes.graph import is_primal, is_tangent, nbytes, output_node
from xconv_fx.plan.log import log
from xconv_fx.planner.peak_scenarios import scenarios
from xconv_fx.planner.solve import ANY, Bounds
from xconv_fx.runtime.microbatch_step import MicrobatchedStep, Result

from . import pipeline
from .audit import Audit, Peak
from .candidates import Variant
from .capture import CaptureRequest, Compiling, Prepared
from .pipeline import Planned


@dataclass(frozen=True)
class Audited:
    """What an audit found of generated code, in bytes.

    `peaks` of the phases, of all slices and calls; `held` by one call from its forward to its backward, results
    included, `saved` of that without the results. `uncounted` are operators that may allocate what nobody knows.
    """

    peaks: Mapping[str, int] = field(default_factory=dict)
    saved: int = 0
    held: int = 0
    uncounted: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """Of the whole step; 0 for a graph without a backward."""
        return max(self.peaks.values(), default=0)


@dataclass(frozen=True)
class Generated:
    """A variant's step, as planned and generated; `planned` is None for a graph without a backward.

    `step` runs it, once its kernels are compiled (`load`); None when the audit ruled it out.
    """

    request: CaptureRequest
    variant: Variant
    planned: Planned | None
    audited: Audited
    step: Callable[..., Any] | None
    kernels: hooks.Deferred | None = None

    @property
    def peak(self) -> int:
        """The audited peak in bytes; 0 for a graph without a backward."""
        return self.audited.peak

    @property
    def foreseen(self) -> float | None:
        """The predicted peak of the phases that were audited, over the audited one; None where none was."""
        if self.planned is None or not self.audited.peaks:
            return None
        return max(self.planned.phase_peaks[phase] for phase in self.audited.peaks) / self.peak

    def load(self) -> None:
        """Compile the kernels."""
        if self.kernels is not None:
            self.kernels.load(self.request.options.inductor_config())


def plan(
    request: CaptureRequest, variant: Variant, corrections: Mapping[str, int] | None = None, bounds: Bounds = ANY
) -> Planned | None:
    """The plan for a variant; None for a graph without a backward.

    `corrections` are what audits found the prediction of a phase to be short of, in bytes; `bounds` what is known of
    the plan beforehand. Raises `BudgetInfeasibleError`.
    """
    analysed, planning = request.analysed(variant), request.problem(variant)
    if analysed is None or planning is None:
        return None
    return pipeline.plan(analysed, planning, request.options, variant.microbatches, corrections, bounds)


def generate(request: CaptureRequest, variant: Variant, planned: Planned | None, *, enforced: bool = True) -> Generated:
    """Code for the plan of a variant (None: it has no backward). Code over the budget is abandoned while `enforced`."""
    if planned is None:
        return Generated(request, variant, None, Audited(), *request.found.forward_only())
    audit = _Auditing(request, variant, request.found.prepared(request, variant), planned, enforced)
    try:
        compiled, kernels = request.found.compile(
            request, variant, Compiling(audit.partition, audit.entering, audit.generated)
        )
    except Exception as error:
        if audit.abandoned:
            return Generated(request, variant, planned, audit.found, None)
        raise find_ours(error) or error from None
    step = compiled
    if (microbatches := variant.microbatches) is not None:
        if planned.analysed.draws == NOTHING:
            microbatches = replace(microbatches, draws=NOTHING)
        step = MicrobatchedStep(compiled, microbatches, Result.of(request.gm), audit.prepared.drawn)
    return Generated(request, variant, planned, audit.found, step, kernels)


class _Abandoned(Exception):
    """Ends the compilation of code that exceeds the budget."""


class _Auditing:
    """What happens to a plan while AOTAutograd and Inductor make code of it: they call this for each half in turn."""

    def __init__(
        self, request: CaptureRequest, variant: Variant, prepared: Prepared, planned: Planned, enforced: bool
    ) -> None:
        self.request, self.variant, self.prepared, self.planned = request, variant, prepared, planned
        self.enforced, self.abandoned = enforced, False
        self.audit = Audit()
        self.peaks: dict[str, int] = {}
        self.results = 0
        self.half: tuple[fx.GraphModule, Sequence[Any], bool] | None = None

    @property
    def found(self) -> Audited:
        return Audited(dict(self.peaks), self.audit.saved_bytes, self.audit.held_bytes, self.audit.uncounted)

    def partition(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **arguments: Any) -> Any:
        """The halves that are planned, in the place of those that torch's partitioner would make of the joint graph."""
        pair = pipeline.finish(self.planned, self.request.session.stream, self.request.options.plain)
        self.results = pair.results
        return pair.forward, pair.backward

    def entering(self, gm: fx.GraphModule, example_inputs: Sequence[Any], is_backward: bool) -> None:
        """Inductor is about to generate code for this half."""
        self.half = (gm, list(example_inputs), is_backward)

    def generated(self, code: str) -> None:
        """Audit generated code; abandon the graph when it is over the budget."""
        assert self.half is not None, "code is generated of what was entered"
        for phase, peak in self._replay(code, *self.half):
            self.peaks[phase] = max(self.peaks.get(phase, 0), self._whole_step(phase, peak))
            log.debug("audit: %s reaches %d bytes at %s; alive: %s", phase, peak.bytes, peak.at, peak.alive)
        budget = self.planned.plan.budget
        if (
            self.enforced
            and budget is not None
            and not self.request.options.limit(budget).allows(max(self.peaks.values()))
        ):
            self.abandoned = True
            raise _Abandoned

    def _whole_step(self, phase: str, peak: Peak) -> int:
        """The peak of a phase over all slices and calls, from that of one of them."""
        moments = scenarios(self.variant.microbatches, self.planned.planning.calls, self.planned.planning.ends)
        held = self.audit.saved_bytes
        whole = max(peak.bytes + s.extra + s.others * held for s in moments if s.phase == phase)
        return whole + self.prepared.drawn.bytes

    def _replay(
        self, code: str, gm: fx.GraphModule, inputs: Sequence[Any], is_backward: bool
    ) -> list[tuple[str, Peak]]:
        ends, around = self.planned.planning.ends, self.request.around
        if is_backward:
            placeholders = gm.graph.find_nodes(op="placeholder")
            self.audit.hold(ends.kept + around.returning)
            return [("backward", self.audit.backward(code, inputs, [is_tangent(node) for node in placeholders]))]
        self.audit = Audit(around.throughout)
        forward = self.audit.forward(code, inputs, self.results)
        results: Any = output_node(gm.graph).args[0]
        own = dict.fromkeys(node for node in results[: self.results] if isinstance(node, fx.Node))
        # The caller makes float32 of 16-bit results.
        self.audit.hold(max(0, ends.results - sum(nbytes(node) for node in own if not is_primal(node))))
        return [("forward", forward), ("loss", self.audit.loss(ends.between + around.inside + around.spare))]
