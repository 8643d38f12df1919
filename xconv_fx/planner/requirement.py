"""How a residual is held, as far as it matters to others that are recomputed from it, and what these ask for."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from xconv_fx.codec_spec import CodecSpec


class StorageKind(enum.Enum):
    """What is between forward and backward in the place of a residual.

    The tensor itself, a codec's payload, or nothing where the backward recomputes it: by elementwise operations of
    exact values, by its convolution, or by elementwise operations of codes, or of those that keep a sign.
    """

    KEPT = enum.auto()
    CODED = enum.auto()
    RECOMPUTED_ELEMENTWISE = enum.auto()
    RECOMPUTED_CONVOLUTION = enum.auto()
    RECOMPUTED_FROM_CODES = enum.auto()
    RECOMPUTED_FROM_SIGNED_CODES = enum.auto()


@dataclass(frozen=True)
class Requirement:
    """What a source must be held as: in a way that is one of the `kinds`, or by one of the `specs`.

    Made again it must be there from the step `by` on, or earlier (None: whenever).
    """

    kinds: frozenset[StorageKind] = frozenset()
    specs: frozenset[CodecSpec] = frozenset()
    by: int | None = None


# Kept, or recomputed exactly.
EXACT_VALUES = Requirement(
    frozenset({StorageKind.KEPT, StorageKind.RECOMPUTED_ELEMENTWISE, StorageKind.RECOMPUTED_CONVOLUTION})
)
