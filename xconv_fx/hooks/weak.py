"""Methods that registries of torch hold without holding their objects."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch


def weak_method(method: Callable[..., None]) -> Callable[..., None]:
    """Calls a bound method while its object lives, and does nothing after. Dynamo does not trace into it."""
    weak = weakref.WeakMethod(method)

    @torch.compiler.disable
    def call(*arguments: Any) -> None:
        found = weak()
        if found is not None:
            found(*arguments)

    return call
