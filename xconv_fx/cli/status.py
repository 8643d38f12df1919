"""What a command is busy with, as a line on an interactive terminal that is gone when it is done; else nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console

from xconv_fx.progress import listening


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """Show `text`, and then whatever is announced, on standard error while this context is active."""
    console = Console(stderr=True)
    if not console.is_interactive:
        yield
        return
    with console.status(text) as line, listening(line.update):
        yield
