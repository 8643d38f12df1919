"""Sizes for people to read and to type again: "1.23 GB" and "1.3GB"."""

from __future__ import annotations


def format_size(size: int | float) -> str:
    """`size` bytes in three significant digits and a decimal unit, such as "1.23 GB" or "812 MB"."""
    if size < 0:
        return f"-{format_size(-size)}"
    if size < 999.5:
        return f"{round(size)} B"
    for factor, unit in ((10**3, "kB"), (10**6, "MB"), (10**9, "GB")):
        # Compared after rounding: 999.7 MB is shown as 1.00 GB, not as 1000 MB.
        if size < 999.5 * factor:
            return f"{_three_digits(size / factor)} {unit}"
    return f"{_three_digits(size / 10**12)} TB"


def _three_digits(number: float) -> str:
    return f"{number:.{2 if number < 9.995 else 1 if number < 99.95 else 0}f}"


def rounded_up(size: int) -> int:
    """The least number of at most three digits that is at least `size`."""
    step = 10 ** max(0, len(str(size)) - 3)
    return -(-size // step) * step


def sufficient_size(size: int) -> str:
    """A size of at most three digits that a user can type and that is at least `size` bytes, such as "3.11GB"."""
    enough = rounded_up(size)
    factor, unit = next(((f, u) for f, u in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")) if enough >= f), (1, "B"))
    return f"{enough / factor:g}{unit}"
