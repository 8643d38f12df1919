"""What a check comes to: its plan's numbers, residuals and layers, planned for no machine in particular."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xconv_fx.errors import BudgetInfeasibleError
from xconv_fx.options import LIMITS
from xconv_fx.plan import Choice, Totals
from xconv_fx.reproducible import portable

from .config import Check


@dataclass(frozen=True)
class Held:
    """A residual: the layer that makes it, the operation, how it is held, and in how many of its `bytes`.

    `uses` are the ways in which the backward reads it. `line` is where in the user's code it is made; it says where to
    look, but moves with every edit, so it is neither kept nor compared.
    """

    layer: str
    operation: str
    shape: str
    dtype: str
    codec: str
    uses: str
    bytes: int
    held: int
    line: str = field(default="", compare=False)


@dataclass(frozen=True)
class Record:
    """A check's numbers. Bytes: `unbudgeted` is the predicted peak with everything kept, `peak` the one of the plan,
    `lowest` the smallest budget that has a plan, `fixed` what is there whatever the plan.

    `noise` and `time` (seconds a step) are what the plan adds. `layers` maps each layer without parts to what it is,
    `step` is the check as it is configured. Of a model of several graphs peaks are the highest, other numbers add up.
    """

    step: Mapping[str, Any]
    peak: int
    unbudgeted: int
    lowest: int
    fixed: int
    noise: float
    time: float
    slices: int
    peak_at: str
    layers: Mapping[str, str]
    residuals: tuple[Held, ...]


def measure(check: Check, folder: Path) -> Record:
    """Plan a check whose paths are relative to `folder`.

    Raises `BudgetInfeasibleError` when its budget has no plan, and `UsageError` when its model fails.
    """
    with _inside(folder), portable():
        plans = check.workload.plans(**check.options)
        lowest = _lowest(check, len(plans))
        layers = _layers(check)
    top, totals = max(plans, key=lambda plan: plan.predicted_peak), Totals.of(plans)
    return Record(
        step=check.written,
        peak=totals.peak,
        unbudgeted=max(plan.baseline_peak for plan in plans),
        lowest=lowest,
        fixed=top.fixed_bytes,
        noise=_rounded(totals.noise),
        time=_rounded(totals.time),
        slices=top.slices,
        peak_at=top.peak_at,
        layers=layers,
        residuals=tuple(_held(choice) for plan in plans for choice in plan.choices),
    )


def _lowest(check: Check, graphs: int) -> int:
    """The smallest budget in bytes that has a plan. Each graph of several says what it needs, one after another."""
    options = {name: value for name, value in check.options.items() if name not in LIMITS}
    budget = 1
    for _ in range(graphs):
        try:
            check.workload.plans(**{**options, "mem_budget": budget})
        except BudgetInfeasibleError as error:
            budget = error.smallest
        else:
            break
    return budget


def _layers(check: Check) -> dict[str, str]:
    """Every layer without parts as its `repr`, in the model's order."""
    model = check.workload.model()
    return {name: repr(layer) for name, layer in model.named_modules() if not any(layer.children())}


def _held(choice: Choice) -> Held:
    bits = "" if choice.bits is None else f":{choice.bits}"
    probes = "" if choice.probes is None else f":{choice.kind}x{choice.probes}"
    return Held(
        layer=choice.layer,
        # Nodes are numbered through the graph: a new layer would rename all that come after it.
        operation=re.sub(r"_\d+$", "", choice.residual),
        shape="x".join(map(str, choice.shape)) or "scalar",
        dtype=choice.dtype.removeprefix("torch."),
        codec=f"{choice.codec}{probes}{bits}",
        uses=" ".join(choice.uses),
        bytes=choice.bytes_before,
        held=choice.bytes_after,
        line=choice.source,
    )


def _rounded(number: float) -> float:
    """Four digits: sums of floats differ in the last ones between processors."""
    return float(f"{number:.4g}")


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Work in `folder`, and leave `sys.path` as it was."""
    here, path = Path.cwd(), list(sys.path)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)
        sys.path[:] = path
