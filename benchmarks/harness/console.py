"""Where the benchmarks print their tables."""

from __future__ import annotations

import sys

from rich.console import Console


def wide(width: int = 170) -> Console:
    """As wide as the terminal. A pipe has no width of its own, and rich would squeeze tables into 80 columns."""
    return Console(width=None if sys.stdout.isatty() else width, highlight=False)
