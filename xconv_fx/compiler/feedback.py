"""What audits of generated code tell the search: by how much predictions were short, and which plans were ruled out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .candidates import Route, compared_route
from .generate import Generated

Corrections = Mapping[str, int]


@dataclass(frozen=True)
class Feedback:
    """`found` is what the prediction of each phase of a variant is short of, in bytes; the same whatever number of
    slices is held. `rejected` are variants whose plan was ruled out, with the corrections that it was made with."""

    found: Mapping[Route, Corrections] = field(default_factory=dict)
    rejected: Mapping[Route, Corrections] = field(default_factory=dict)

    def corrections(self, route: Route) -> Corrections:
        """What is known of a variant."""
        return self.found.get(compared_route(route), {})

    def repeats(self, route: Route) -> bool:
        """Whether the variant was rejected, and nothing is known since that would change its plan."""
        return self.rejected.get(route) == self.corrections(route)

    def after(self, generated: Generated) -> Feedback:
        """With what the audit of code that is over the budget found. A phase that is over is corrected by a hundredth
        of the budget more at least."""
        route, before = generated.route, self.corrections(generated.route)
        found = {**self.found, compared_route(route): _corrected(generated, before)}
        return replace(self, found=found, rejected={**self.rejected, route: before})

    def without(self, route: Route) -> Feedback:
        """Where the planner sees no plan of a variant any more."""
        return replace(self, rejected={**self.rejected, route: self.corrections(route)})


def _corrected(generated: Generated, before: Corrections) -> dict[str, int]:
    assert generated.planned is not None and generated.planned.plan.budget is not None
    usable = generated.traced.options.usable(generated.planned.plan.budget)
    more = dict(before)
    for phase, audited in generated.audited.peaks.items():
        known = before.get(phase, 0)
        found = audited - (generated.planned.phase_peaks[phase] - known)
        more[phase] = max(found, known + usable // 100) if audited > usable else max(found, known)
    return more


NOTHING_FOUND = Feedback()
