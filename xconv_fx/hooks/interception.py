"""What intercepts operations at the moment: dispatch modes, and the transforms of `torch.func`."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def dispatch_modes() -> list[Any]:
    """The active modes, outermost first: those of a tracer, of fake tensors, of the user."""
    return _get_current_dispatch_mode_stack()


def transforms_active() -> bool:
    """Whether this runs inside `torch.func.grad`, `vmap` or one of their kind, which wrap tensors for its duration."""
    return torch._C._are_functorch_transforms_active()
