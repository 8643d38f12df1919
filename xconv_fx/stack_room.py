"""Room on the interpreter's stack, for code that runs long and deep inside other code.

CPython, from 3.11 on, keeps Python frames in chunks of 16 KiB. It maps a chunk when a call does not fit into the last
one, and unmaps it when that call returns. Under Dynamo and AOTAutograd, some hundred frames deep, a graph is traced by
millions of calls from one and the same depth; where a chunk ends just there, every one of them costs two system calls
and a page fault. Planning a ResNet-152 lost 15 of 47 seconds to 1.4 million such pairs.

A frame too large for a chunk gets one of its own, of the next power of two. `with_stack_room` gives a function such a
frame: all that it calls runs in the rest of that chunk. Pages that nothing touches stay unmapped.

Source: `push_chunk` in CPython's Python/pystate.c, checked on 3.11. Where frames are kept otherwise it does nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# Slots of 8 bytes: 515 KiB, of which the chunk of 1 MiB leaves 509 KiB for the frames of callees.
SLOTS = 66_000


def with_stack_room(function: Callable[P, T]) -> Callable[P, T]:
    """The function, with room for the frames of all that it calls."""

    def roomy(*args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **kwargs)

    roomy.__code__ = roomy.__code__.replace(co_stacksize=SLOTS)
    return functools.wraps(function)(roomy)
