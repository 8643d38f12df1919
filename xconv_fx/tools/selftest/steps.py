"""Time of a step at equal peaks: by Inductor, by torch's `activation_memory_budget`, and by this backend."""

from __future__ import annotations

from functools import partial
from typing import Any

from xconv_fx import hooks
from xconv_fx.measure import interleaved_times, training_peak

from . import training
from .nets import LARGE, NETS, Net
from .result import Finding

# Torch's budget: the share of what is saved that it keeps.
SHARE = 0.5
# How far above its budget a measured peak may be.
ABOVE = 0.03
REPEATS = 5
# Inductor alone. Settings that say what holds anyway keep the code that torch's budget makes apart from it.
INDUCTOR: dict[str, Any] = {"inductor": {}}


def nets(device: str) -> tuple[Net, ...]:
    """A ResNet and a 3D U-Net, of a size that suits the device."""
    return LARGE if device == "cuda" else (NETS[0], NETS[3])


def check(net: Net, device: str) -> Finding:
    """The peaks, and times of a step in turn."""
    model, x = net.build(device)
    ways = {"inductor": (1.0, INDUCTOR), "torch's budget": (SHARE, {"inductor": {"fallback_random": False}})}
    calls, peaks = {}, {}
    for name, (share, settings) in ways.items():
        calls[name] = training.compiled(model, **settings)
        with hooks.recomputing(share):
            peaks[name] = training_peak(calls[name], x, training.loss).bytes
    budget = min(peaks.values())
    calls["xconv"] = training.compiled(model, mem_budget=budget)
    peaks["xconv"] = training_peak(calls["xconv"], x, training.loss).bytes
    steps = {name: partial(training.step, model, call, x) for name, call in calls.items()}
    times = interleaved_times(steps, repeats=REPEATS)
    numbers: dict[str, float] = {f"{name}: peak": peak for name, peak in peaks.items()}
    numbers |= {f"{name}: seconds": seconds for name, seconds in times.items()}
    over = peaks["xconv"] - budget
    return Finding(f"the peak is {over} bytes over the budget" if over > ABOVE * budget else "", numbers=numbers)
