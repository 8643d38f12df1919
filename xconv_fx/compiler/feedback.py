"""What audits of generated code tell the search: by how much predictions were short, and which plans were ruled out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .candidates import Variant, compared_variant
from .generate import Generated

Corrections = Mapping[str, int]


@dataclass(frozen=True)
class Feedback:
    """`found` is what the prediction of each phase of a variant is short of, in bytes; the same whatever number of
    slices is held. `rejected` are variants whose plan was ruled out, with the corrections that it was made with."""

    found: Mapping[Variant, Corrections] = field(default_factory=dict)
    rejected: Mapping[Variant, Corrections] = field(default_factory=dict)

    def corrections(self, variant: Variant) -> Corrections:
        """What is known of a variant."""
        return self.found.get(compared_variant(variant), {})

    def repeats(self, variant: Variant) -> bool:
        """Whether the variant was rejected, and nothing is known since that would change its plan."""
        return self.rejected.get(variant) == self.corrections(variant)

    def after(self, generated: Generated) -> Feedback:
        """With what the audit of code that is over the budget found. A phase that is over is corrected by a hundredth
        of the budget more at least."""
        variant, before = generated.variant, self.corrections(generated.variant)
        found = {**self.found, compared_variant(variant): _corrected(generated, before)}
        return replace(self, found=found, rejected={**self.rejected, variant: before})

    def without(self, variant: Variant) -> Feedback:
        """Where the planner sees no plan of a variant any more."""
        return replace(self, rejected={**self.rejected, variant: self.corrections(variant)})


def _corrected(generated: Generated, before: Corrections) -> dict[str, int]:
    assert generated.planned is not None and generated.planned.plan.budget is not None
    usable = generated.request.options.limit(generated.planned.plan.budget).usable
    more = dict(before)
    for phase, audited in generated.audited.peaks.items():
        known = before.get(phase, 0)
        found = audited - (generated.planned.phase_peaks[phase] - known)
        more[phase] = max(found, known + usable // 100) if audited > usable else max(found, known)
    return more


NOTHING_FOUND = Feedback()
