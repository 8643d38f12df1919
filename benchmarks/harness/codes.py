"""Tensors through the codecs, there and back, and what of the codecs' parameters fits a payload."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from xconv_fx.codec_spec import CodecSpec
from xconv_fx.ops import SavedAs, codec_of
from xconv_fx.ops.sketched_layers import sample_order
from xconv_fx.planner.probe_ladder import SUM_BITS

# Of float32, in the tables.
COMPRESSIONS = (16, 32, 64)
# The most first.
QUANTIZE_BITS = (4, 2, 1)


def blank(x: Tensor, name: str) -> SavedAs:
    """The tensor held by a codec, whose parameters are still to be given."""
    return SavedAs(CodecSpec(name), tuple(x.shape), x.dtype, sample_order(x))


def bytes_of(held: SavedAs) -> int:
    return codec_of(held.spec.codec).payload_bytes(held)


def through(x: Tensor, held: SavedAs) -> Tensor:
    """A draw of what comes back, by the codec's eager reference."""
    row, seed = codec_of(held.spec.codec), torch.randint(2**62, (1,))
    return row.decode(row.encode(x, seed, held), seed, held)


def folds(x: Tensor, payload: int, unit: int, means: Sequence[bool] = (True, False)) -> list[SavedAs]:
    """For all bits, with and without means: the most probes, a multiple of `unit`, that fit the payload."""
    counts = range(unit, math.prod(x.shape[1:]) + 1, unit)
    found = []
    for bits, mean in itertools.product(SUM_BITS, means):
        held = blank(x, "probe").varied(kind="fold", bits=bits, means=mean)
        fitting = (held.varied(probes=probes) for probes in reversed(counts))
        found += list(itertools.islice((candidate for candidate in fitting if bytes_of(candidate) <= payload), 1))
    return found


def quantizers(x: Tensor) -> list[SavedAs]:
    return [blank(x, "quantize").varied(bits=bits) for bits in QUANTIZE_BITS]


def described(held: SavedAs) -> str:
    """The parameters of a fold, in words."""
    fold = math.prod(held.size[1:]) / (held.spec.probes or 1)
    return f"{fold:.1f}-fold {held.spec.bits} bits{' means' * bool(held.spec.means)}"
