"""What a graph comes to: code that is to run, with what is known of its plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from xconv_fx.plan import Plan
from xconv_fx.plan.log import log, publish
from xconv_fx.runtime.session import GraphRecord

from .candidates import Variant
from .capture import CaptureRequest, noted
from .generate import Audited, Generated
from .pipeline import Planned


@dataclass(frozen=True)
class PlanFacts:
    """Fields of `Plan` that are known only when it has been searched for; what is None is as it was planned."""

    baseline_peak: int | None = None
    budget: int | None = None
    attempts: int | None = None
    foreseen: float | None = None
    time: float | None = None
    gap: float | None = None
    inductor: bool | None = None

    def known(self) -> dict[str, Any]:
        """Those that are not None."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Outcome:
    """Code that is to run, what is known of its plan, and `notes` besides those of its request."""

    generated: Generated
    facts: PlanFacts
    notes: tuple[str, ...] = ()

    def finished(self) -> tuple[Callable[..., Any], Plan | None]:
        """The step, its kernels compiled, and its plan as it was recorded; None for a graph without a backward."""
        generated = self.generated
        assert generated.step is not None, "code that was abandoned is not run"
        generated.load()
        request = noted(generated.request, self.notes)
        facts = replace(self.facts, inductor=generated.request.options.plain)
        if facts.foreseen is None:
            facts = replace(facts, foreseen=generated.foreseen)
        return generated.step, report(request, generated.variant, generated.planned, generated.audited, facts)


def report(
    request: CaptureRequest, variant: Variant, planned: Planned | None, audited: Audited, facts: PlanFacts
) -> Plan | None:
    """Publish and record a plan, with what is known about it besides; None for a graph without a backward."""
    if planned is None:
        log.info("a graph without a backward: plain Inductor")
        return None
    # Without what is left free for other graphs.
    taken = max((size - request.around.spare * (phase == "loss") for phase, size in audited.peaks.items()), default=0)
    found = {
        "saved_share": variant.saved,
        "relayout": variant.relayout,
        "store_gradients": variant.store_gradients,
        "audited_peak": taken or None,
        **request.session.facts,
        **facts.known(),
        **request.session.of_step(request.graph.key),
    }
    unknown = tuple(f"what {name} allocates inside its calls is not known" for name in audited.uncounted)
    plan = replace(planned.plan, notes=(*planned.plan.notes, *request.notes, *unknown), **found)
    publish(plan)
    planning = planned.planning
    held = _held(planned, plan, audited)
    request.session.add(GraphRecord(request.graph, plan, planning.problem, planning.ends.results, held=held))
    return plan


def _held(planned: Planned, plan: Plan, audited: Audited) -> int:
    """Bytes that one call holds from its forward to its backward, its results included: audited if it was."""
    microbatches, planning = planned.microbatches, planned.planning
    if microbatches is None:
        return audited.held or planning.rest + planning.ends.results + plan.saved_after // plan.calls
    slice_holds = audited.saved or planning.rest + sum(choice.bytes_after for choice in plan.choices)
    return microbatches.held * slice_holds + microbatches.count * planning.ends.results + microbatches.copies
