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
    """What a source must be held as: in a way that is one of the `kinds`, or by one of the `specs`."""

    kinds: frozenset[StorageKind] = frozenset()
    specs: frozenset[CodecSpec] = frozenset()


KEPT = Requirement(frozenset({StorageKind.KEPT}))
# Kept, or in codes: whatever else is held otherwise, the backward does not run for it.
HELD = Requirement(KEPT.kinds | {StorageKind.CODED})
# Kept, or one recomputation of kept values away: one convolution is run again at a time, never a whole forward.
NEAR = Requirement(KEPT.kinds | {StorageKind.RECOMPUTED_ELEMENTWISE})
# Kept, or recomputed exactly.
EXACT_VALUES = Requirement(NEAR.kinds | {StorageKind.RECOMPUTED_CONVOLUTION})
