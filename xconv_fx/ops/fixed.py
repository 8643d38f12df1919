"""The input of a normalisation layer in b-bit fixed point, the sign of the layer's result kept.

What a batch, group or instance norm is about to normalise has a known mean and deviation, so no pass looks for a range
and none is stored with the elements: a value is rounded down to one of 2**b bins of equal width around the mean and
decoded as the middle of its bin. The bins are aligned so that the border at which the layer's result
z = gamma (x - mean) / deviation + beta changes its sign lies between two of them. So one payload serves the
normalisation's backward, the mask of a ReLU behind it, and the weight gradient of the convolution behind that, whose
input is computed again from the decoded value (Chakrabarti & Moseley, "Backprop with approximate activations for
memory-efficient network training", NeurIPS 2019).

Two things differ from the paper. The sign is taken from the true result and holds without exception: where the border
is beyond the outermost bins (gamma near 0), one of them is set aside for what lies there. And the bins span 8, 6 or 4
deviations for 8, 4 or 2 bits instead of 6 throughout, so that few bits are spent where there is nothing, and many do
not drown in the error of what is cut off.

Rounding is deterministic: an error is small, but the mean of many is not zero. Gradients through this codec are close,
not unbiased.

Known gaps: values beyond the outermost bins are decoded as their middle; under a normalisation by running statistics
(evaluation) that can be many.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.special import ndtr
from torch import Tensor

from . import layout
from .codec import Codec, SavedAs, register

# Deviations that the bins span, by the bits of a code.
SPAN = {8: 8.0, 4: 6.0, 2: 4.0}
# Rows of a table of scales.
BORDER, ABOVE, BELOW, STEP = range(4)
FIELDS = 4

_FARTHEST = 2.0**20


def scales(mean: Tensor, deviation: Tensor, shift: Tensor | None, slope: Tensor | None, bits: int) -> Tensor:
    """The table that encoding and decoding read: (FIELDS, *shape of `mean`).

    Args:
        mean, deviation: of the values that share a normalisation, one for each channel, or sample and channel.
        shift: the layer's result for the mean, beta. None when no sign is to be kept.
        slope: how much larger it is for the mean plus the deviation, gamma. None with `shift`.
        bits: of a code; one of `SPAN`.

    Returns:
        BORDER: the lowest code above the border, where codes count from -2**(bits - 1). ABOVE, BELOW: what code 0 would
        decode to on that side of the border. STEP: the width of a bin, negative where the result falls with x.
    """
    step = (deviation * (SPAN[_checked(bits)] / (1 << bits))).clamp(min=torch.finfo(mean.dtype).tiny)
    if shift is None or slope is None:
        zero = torch.zeros_like(mean)
        return torch.stack((zero, mean + step / 2, mean + step / 2, step))
    outermost = (1 << (bits - 1)) - 1
    # In bins from the mean. A result that is the same for all values has its border infinitely far away.
    everywhere = torch.where(shift > 0, -_FARTHEST, _FARTHEST)
    place = torch.where(slope == 0, everywhere, -shift / slope * ((1 << bits) / SPAN[bits]))
    place = place.clamp(-_FARTHEST, _FARTHEST)
    border = place.round().clamp(-outermost, outermost)
    # Bins on the mean's side of a border that is out of reach lie as if there were none.
    above = torch.where(place < -outermost - 0.5, border, place)
    below = torch.where(place > outermost + 0.5, border, place)
    ends = [mean + (origin - border + 0.5) * step for origin in (above, below)]
    return torch.stack((border, *ends, torch.where(slope < 0, -step, step)))


@torch.library.custom_op(
    "xconv::fix",
    mutates_args=(),
    schema="(Tensor x, Tensor? positive, Tensor table, int bits, int[] order) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)
def fix(x: Tensor, positive: Tensor | None, table: Tensor, bits: int, order: Sequence[int]) -> Tensor:
    """Codes of a floating-point `x` (samples, channels, ...).

    Args:
        x: what a normalisation reads. `positive`: bool of its shape, whether the result is above zero; None when no
            sign is to be kept.
        table: `scales`, of shape (FIELDS, 1 or samples, channels), in `layout.accumulator(x.dtype)`.
        bits: of each code; one of `SPAN`.
        order: dimensions from the outermost in memory to the innermost.

    Returns:
        int32 words of shape `layout.packing(size, order, bits).words`.
    """
    layout.check_order(x.shape, order)
    plan = layout.packing(tuple(x.shape), order, _checked(bits))
    border, above, below, step = _spread(table, x.dim())
    half = 1 << (bits - 1)
    least, most, base = torch.full_like(border, -half), torch.full_like(border, half - 1), above
    if positive is not None:
        upper = positive == (step > 0)
        least, most = torch.where(upper, border, least), torch.where(upper, most, border - 1)
        base = torch.where(upper, above, below)
    code = ((x.to(table.dtype) - base) / step.abs() + 0.5).floor()
    code = torch.where(code > least, code, least)
    code = torch.where(code < most, code, most)
    # NaN compares false: what is not a number gets a code within bounds.
    code = torch.where(code > -half, code, -half) + half
    return layout.pack(layout.to_rows(layout.to_physical(code, order), plan), plan)


@fix.register_fake
def _(x: Tensor, positive: Tensor | None, table: Tensor, bits: int, order: Sequence[int]) -> Tensor:
    layout.check_order(x.shape, order)
    layout.accumulator(x.dtype)
    return x.new_empty(layout.packing(x.shape, order, _checked(bits)).words, dtype=torch.int32)


@torch.library.custom_op(
    "xconv::unfix",
    mutates_args=(),
    schema="(Tensor words, Tensor table, int[] size, int[] order, int bits, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)
def unfix(
    words: Tensor, table: Tensor, size: Sequence[int], order: Sequence[int], bits: int, dtype: torch.dtype
) -> Tensor:
    """The tensor of shape `size` and type `dtype` that `fix` encoded, with strides dense in `order`."""
    border, above, below, step = _spread(table, len(size))
    code = _codes(words, size, order, bits).to(table.dtype)
    decoded = torch.where(code >= border, above, below) + code * step.abs()
    return layout.to_logical(layout.to_physical(decoded.to(dtype), order), order)


@unfix.register_fake
def _(words: Tensor, table: Tensor, size: Sequence[int], order: Sequence[int], bits: int, dtype: torch.dtype) -> Tensor:
    return words.new_empty_strided(tuple(size), layout.dense_strides(size, order), dtype=dtype)


@torch.library.custom_op(
    "xconv::fixed_sign",
    mutates_args=(),
    schema="(Tensor words, Tensor table, int[] size, int[] order, int bits) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)
def fixed_sign(words: Tensor, table: Tensor, size: Sequence[int], order: Sequence[int], bits: int) -> Tensor:
    """`fix`'s argument `positive`, exactly: bool of shape `size`, with strides dense in `order`."""
    border, _, _, step = _spread(table, len(size))
    positive = (_codes(words, size, order, bits) >= border) == (step > 0)
    return layout.to_logical(layout.to_physical(positive, order), order)


