"""Which layer of a model holds what outside of compiled code: by patterns of names that a user wrote, or by a plan.

A plan is made for compiled code, and eager code cannot follow all of it. A `Choice` says how one residual is held; the
layers that it is about are those whose weight gradients read it (`Choice.readers`). Where it is held as probes or
codes, the layer can hold its input in the same way. Where it is recomputed, only a compiler can; where a normalisation
reads it, PyTorch's layer holds it as it is. Slices of the batch are a property of the compiled step. `ByPlan.notes`
says which of this a plan asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from xconv_fx.options import Probes
from xconv_fx.plan import Choice, Plan

from .sketch import PLAIN_BITS, Sketch

# Codecs that drop-in layers have: what a plan for them may use.
EAGER_CODECS = ("keep", "bitmask", "quantize", "probe")


class Assignment(Protocol):
    """What each layer is to hold. A layer may have several names, if it is used in several places."""

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plans that it follows."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was asked for and cannot be had."""

    def check(self, layers: Collection[str]) -> None:
        """Raise `OptionError` if something was asked of none of these `layers`."""

    def sketch(self, names: Sequence[str]) -> Sketch | str:
        """What the layer holds of its input, or why it is left alone."""

    def why_whole(self, names: Sequence[str]) -> str:
        """Why a ReLU keeps holding its result, or "" if it shall hold bits."""


@dataclass(frozen=True)
class ByPattern:
    """The same `base` for every layer, with as many probes as `probes` says of its name."""

    probes: Probes
    base: Sketch
    plans: tuple[Plan, ...] = ()
    notes: tuple[str, ...] = ()

    def check(self, layers: Collection[str]) -> None:
        self.probes.check(layers)

    def sketch(self, names: Sequence[str]) -> Sketch | str:
        counts = (self.probes.count_for(name) for name in names)
        count = next((count for count in counts if count is not None), None)
        if count is None and self.probes.patterns:
            return "no name or pattern in `probes` matches"
        _, kind, bits, means = self.base.settings
        return Sketch.of(count, kind, bits, means)

    def why_whole(self, names: Sequence[str]) -> str:
        return ""


class ByPlan:
    """What the plans of a model's graphs chose for the layers' inputs."""

    def __init__(self, plans: Iterable[Plan]) -> None:
        self.plans = tuple(plans)
        self._choices = [choice for plan in self.plans for choice in plan.choices]

    def check(self, layers: Collection[str]) -> None:
        """Nothing: a plan's layers are the model's."""

    def sketch(self, names: Sequence[str]) -> Sketch | str:
        found = [choice for choice in self._choices if set(choice.readers) & set(names)]
        if not found:
            return "its input is none of the plan's residuals"
        for choice in found:
            if choice.codec not in ("quantize", "probe"):
                return _LEFT.get(choice.codec, f"the plan holds its input as {choice.codec}, which needs a compiler")
        # A layer that is used several times has one setting: the one that holds most.
        return _sketch_of(max(found, key=lambda choice: choice.bytes_after / max(choice.bytes_before, 1)))

    def why_whole(self, names: Sequence[str]) -> str:
        """A ReLU of which the plan says nothing holds bits if anything at all is to be saved."""
        own = {choice.codec for choice in self._choices if choice.layer in names}
        everything = own or {choice.codec for choice in self._choices}
        return "the plan keeps its result" if everything <= {"keep"} else ""

    @property
    def notes(self) -> tuple[str, ...]:
        recomputed = sum(choice.codec == "recompute" for choice in self._choices)
        held = sum(choice.codec in ("quantize", "probe") and not choice.readers for choice in self._choices)
        slices = max((plan.slices for plan in self.plans), default=1)
        share = min((plan.saved_share for plan in self.plans), default=1.0)
        said = {
            f"residuals that the plan recomputes, and eager code holds: {recomputed}": recomputed,
            "PyTorch's partitioner recomputes more in the plan than eager code does": share < 1,
            f"approximated residuals that no weight gradient reads, and eager code holds whole: {held}": held,
            f"the plan runs the batch in {slices} slices; eager code runs it at once": slices > 1,
            "the budget is one of compiled code: measure the peak (xconv_fx.measure.training_peak)": any(
                plan.budget is not None for plan in self.plans
            ),
        }
        return tuple(note for note, applies in said.items() if applies)


_LEFT = {
    "keep": "the plan keeps its input",
    "bitmask": "the plan keeps its input",
    "recompute": "the plan recomputes its input, which needs a compiler",
}


def _sketch_of(choice: Choice) -> Sketch:
    """The drop-in layer's setting for an input that the plan holds as codes, which have one width there, or probes."""
    return Sketch.of(bits=choice.bits or PLAIN_BITS) if choice.codec == "quantize" else Sketch(choice.spec)
