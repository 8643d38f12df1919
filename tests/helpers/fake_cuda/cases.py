"""The cases of tests and of the study: every codec, in 2D, 3D and with 128 channels, in float32 and bfloat16."""

from __future__ import annotations

import itertools

from xconv_fx.codec_spec import CodecSpec

from .records import Case
from .units import Unit

_QUANTIZE = [CodecSpec("quantize", bits=bits) for bits in (8, 4, 2, 1)]
_FIXED = [CodecSpec("fixed", bits=bits) for bits in (8, 4, 2)]
_FOLDS = [CodecSpec("probe", kind="fold", bits=bits, means=means) for bits in (4, 2) for means in (True, False)]
_FLOAT_FOLDS = [CodecSpec("probe", kind="fold", means=means) for means in (True, False)]
_DENSE = [CodecSpec("probe", kind=kind) for kind in ("gaussian", "rademacher", "orthogonal", "independent")]
CODECS = (CodecSpec("bitmask"), *_QUANTIZE, *_FIXED, *_FOLDS, *_FLOAT_FOLDS, *_DENSE)
# Networks in which fixed point finds a normalisation, and what else each is for.
NETS = ("2d", "3d", "128")
DTYPES = (None, "bfloat16")


def forced(net: str, spec: CodecSpec, amp: str | None = None, **more: object) -> Case:
    """A network with everything held in one way that can be."""
    allowed = f"{spec.codec}:{spec.kind}" if spec.codec == "probe" else spec.codec
    allowed += f":{spec.bits}" if spec.codec in ("quantize", "fixed") else ""
    return Case(net, (("codecs", allowed),), spec, amp, **more)  # type: ignore[arg-type]


MATRIX = [forced(net, spec, amp) for net, spec, amp in itertools.product(NETS, CODECS, DTYPES)]
# One case of each kind of code, for every run of the tests.
CHOSEN = [
    forced("2d", CodecSpec("bitmask")),
    forced("2d", CodecSpec("quantize", bits=4)),
    forced("2d", CodecSpec("probe", kind="gaussian")),
    forced("3d", CodecSpec("fixed", bits=4)),
    forced("3d", CodecSpec("quantize", bits=2), "bfloat16"),
    forced("128", CodecSpec("probe", kind="fold", bits=4, means=True), "bfloat16"),
]
_IMAGES, _VOLUMES = ((2, 16, 17, 19), (0, 2, 3, 1)), ((2, 3, 5, 6, 70), (0, 1, 2, 3, 4))
UNITS = [
    *(Unit("quantize", *_IMAGES, bits) for bits in (16, 8, 4, 2, 1)),
    Unit("quantize", *_IMAGES, 4, "bfloat16"),
    Unit("quantize", *_VOLUMES, 2),
    Unit("quantize", (3, 1009), (0, 1), 8),
    Unit("fold", *_VOLUMES, 350),
    Unit("mask", *_IMAGES),
    Unit("mask", (3, 5, 7, 9), (0, 1, 2, 3)),
]
# Groups of a part of a row, of several rows, and of rows that fill their last word in part.
ENCODED = [
    Unit("encode", (2, 16, 16, 16), (0, 1, 2, 3), 4),
    Unit("encode", (2, 3, 16, 16), (0, 1, 2, 3), 4),
    Unit("encode", (2, 16, 17, 16), (0, 2, 3, 1), 1, "bfloat16"),
    Unit("encode", (4, 8, 8, 8), (0, 1, 2, 3), 2),
    Unit("encode", (1, 3, 16, 16, 16), (0, 1, 2, 3, 4), 8),
]
