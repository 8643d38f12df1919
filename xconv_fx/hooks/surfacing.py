"""Let this package's errors reach the user through Dynamo, which wraps what backends raise.

Dynamo lets one family through unchanged, `torch._dynamo.exc.ShortenTraceback`; `surfaced_by_dynamo` uses that door.
Known gap: with `torch._dynamo.config.suppress_errors` set Dynamo logs the error and runs the model uncompiled, and so
without a budget. That is what the setting asks for, and no exception type escapes it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from xconv_fx.errors import XConvError, find_ours, public_type

P = ParamSpec("P")
T = TypeVar("T")


def surfaced_by_dynamo(backend: Callable[P, T]) -> Callable[P, T]:
    """Let an `XConvError` raised inside a `torch.compile` backend reach the user as its own type.

    Wraps the outermost backend callable. The error that arrives is an instance of a subclass of the original type,
    with the same name and attributes, whose traceback starts at the backend instead of inside Dynamo. Errors that
    Inductor has wrapped in `InductorError` on the way out are unwrapped; others pass untouched.
    """

    @functools.wraps(backend)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return backend(*args, **kwargs)
        except Exception as error:
            ours = find_ours(error)
            if ours is None:
                raise
            raise _surfacing(ours, sys._getframe()).with_traceback(error.__traceback__) from ours.__cause__

    return wrapper


def _surfacing(error: XConvError, frame: Any) -> XConvError:
    public: Any = public_type(type(error))
    surfacing = _surfacing_type(public)
    copy = surfacing.__new__(surfacing, *error.args)
    copy.__dict__.update(error.__dict__, first_useful_frame=frame, frame_exec_strategy=None)
    copy.__dict__["_torch_dynamo_tracer_output"] = None
    return copy


@functools.cache
def _surfacing_type(public: type[XConvError]) -> type[XConvError]:
    from torch._dynamo.exc import ShortenTraceback

    names = {"__module__": public.__module__, "__qualname__": public.__qualname__, "_public": public}
    return type(public.__name__, (public, ShortenTraceback), names)
