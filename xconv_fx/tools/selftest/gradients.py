"""Gradients of six networks by every kind of codec, in three formats, against plain autograd in double precision.

Exact codecs may be off by what rounding explains, which is what eager PyTorch is off by in the same format. The mean of
draws of the others may be off by chance besides. Fixed point has a bias of its own and must be close.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xconv_fx.errors import BudgetInfeasibleError
from xconv_fx.noise.gradient_check import gradient_check
from xconv_fx.step.explain import explain

from . import training
from .nets import NETS, Net
from .result import Finding

CODECS: Mapping[str, Mapping[str, Any]] = {
    "exact": {"codecs": "exact", "mem_budget": "85%"},
    "actnn": {"codecs": "actnn:L2"},
    "shared": {"codecs": "actnn:L3"},
    "probes": {"codecs": "xconv"},
    "fold": {"codecs": "keep,bitmask,probe:fold", "probes": 64},
    "fixed": {"codecs": "keep,bitmask,recompute,fixed:4"},
}
FORMATS = ("float32", "bfloat16", "channels-last")
DRAWS = 12
# Errors that kernels fused in another order explain, and by how many times eager PyTorch's own.
ROUNDING, TIMES = 1e-3, 3.0
# Fixed point of 4 bits: the error of all gradients together.
CLOSE = 0.3
# What a budget has above the least one.
SPARE = 1.1
# Bias beyond so many times what chance explains is none.
DOUBT = 3.0


@dataclass(frozen=True)
class Case:
    """A network, by a codec, in a format."""

    net: Net
    codec: str
    format: str

    def __str__(self) -> str:
        return f"{self.net}-{self.codec}-{self.format}"


# Exact codecs come first, then another network for each codec and format in turn: time may be up.
_ROWS = [[Case(net, codec, kind) for net in NETS] for kind in FORMATS for codec in CODECS]
_LATER = [row[(place + turn) % len(row)] for turn in range(len(NETS)) for place, row in enumerate(_ROWS[1:])]
CASES = (*_ROWS[0], *_LATER)


def check(case: Case, device: str) -> Finding:
    """The error of the gradients, or of the mean of their draws."""
    dtype = torch.bfloat16 if case.format == "bfloat16" else torch.float32
    with training.exactly():
        model, x = case.net.build(device, dtype, last=case.format == "channels-last")
        double = copy.deepcopy(model).double()
        exact = training.gradients(double, double, x.double())
        eager = training.error(training.gradients(model, model, x), exact)
        allowed = max(ROUNDING, TIMES * eager)
        if case.codec == "exact":
            call = training.compiled(model, **CODECS[case.codec])
            return _exact(training.error(training.gradients(model, call, x), exact), eager, allowed)
        return _noisy(case, model, x, eager, allowed)


def _exact(error: float, eager: float, allowed: float) -> Finding:
    off = "" if error <= allowed else f"gradients are off by {error:.2g}, {allowed:.2g} is rounding"
    return Finding(off, numbers={"error": error, "eager": eager})


def _noisy(case: Case, model: nn.Module, x: Tensor, eager: float, allowed: float) -> Finding:
    options = _tight(model, x) if case.codec == "fixed" else CODECS[case.codec]
    found = gradient_check(model, training.loss, (x, ()), options, DRAWS).total
    numbers = {"bias": found.bias, "chance": found.chance, "variance": found.variance, "eager": eager}
    most = CLOSE if case.codec == "fixed" else DOUBT * found.chance + allowed
    off = "" if found.bias <= most else f"the mean of {DRAWS} draws is off by {found.bias:.2g}, {most:.2g} is chance"
    return Finding(off, numbers=numbers)


def _tight(model: nn.Module, x: Tensor) -> Mapping[str, Any]:
    """Options under which fixed point, which is chosen last, holds what it can: little more than the least budget."""
    options = CODECS["fixed"]
    try:
        explain(model, x, mem_budget="10%", **options)
    except BudgetInfeasibleError as error:
        return {**options, "mem_budget": round(SPARE * error.smallest)}
    return {**options, "mem_budget": "10%"}
