"""Random numbers: those of a slice of the batch when its forward runs again, and fresh ones in every step."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xconv_fx
from xconv_fx.step.explain import explain

from . import training
from .nets import NETS
from .result import Finding

# All slices hold their residuals, or some run their forward again: shares of the peak that are planned to come to that.
SLICES = {"held": ("100%",), "again": ("65%", "60%", "55%", "50%")}
OPTIONS: dict[str, Any] = {"slices": 4, "codecs": "exact"}
STEPS = 4


def modes(device: str) -> tuple[str, ...]:
    """Modes of Inductor that differ on the device."""
    if device == "cpu":
        return ("default",)
    return "default", "reduce-overhead", "max-autotune-no-cudagraphs"


class _Dropped(nn.Module):
    """Convolutions with dropout, and a scale whose gradient is known from the results: their sum, over the scale."""

    def __init__(self) -> None:
        super().__init__()
        layers = (nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(), nn.Dropout(0.3), nn.Conv2d(16, 8, 3, padding=1))
        self.body, self.scale = nn.Sequential(*layers), nn.Parameter(torch.linspace(0.5, 2, 8)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.body(x) * self.scale, 0.5)


def check_slices(case: str, device: str) -> Finding:
    """Dropout in four slices: the backward must know the very numbers that the forward drew."""
    model, x = _Dropped().to(device), torch.randn(8, 3, 32, 32, device=device)
    with training.exactly():
        call = training.compiled(model, mem_budget=_budget(case, model, x), **OPTIONS)
        result = call(x)
        result.sum().backward()
    assert model.scale.grad is not None
    expected = (result.detach().double().sum((0, 2, 3)) / model.scale.detach().double().flatten()).cpu()
    error = training.error(model.scale.grad.double().flatten().cpu(), expected)
    dropped = float((result == 0).double().mean())
    (plan,) = xconv_fx.plans(call)
    numbers = {"error": error, "dropped": dropped, "slices": plan.slices, "slices that hold": plan.held_slices}
    faults = [
        f"the gradient of a scale is off by {error:.2g}: the backward has another dropout" if error > 1e-4 else "",
        "" if 0.45 < dropped < 0.55 else f"{dropped:.2f} of the results are dropped, not a half",
        "" if plan.slices == 4 else f"the batch ran in {plan.slices} slices, not in 4",
        "slices draw the same numbers" if _same(result) else "",
        "no slice runs its forward again" if case == "again" and plan.held_slices == plan.slices else "",
    ]
    return Finding("; ".join(filter(None, faults)), numbers=numbers)


def _budget(case: str, model: nn.Module, x: Tensor) -> int | str:
    """What the plan of the case's largest share takes under which some slices run again; the last share if none do.

    In bytes: of a share, the compiled step's peak would decide how many slices hold, which is another one.
    """
    for share in SLICES[case]:
        (plan,) = explain(model, x, mem_budget=share, **OPTIONS).plans
        if plan.held_slices < plan.slices:
            return plan.predicted_peak
    return SLICES[case][-1]


def _same(result: Tensor) -> bool:
    masks = [part == 0 for part in result.detach().chunk(4)]
    return any(torch.equal(masks[0], mask) for mask in masks[1:])


def check_seeds(mode: str, device: str) -> Finding:
    """The same step several times: other draws in each, and the same after `torch.manual_seed`."""
    model, x = NETS[1].build(device)
    call = training.compiled(model, codecs="xconv", mode=mode)
    with training.exactly():
        for _ in range(STEPS):  # CUDA graphs are captured in the first ones.
            training.gradients(model, call, x)
        rows = [training.gradients(model, call, x) for _ in range(STEPS)]
        again = []
        for _ in range(2):
            torch.manual_seed(3)
            again.append(training.gradients(model, call, x))
    apart = min(training.error(a, b) for a, b in itertools.pairwise(rows))
    repeated = training.error(again[1], again[0])
    faults = [
        f"steps draw the same numbers: gradients differ by {apart:.2g}" if apart < 1e-2 else "",
        f"torch.manual_seed does not repeat a step: gradients differ by {repeated:.2g}" if repeated > 1e-3 else "",
    ]
    return Finding("; ".join(filter(None, faults)), numbers={"between steps": apart, "repeated": repeated})
