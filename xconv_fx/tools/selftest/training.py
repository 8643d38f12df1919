"""What several tests do: a step, its gradients in a row, and errors of such rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def loss(output: Tensor) -> Tensor:
    """A scalar whose gradient depends on every element of the output."""
    return output.float().square().mean()


def step(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Forward and backward; the gradients stay."""
    model.zero_grad(set_to_none=True)
    loss(call(x)).backward()


def gradients(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """All gradients of `loss(call(x))`, in double precision in a row; leaves none behind."""
    step(model, call, x)
    row = torch.cat([p.grad.detach().double().flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return row


def error(found: Tensor, exact: Tensor) -> float:
    """How far a row is off, relative to the norm of the exact one."""
    return float((found - exact).norm() / exact.norm())


def compiled(model: nn.Module, **options: Any) -> Any:
    """The model compiled by this backend, or with `inductor` by Inductor alone, with these settings."""
    if (settings := options.pop("inductor", None)) is not None:
        return torch.compile(model, dynamic=False, options=settings or None)
    return torch.compile(model, backend="xconv", dynamic=False, options=options)


@contextlib.contextmanager
def exactly() -> Iterator[None]:
    """Without TF32, whose rounding hides errors."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