@fixed_sign.register_fake
def _(words: Tensor, table: Tensor, size: Sequence[int], order: Sequence[int], bits: int) -> Tensor:
    return words.new_empty_strided(tuple(size), layout.dense_strides(size, order), dtype=torch.bool)


def _codes(words: Tensor, size: Sequence[int], order: Sequence[int], bits: int) -> Tensor:
    """Codes from -2**(bits - 1), in logical dimensions."""
    codes = layout.unpack(words, layout.packing(size, order, bits)) - (1 << (bits - 1))
    return codes.permute(layout.inverse(order))


def _spread(table: Tensor, rank: int) -> Tensor:
    """A table whose rows broadcast over tensors of `rank` dimensions."""
    return table.reshape(*table.shape, *(1,) * (rank - 2))


def _checked(bits: int) -> int:
    if bits not in SPAN:
        raise ValueError(f"bits={bits}: codec 'fixed' has {', '.join(map(str, SPAN))}")
    return bits


def bits_of(held: SavedAs) -> int:
    """`held.spec.bits`. Raises `ValueError` when it is none that the codec has."""
    return _checked(held.spec.bits or 0)


@functools.lru_cache(maxsize=8)
def normal_error(bits: int) -> float:
    """E(decoded - x)^2 for standard normal x and bins with an edge at its mean."""
    half = 1 << (_checked(bits) - 1)
    width = SPAN[bits] / (1 << bits)
    middle = (np.arange(-half, half) + 0.5) * width
    edges = np.concatenate(([-np.inf], np.arange(1 - half, half) * width, [np.inf]))
    density = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
    mass, first = np.diff(ndtr(edges)), -np.diff(density)
    second = mass - np.diff(np.where(np.isfinite(edges), edges, 0.0) * density)
    return float((second - 2 * middle * first + middle**2 * mass).sum())


def encode(x: Tensor, table: Tensor, held: SavedAs, positive: Tensor | None = None) -> tuple[Tensor, ...]:
    """The payload; see `fix`."""
    return (torch.ops.xconv.fix.default(x, positive, table, bits_of(held), list(held.order)),)


def _decode(payload: tuple[Tensor, ...], table: Tensor, held: SavedAs) -> Tensor:
    (words,) = payload
    return torch.ops.xconv.unfix.default(words, table, list(held.size), list(held.order), bits_of(held), held.dtype)


def sign(words: Tensor, table: Tensor, held: SavedAs) -> Tensor:
    """Whether the normalisation's result is above zero; see `fixed_sign`."""
    return torch.ops.xconv.fixed_sign.default(words, table, list(held.size), list(held.order), bits_of(held))


def _payload_bytes(held: SavedAs) -> int:
    return layout.packing(held.size, held.order, bits_of(held)).word_bytes


def _traffic(held: SavedAs) -> int:
    # Encoding reads x and the result whose sign is kept, decoding writes x.
    return 3 * math.prod(held.size) * held.dtype.itemsize + 2 * _payload_bytes(held)


FIXED = register(
    Codec(
        name="fixed",
        lossless=False,
        encode=encode,
        decode=_decode,
        payload_bytes=_payload_bytes,
        noise=lambda held: normal_error(bits_of(held)),
        traffic=_traffic,
    )
)
