"""A compiled model beside the report of its plans, which the fixture `compile_model` gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from xconv_fx.plan import Plan
from xconv_fx.plan.report import read_json


@dataclass(frozen=True)
class Compiled:
    """A compiled model and the file that its plans are written to."""

    model: nn.Module
    report: Path

    def __call__(self, *inputs: Any) -> Any:
        return self.model(*inputs)

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plans of its graphs so far; none before the first call."""
        return read_json(self.report) if self.report.exists() else ()

    @property
    def plan(self) -> Plan:
        """The plan of its only graph."""
        (only,) = self.plans
        return only


Compile = Callable[..., Compiled]
