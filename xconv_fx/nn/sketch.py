"""What a drop-in layer holds of its input between forward and backward: the settings, checked, and how they read.

They are the settings of the compiler's codecs "probe" and "quantize", and of the ops in `ops/sketched_layers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xconv_fx.errors import OptionError, join_clauses, nearest
from xconv_fx.options import Probes
from xconv_fx.options.codecs import PROBE_KINDS

PLAIN_BITS = 32
BITS = (PLAIN_BITS, 16, 8, 4, 2, 1)


@dataclass(frozen=True)
class Sketch:
    """What is held of an input in its place.

    `probes` random sums of every sample of a `kind` of `PROBE_KINDS`, or with None the values themselves; each of them
    in `bits` bits, with 32 as it is. `means` (None: where the compiler would) holds the mean of every channel exactly,
    and sums the deviations from it. Without `probes` and below 32 bits the input itself is held: a plain layer.
    """

    probes: int | None = None
    kind: str = "fold"
    bits: int = PLAIN_BITS
    means: bool | None = None

    @staticmethod
    def parse(probes: Any = None, kind: Any = "fold", bits: Any = PLAIN_BITS, means: Any = None) -> Sketch:
        """Checked settings. Raises `OptionError` naming the setting, its value and what would work."""
        count = None if probes is None else Probes.parse(probes).count
        if probes is not None and count is None:
            raise OptionError("probes", probes, "a layer takes a number; patterns are for a model")
        if kind not in PROBE_KINDS:
            guess = nearest(kind, PROBE_KINDS) if isinstance(kind, str) else ""
            raise OptionError("kind", kind, join_clauses(guess, f"write one of {', '.join(PROBE_KINDS)}"))
        if isinstance(bits, bool) or bits not in BITS:
            raise OptionError("bits", bits, f"write one of {', '.join(map(str, BITS))}; {PLAIN_BITS} rounds nothing")
        if means is not None and not isinstance(means, bool):
            raise OptionError("means", means, "write True, False, or None for what the compiler does")
        return Sketch(count, kind, bits, means)

    @property
    def plain(self) -> bool:
        """Whether the input itself is held."""
        return self.probes is None and self.bits == PLAIN_BITS

    @property
    def recipe(self) -> tuple[int, str, int, bool | None]:
        """The arguments `probes`, `kind`, `bits` and `means` of the ops in `ops/sketched_layers.py`."""
        return self.probes or 0, self.kind, self.bits, self.means

    def __str__(self) -> str:
        width = "" if self.bits == PLAIN_BITS else f"{self.bits} bit" + "s" * (self.bits > 1)
        if self.probes is None:
            return f"{width} an element" if width else "everything"
        kind = "" if self.kind == "fold" else f"{self.kind} "
        return f"{self.probes} {kind}probe" + "s" * (self.probes > 1) + (f" in {width}" if width else "")
