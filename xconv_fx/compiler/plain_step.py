"""A graph's step without xconv: what budgets in percent refer to, and what is run where that fits and will do."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from xconv_fx.options import Probes

from .candidates import FULL_BATCH
from .capture import CaptureRequest
from .generate import Generated, generate, plan

# A plain step predicted to exceed its budget by more than this share is not generated to make sure.
DOUBT = 0.1
# Passes change what keeping everything takes: of a graph predicted with them, only this much is beyond doubt.
FAR = 1.5


@dataclass(frozen=True)
class PlainStep:
    """The step of one graph as Inductor compiles it by itself; code and prediction are made when first needed."""

    request: CaptureRequest

    @functools.cached_property
    def generated(self) -> Generated:
        """The code, without kernels."""
        plain = self.request.plain()
        return generate(plain, FULL_BATCH, plan(plain, FULL_BATCH), enforced=False)

    @functools.cached_property
    def predicted(self) -> int:
        """The predicted peak in bytes, without what passes do to the graph under a budget."""
        planning = self.request.plain().problem(FULL_BATCH)
        assert planning is not None, "a graph without a backward has no peak"
        return planning.baseline_peak()

    @property
    def will_do(self) -> bool:
        """Whether it is what the options ask for, if it fits."""
        options = self.request.options
        return options.probes == Probes() and options.slices in (None, 1)

    def beyond(self, budget: int) -> int | None:
        """Its peak without its code, when that is predicted to exceed the budget by far; None where a doubt is left."""
        whole = self.request.problem(FULL_BATCH)
        if whole is None:
            return None
        predicted = whole.baseline_peak()
        if budget * (1 + DOUBT) < predicted <= budget * FAR:
            predicted = self.predicted
        return predicted if predicted > budget * (1 + DOUBT) else None
