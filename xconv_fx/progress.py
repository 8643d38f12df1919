"""What a long computation is doing right now, for whoever shows it: the command line, on an interactive terminal.

Code that takes seconds says what it begins with (`announce`); it neither knows nor waits for who listens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

_listener: ContextVar[Callable[[str], None] | None] = ContextVar("listener", default=None)


def announce(text: str) -> None:
    """Say what begins now, in a few words."""
    listener = _listener.get()
    if listener is not None:
        listener(text)


@contextlib.contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Pass what is announced within this context to `listener`."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextlib.contextmanager
def doing(text: str) -> Iterator[None]:
    """Say what begins now, and say it before whatever is announced within this context."""
    announce(text)
    outer = _listener.get()
    if outer is None:
        yield
        return
    with listening(lambda detail: outer(f"{text}: {detail}")):
        yield
