"""Three peaks of a step within a budget: predicted, audited in the generated code, and what the allocator saw.

On CUDA the first step takes more, for kernels are timed in it; with `cudnn.benchmark` convolutions are as well, and may
then be others, with other workspaces. A step that is warm must be within what was audited.
"""

from __future__ import annotations

from functools import partial

import torch

import xconv_fx
from xconv_fx.measure import physical_peak

from . import training
from .nets import Net
from .result import Finding

BUDGET = "80%"
# How far above the audited peak a warm step may be, in parts and in bytes.
ABOVE, SLACK = 0.03, 1 << 16


def check(net: Net, device: str) -> Finding:
    """A step of a network by exact codecs."""
    model, x = net.build(device)
    call = training.compiled(model, codecs="exact", mem_budget=BUDGET)
    step = partial(training.step, model, call, x)

    def peak() -> int:
        model.zero_grad(set_to_none=True)
        return physical_peak(step, resident=[x, *model.parameters(), *model.buffers()], device=device).bytes

    # On the CPU, compilers allocate by the same allocator: the first step is the backend's own to measure.
    first = peak() if device == "cuda" else step()
    step()
    warm = peak()
    (plan,) = xconv_fx.plans(call)
    audited = plan.audited_peak or 0
    numbers = {"predicted": plan.predicted_peak, "audited": audited, "warm": warm, "budget": plan.budget}
    numbers |= {"first": first if device == "cuda" else plan.measured_peak}
    if device == "cuda":
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            numbers |= {"first with cudnn.benchmark": peak(), "warm with cudnn.benchmark": peak()}
    over = warm - audited
    off = f"a step takes {over} bytes more than was audited" if over > max(ABOVE * audited, SLACK) else ""
    return Finding(off, numbers=numbers)
