"""What a drop-in layer holds of its input between forward and backward: the settings, checked, and how they read.

They are the settings of the compiler's codecs "probe" and "quantize", and of the ops in `ops/sketched_layers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xconv_fx.codec_spec import CodecSpec
from xconv_fx.errors import OptionError, join_clauses, nearest
from xconv_fx.options import Probes
from xconv_fx.options.codecs import PROBE_KINDS

PLAIN_BITS = 32
BITS = (PLAIN_BITS, 16, 8, 4, 2, 1)


@dataclass(frozen=True)
class Sketch:
    """What is held of an input in its place, by the codec "probe" or "quantize"; of a plain layer it is "keep"."""

    spec: CodecSpec

    @staticmethod
    def of(probes: int | None = None, kind: str = "fold", bits: int = PLAIN_BITS, means: bool | None = None) -> Sketch:
        """What the four settings of a layer stand for.

        `probes` random sums of every sample of a `kind` of `PROBE_KINDS`, or with None the values themselves; each of
        them in `bits` bits, with 32 as it is. `means` (None: where the compiler would) holds the mean of every channel
        exactly, and sums the deviations from it. With neither `probes` nor `bits` below 32 the input itself is held.
        """
        width = None if bits == PLAIN_BITS else bits
        codec = "probe" if probes is not None else "keep" if width is None else "quantize"
        return Sketch(CodecSpec(codec, probes=probes, bits=width, kind=kind, means=means))

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
        return Sketch.of(count, kind, bits, means)

    @property
    def plain(self) -> bool:
        """Whether the input itself is held."""
        return self.spec.codec == "keep"

    @property
    def settings(self) -> tuple[int | None, str, int, bool | None]:
        """The settings `probes`, `kind`, `bits` and `means` of a layer."""
        return self.spec.probes, self.spec.kind or "fold", self.spec.bits or PLAIN_BITS, self.spec.means

    @property
    def recipe(self) -> tuple[int, str, int, bool | None]:
        """The arguments of the same names of the ops in `ops/sketched_layers.py`."""
        probes, kind, bits, means = self.settings
        return probes or 0, kind, bits, means

    def __str__(self) -> str:
        probes, kind, bits, _ = self.settings
        width = "" if bits == PLAIN_BITS else f"{bits} bit" + "s" * (bits > 1)
        if probes is None:
            return f"{width} an element" if width else "everything"
        kind = "" if kind == "fold" else f"{kind} "
        return f"{probes} {kind}probe" + "s" * (probes > 1) + (f" in {width}" if width else "")
