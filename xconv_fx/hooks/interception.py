"""What intercepts operations at the moment."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def dispatch_modes() -> list[Any]:
    """The active modes, outermost first: those of a tracer, of fake tensors, of the user."""
    return _get_current_dispatch_mode_stack()
