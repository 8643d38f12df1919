"""Compilations of code that count in no limit of recompilations but their own.

`torch.compile` takes `isolate_recompiles` from torch 2.13 on. In 2.12 all compilations of one piece of code count
together: a user's copies of a model share their limit there, while those that are made to look ahead are made invalid
at the end, and taken off what Dynamo counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .frames import invalidate

_REASON = "xconv-fx compiled it to look ahead"


def own_limit() -> dict[str, Any]:
    """What `torch.compile` is given for a limit of its own, where it takes that."""
    return {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}


@contextlib.contextmanager
def compiling_apart() -> Iterator[Callable[..., Any]]:
    """`torch.compile`, for what is compiled and called within."""
    if own_limit():
        yield functools.partial(torch.compile, **own_limit())
        return
    _discount()
    known = {id(entry.guard_manager) for entry in _entries()}
    try:
        yield torch.compile
    finally:
        for entry in _entries():
            if id(entry.guard_manager) not in known:
                invalidate(entry, _REASON)


def _entries() -> list[Any]:
    """Everything that Dynamo has compiled of all code."""
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
    from torch._dynamo.convert_frame import input_codes

    codes = [code for reference in input_codes.seen if (code := reference()) is not None]
    return [entry for code in codes for entry in _debug_get_cache_entry_list(code)]


@functools.cache
def _discount() -> None:
    """Have Dynamo count nothing that was compiled here, from now on."""
    from torch._dynamo import convert_frame

    count = convert_frame.compute_cache_size

    @functools.wraps(count)
    def compute_cache_size(frame: Any, cache_entry: Any) -> Any:
        size, apart = count(frame, cache_entry), 0
        while cache_entry:
            apart += getattr(cache_entry.guard_manager, "invalidation_reason", "") == _REASON
            cache_entry = cache_entry.next
        return dataclasses.replace(size, **{name: number - apart for name, number in vars(size).items()})

    convert_frame.compute_cache_size = compute_cache_size  # type: ignore[assignment]
