"""Sizes as people write them: "8GB", "7.5 GiB", 800_000_000, or "60%" of what a step takes without xconv.

Units are decimal (kB, MB, GB, TB: powers of 1000) or binary (KiB, MiB, GiB, TiB: powers of 1024), in any case, with
or without the final B. Floats are refused: 0.6 may mean 60 per cent or a forgotten unit, and a silent guess would be
off by nine orders of magnitude.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from numbers import Integral

from xconv_fx.errors import OptionError
from xconv_fx.units import format_size

DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
FACTORS = {**DECIMAL, **BINARY}

_NUMBER = r"[+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:e[+-]?\d{1,3})?"
_LARGEST = 2**63 - 1
_SIZE = re.compile(rf"\s*({_NUMBER})\s*([kmgt]?i?)b?\s*", re.IGNORECASE)
_PERCENT = re.compile(rf"\s*({_NUMBER})\s*%\s*", re.IGNORECASE)

SIZE_HINT = "write a number of bytes or a size with a unit such as '800MB', '8GB' or '7.5GiB'"
BUDGET_HINT = f"{SIZE_HINT}, or a share of the peak without xconv such as '60%'"


def parse_size(value: str | int, *, option: str = "size", allow_zero: bool = False, hint: str = SIZE_HINT) -> int:
    """Bytes in `value`, an int of bytes or a string with an optional unit; fractions of a byte are rounded.

    Raises `OptionError` naming `option` for anything else: other types, unknown units, negative sizes and, unless
    `allow_zero`, sizes that round to zero.
    """
    size = _bytes(value, option, hint)
    if size < 0 or (size == 0 and not allow_zero):
        sign = "negative" if size < 0 else "zero bytes"
        raise OptionError(option, value, f"the size is {sign}; {hint}")
    return size


def _bytes(value: object, option: str, hint: str) -> int:
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, float):
        raise OptionError(option, value, f"a float is ambiguous; {hint}")
    if not isinstance(value, str):
        raise OptionError(option, value, f"not a size but a {type(value).__name__}; {hint}")
    match = _SIZE.fullmatch(value)
    if match is None or match[2].lower() not in FACTORS:
        raise OptionError(option, value, f"not a size; {hint}")
    size = Decimal(match[1]) * FACTORS[match[2].lower()]
    if size > _LARGEST:
        raise OptionError(option, value, f"too large; {hint}")
    return round(size)


@dataclass(frozen=True)
class Budget:
    """A limit on the physical peak of a step: either `bytes`, or `fraction` of the peak without xconv (0 < f <= 1)."""

    bytes: int | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        if (self.bytes is None) == (self.fraction is None):
            raise OptionError("mem_budget", None, f"a Budget is either bytes or a fraction; {BUDGET_HINT}")
        if self.bytes is not None:
            parse_size(self.bytes, option="mem_budget", hint=BUDGET_HINT)
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise OptionError("mem_budget", f"{100 * self.fraction:g}%", _percent_hint(self.fraction))

    @staticmethod
    def parse(value: str | int | Budget, *, option: str = "mem_budget") -> Budget:
        """A budget from bytes, a size or a percentage. Raises `OptionError`, naming `option`, when it is neither."""
        if isinstance(value, Budget):
            return value
        percent = _PERCENT.fullmatch(value) if isinstance(value, str) else None
        bare = re.fullmatch(rf"\s*({_NUMBER})\s*", value) if isinstance(value, str) else None
        if bare and 0 < (number := Decimal(bare[1])) <= 100:
            share = f"{(100 * number if number < 1 else number).normalize():f}%"
            raise OptionError(option, value, f"so few bytes hold nothing; write '{share}' for a share, or '8GB'")
        if percent is None:
            return Budget(bytes=parse_size(value, option=option, hint=BUDGET_HINT))
        fraction = float(percent[1]) / 100
        if not 0 < fraction <= 1:
            raise OptionError(option, value, _percent_hint(fraction))
        return Budget(fraction=fraction)

    def resolve(self, baseline_peak: int) -> int:
        """The budget in bytes, given the physical peak in bytes of the same step without xconv."""
        if self.bytes is not None:
            return self.bytes
        assert self.fraction is not None
        return max(1, math.floor(self.fraction * baseline_peak))

    def resolve_for(self, plain_peak: int) -> int:
        """The budget in bytes, of a step whose peak, as audits see it, is so much without xconv."""
        return self.resolve(MemoryLimit.smallest_for(plain_peak).budget)

    def __str__(self) -> str:
        return format_size(self.bytes) if self.bytes is not None else f"{100 * (self.fraction or 0):g}%"


def _percent_hint(fraction: float) -> str:
    if fraction > 1:
        return (
            "the share of the peak without xconv cannot exceed 100%; write a smaller one such as '60%', or a size such "
            "as '8GB'"
        )
    return "nothing fits in that share of the peak; write more than 0% such as '60%', or a size such as '8GB'"


# One part in so many of a budget is left free for the few scalars and small temporaries that no audit sees.
UNSEEN = 1000


@dataclass(frozen=True)
class MemoryLimit:
    """What an audited peak may be under a `budget`, of which a part is kept in `reserve` for others; in bytes."""

    budget: int
    reserve: int = 0

    @property
    def usable(self) -> int:
        """The highest peak that is allowed."""
        return self.budget - self.reserve - self.unseen

    @property
    def unseen(self) -> int:
        """What is left free for what audits do not see."""
        return self.budget // UNSEEN

    def allows(self, peak: int) -> bool:
        """Whether a step may have this peak."""
        return peak <= self.usable

    @staticmethod
    def smallest_for(peak: int, reserve: int = 0) -> MemoryLimit:
        """The limit of the smallest budget under which a step may have this peak."""
        found = MemoryLimit((peak + reserve) * UNSEEN // (UNSEEN - 1), reserve)
        return found if found.allows(peak) else MemoryLimit(found.budget + 1, reserve)
