"""Assertions on memory for test suites: what code really takes, and what the planner predicts of a model.

The pytest plugin (`pytest_plugin.py`) offers the first as a marker and a fixture; both work without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from xconv_fx.errors import BudgetInfeasibleError, OptionError
from xconv_fx.measure.origins import Recording, recorded
from xconv_fx.options import LIMITS
from xconv_fx.options.budget import parse_size
from xconv_fx.plan import Plan
from xconv_fx.reproducible import portable
from xconv_fx.step.explain import Explanation, explain
from xconv_fx.units import format_size

DEVICES = ("cpu", "cuda")
SHOWN = 5


@contextlib.contextmanager
def within_budget(
    size: str | int, *resident: Any, device: str | None = None, lines: bool = True
) -> Iterator[Recording]:
    """Fails with an `AssertionError` unless the physical peak of the block is at most `size`, such as "1.5GB".

    Counted is what the block allocates, on top of the tensors and modules in `resident`. `device` is "cpu" or "cuda",
    by default where these are, or without any CUDA if the block allocates there. The error lists the largest
    allocations that were alive at the peak with the lines that led to them; the recording has them as numbers. Knowing
    the lines makes Python several times slower, which matters when a model is compiled in the block: compile it before,
    or leave `lines` out. Raises `OptionError` for a size or a device that is none.
    """
    __tracebackhide__ = True
    limit = parse_size(size, option="budget")
    device = checked_device(device)
    with recorded(resident, device, lines) as recording:
        yield recording
    if message := excess(recording, limit):
        raise AssertionError(message)


def checked_device(device: str | None) -> str | None:
    """The device to measure; None is for what is measured to tell. Raises `OptionError` for one that is not there."""
    if device is None:
        return None
    if device not in DEVICES or (device == "cuda" and not torch.cuda.is_available()):
        here = DEVICES if torch.cuda.is_available() else DEVICES[:1]
        raise OptionError("device", device, f"what can be measured here: {', '.join(map(repr, here))}")
    return device


def excess(recording: Recording, limit: int) -> str:
    """What to say of a recording whose peak is over the limit; "" of any other."""
    peak = recording.peak.bytes
    if peak <= limit:
        return ""
    over = f"peak {format_size(peak)} is {format_size(peak - limit)} over the budget of {format_size(limit)}"
    return f"{over}; alive at the peak:\n{recording.table()}"


def assert_plan(
    model: nn.Module,
    *inputs: Any,
    mem_budget: str | int | None = None,
    peak: str | int | None = None,
    **options: Any,
) -> Explanation:
    """Fails with an `AssertionError` unless `model` has a plan within `mem_budget`, and its predicted peak is `peak` or
    less. Without `mem_budget` that is the peak with everything kept.

    Nothing is trained, and the plan is the same on every machine. `options` are those of
    `xconv_fx.step.explain.explain`, such as `codecs="exact"` or `max_noise=0.01`. Returns the plans.
    """
    __tracebackhide__ = True
    limit = None if peak is None else parse_size(peak, option="peak")
    try:
        with portable():
            explanation = explain(model, *inputs, mem_budget=mem_budget, **options)
    except BudgetInfeasibleError as error:
        raise AssertionError(str(error)) from error
    except OptionError as error:
        # A limit that no plan keeps is a finding, a misspelt option a mistake in the test.
        if error.option in LIMITS and "no plan within" in error.hint:
            raise AssertionError(str(error)) from error
        raise
    highest = max(explanation.plans, key=lambda plan: plan.predicted_peak)
    if limit is not None and highest.predicted_peak > limit:
        raise AssertionError(_over(highest, limit))
    return explanation


def _over(plan: Plan, limit: int) -> str:
    """What to say of a plan whose peak is over the limit: where, and the largest residuals that it holds."""
    lines = [f"predicted peak {format_size(plan.predicted_peak)} at {plan.peak_at} is over {format_size(limit)}; held:"]
    for choice in sorted(plan.choices, key=lambda choice: -choice.bytes_after)[:SHOWN]:
        lines.append(f"{format_size(choice.bytes_after):>9}  {choice.layer or choice.residual}, {choice.codec}")
    return "\n".join(lines)
