"""What convolutions allocate inside their calls, against what the planner assumes.

On CUDA the rule of `device/cudnn.py` is an assumption, which only a GPU can confirm: a workspace above it makes steps
exceed their budgets. On the CPU what is assumed was measured on few samples, and continued.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xconv_fx.device.workspace import workspace_bytes
from xconv_fx.hooks.pytree import tree_leaves
from xconv_fx.measure import physical_peak, storage_bytes

from .result import Finding

aten = torch.ops.aten
# What a workspace may be above the rule, as a share of the operands, and in bytes.
ABOVE, SLACK = 0.05, 1 << 20


@dataclass(frozen=True)
class Case:
    """A convolution: its input, channels, kernel, groups and layout."""

    name: str
    size: tuple[int, ...]
    channels: int
    kernel: int = 3
    groups: int = 1
    dtype: torch.dtype = torch.float32
    last: bool = True

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("2d", (8, 32, 56, 56), 32),
    Case("2d-contiguous", (8, 32, 56, 56), 32, last=False),
    Case("2d-bfloat16", (8, 32, 56, 56), 32, dtype=torch.bfloat16),
    Case("2d-pointwise", (8, 64, 28, 28), 128, kernel=1),
    Case("2d-depthwise", (8, 32, 56, 56), 32, kernel=7, groups=32),
    Case("3d", (2, 16, 32, 32, 32), 16),
    Case("3d-contiguous", (2, 16, 32, 32, 32), 16, last=False),
)


def check(case: Case, device: str) -> Finding:
    """The forward, the input gradient and the weight gradient, each beside the rule."""
    x, weight, gradient = _operands(case, device)
    dims = len(case.size) - 2
    geometry = ([1] * dims, [case.kernel // 2] * dims, [1] * dims, False, [0] * dims, case.groups)
    calls = {
        "forward": (aten.convolution.default, (x, weight, None, *geometry)),
        "input gradient": (
            aten.convolution_backward.default, (gradient, x, weight, None, *geometry, [True, False, False])
        ),
        "weight gradient": (
            aten.convolution_backward.default, (gradient, x, weight, None, *geometry, [False, True, False])
        ),
    }  # fmt: skip
    numbers: dict[str, int] = {}
    faults: list[str] = []
    allowed = SLACK + ABOVE * sum(value.nbytes for value in (x, weight, gradient))
    for name, (func, args) in calls.items():
        taken, assumed = _taken(func, args, device), workspace_bytes(func, args, results=func(*args))
        numbers |= {f"{name}: measured": taken, f"{name}: assumed": assumed}
        if taken > assumed + allowed:
            faults.append(f"the {name} takes {taken} bytes, {assumed} are assumed")
    return Finding(off="; ".join(faults), numbers=numbers)


def _operands(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor]:
    dims = len(case.size) - 2
    order = (torch.channels_last if dims == 2 else torch.channels_last_3d) if case.last else torch.contiguous_format
    weight = (case.channels, case.size[1] // case.groups, *[case.kernel] * dims)
    sizes = (case.size, weight, (case.size[0], case.channels, *case.size[2:]))
    x, filters, gradient = (
        torch.randn(size, dtype=case.dtype, device=device).to(memory_format=order) for size in sizes
    )
    return x, filters, gradient


def _taken(func: Callable[..., Any], args: tuple[Any, ...], device: str) -> int:
    """Bytes that a call allocates beyond its results, when it is made again."""
    func(*args)
    kept: list[Any] = []
    peak = physical_peak(lambda: kept.append(func(*args)), device=device).transient
    results = [leaf for leaf in tree_leaves(kept) if isinstance(leaf, Tensor)]
    return max(0, peak - storage_bytes(results))
