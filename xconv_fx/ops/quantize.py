"""Floats held in 16, 8, 4, 2 or 1 bits, unbiased.

Each group of about 256 neighbours stores its smallest and its largest value; between them a value is rounded up or
down at random, with probabilities that make the mean right (Chen et al., "ActNN: reducing training memory footprint
via 2-bit activation compressed training", ICML 2021). The least and the greatest are elements of the tensor, so they
are stored without rounding in the tensor's own type, cover the group exactly, and cost 4 bytes a group for the 16-bit
floats; the step between codes is derived from them, in the same way by encoder and decoder. A constant group decodes
exactly. A group that has a NaN or an infinity decodes to NaN and infinities throughout: an overflow is never hidden.

The position of a value between two codes is cut off to 16 fractional bits (14 for 16-bit codes) and rounded with as
many random bits: the mean is right to 1/65536 (1/16384) of a step. Two elements share one hash, which is most of the
work.

Known gaps: the decoded value is rounded to nearest in the tensor's type, which for 16-bit floats can bias a decoded
value by half a unit in its last place. A group whose values span more than the largest float32 (float64 for
float64) decodes as if it had an infinity.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from scipy.special import ndtr, ndtri
from torch import Tensor

from . import layout, triton_words
from .codec import SavedAs
from .counter_rng import check_countable, random_halves
from .quantize_kernel import quantize_once, tiles_of

STREAM = 1

_SQRT_TAU = math.sqrt(2 * math.pi)
_QUADRATURE = 48


@torch.library.custom_op(
    "xconv::quantize",
    mutates_args=(),
    schema="(Tensor x, Tensor seed, int bits, int[] order) -> (Tensor, Tensor)",
    tags=(torch.Tag.flexible_layout,),
)
def quantize(x: Tensor, seed: Tensor, bits: int, order: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Codes and ranges of a floating-point `x`.

    Args:
        x: any shape. `seed`: int64, one element.
        bits: of each code; one of `layout.CODE_BITS`.
        order: dimensions from the outermost in memory to the innermost.

    Returns:
        int32 words (shape `layout.packing(size, order, bits).words`), and the least and greatest value of each group
        in x.dtype (shape (2, *layout.group_counts(physical size))).
    """
    plan = _plan(x, bits, order)
    tiles = tiles_of(plan, x.dtype) if triton_words.usable(x.device) else None
    if tiles is not None:
        return quantize_once(x, seed, tuple(order), tiles, STREAM, *fixed_point(bits))
    physical = layout.to_physical(x, order)
    ranges = extremes(physical, layout.group_extents(plan.physical))
    codes = positions(physical, ranges, layout.group_extents(plan.physical), bits)
    return layout.pack(cut_off(layout.to_rows(codes, plan).contiguous(), plan, bits, seed), plan), ranges


@quantize.register_fake
def _(x: Tensor, seed: Tensor, bits: int, order: Sequence[int]) -> tuple[Tensor, Tensor]:
    plan = _plan(x, bits, order)
    return x.new_empty(plan.words, dtype=torch.int32), x.new_empty(2, *layout.group_counts(plan.physical))


@torch.library.custom_op(
    "xconv::dequantize",
    mutates_args=(),
    schema="(Tensor codes, Tensor ranges, int[] size, int[] order, int bits, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)
def dequantize(
    codes: Tensor, ranges: Tensor, size: Sequence[int], order: Sequence[int], bits: int, dtype: torch.dtype
) -> Tensor:
    """The tensor of shape `size` and type `dtype` that `quantize` encoded, with strides dense in `order`."""
    plan = layout.packing(size, order, bits)
    wide = layout.accumulator(dtype)
    decoded = levels(layout.unpack(codes, plan, wide), ranges, layout.group_extents(plan.physical), bits)
    return layout.to_logical(decoded.to(dtype), order)


@dequantize.register_fake
def _(
    codes: Tensor, ranges: Tensor, size: Sequence[int], order: Sequence[int], bits: int, dtype: torch.dtype
) -> Tensor:
    return ranges.new_empty_strided(tuple(size), layout.dense_strides(size, order), dtype=dtype)


def fixed_point(bits: int) -> tuple[int, float]:
    """Fractional bits of a position between the levels before it is rounded, and the greatest position.

    A position is an integer with that many fractional bits, to which a random fraction is added before it is cut off.
    """
    fraction = min(16, 30 - bits)
    return fraction, float(((1 << bits) - 1) << fraction)


def step_of(bits: int) -> float:
    """The distance between codes in a group whose values span 1."""
    return 1 / ((1 << bits) - 1)


def positions(physical: Tensor, ranges: Tensor, parts: tuple[int, ...], bits: int) -> Tensor:
    """Where the values lie between the levels of their group, in fixed point: int32 of the shape of `physical`.

    `ranges` are the groups' extremes and `parts` the groups' extents.
    """
    wide = layout.accumulator(physical.dtype)
    values, low, high = _beside_ranges(physical, ranges, parts, wide)
    scale = (low.new_tensor(fixed_point(bits)[1]) / (high - low)).clamp(max=torch.finfo(wide).max)
    position = (values.to(wide) - low).mul_(scale)
    # NaN compares false: overflown groups get a code within bounds.
    return position.masked_fill_(~(position > 0), 0).to(torch.int32).view(physical.shape)


def cut_off(rows: Tensor, plan: layout.Packing, bits: int, seed: Tensor, first: int = 0) -> Tensor:
    """Codes from the positions of padded rows, in place: up or down at random.

    `first` is the number of the first row among all rows of a tensor, for the random numbers; it is even.
    """
    fraction, _ = fixed_point(bits)
    for some, draws in _draws(plan, seed, fraction, first // 2):
        rows[some] += draws
    # The scale is rounded: the greatest value may end up just above its code.
    return rows.bitwise_right_shift_(fraction).clamp_(max=(1 << bits) - 1)


def levels(codes: Tensor, ranges: Tensor, parts: tuple[int, ...], bits: int) -> Tensor:
    """The values that `codes`, a float tensor, stand for. Overwrites `codes`, which is physical and contiguous."""
    values, low, high = _beside_ranges(codes, ranges, parts, codes.dtype)
    return values.mul_((high - low) * step_of(bits)).add_(low).view(codes.shape)


def _draws(plan: layout.Packing, seed: Tensor, count: int, before: int) -> Iterator[tuple[slice, Tensor]]:
    """Random integers below 2**count for all padded rows, some rows at a time: the rows and (rows, *inner) draws.

    Rows 2i and 2i + 1 take the halves of 32 random bits; `before` pairs of rows come before these.
    """
    pairs, width = plan.padded_rows // 2, math.prod(plan.inner)
    step = max(1, layout.BLOCK // width)
    for first in range(0, pairs, step):
        last = min(first + step, pairs)
        start, end = ((before + pair) * width for pair in (first, last))
        index = torch.arange(start, end, dtype=torch.int32, device=seed.device)
        halves = random_halves(index.view(last - first, *plan.inner), count, seed, STREAM)
        yield slice(2 * first, 2 * last), torch.stack(halves, 1).flatten(0, 1)


def _plan(x: Tensor, bits: int, order: Sequence[int]) -> layout.Packing:
    layout.accumulator(x.dtype)
    layout.check_bits(bits)
    layout.check_order(x.shape, order)
    check_countable(x.shape, draws(x.shape, order, bits))
    return layout.packing(tuple(x.shape), order, bits)


def draws(size: Sequence[int], order: Sequence[int], bits: int) -> int:
    """How many random numbers the codes of a tensor of `size` take: one for two padded elements."""
    plan = layout.packing(size, order, bits)
    return plan.padded_rows // 2 * math.prod(plan.inner)


def extremes(physical: Tensor, parts: tuple[int, ...]) -> Tensor:
    """The least and the greatest value of each group of the extents `parts`: (2, *groups)."""
    low = high = physical
    for dim, (extent, part) in enumerate(zip(physical.shape, parts, strict=True)):
        if part == 1:
            continue
        count = -(-extent // part)
        if extent % part:
            # The last group of a dimension may be short: repeating its last element changes neither extreme.
            picks = torch.arange(part * count, device=physical.device).clamp(max=extent - 1)
            low, high = (side.index_select(dim, picks) for side in (low, high))
        low, high = (side.unflatten(dim, (count, part)) for side in (low, high))
        low, high = low.amin(dim + 1), high.amax(dim + 1)
    return torch.stack((low, high))


def _beside_ranges(
    values: Tensor, ranges: Tensor, parts: tuple[int, ...], wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """A view of the `values`, and the least and the greatest of each one's group, in shapes that broadcast."""
    low, high = ranges.to(wide)
    physical = tuple(values.shape)
    if all(extent % part == 0 for extent, part in zip(physical, parts, strict=True)):
        for dim in reversed(range(len(physical))):
            values = values.unflatten(dim, (-1, parts[dim]))
            low, high = low.unsqueeze(dim + 1), high.unsqueeze(dim + 1)
        return values, low, high
    for dim, (extent, part) in enumerate(zip(physical, parts, strict=True)):
        picks = torch.arange(extent, device=ranges.device) // part
        low, high = low.index_select(dim, picks), high.index_select(dim, picks)
    return values, low, high


@functools.lru_cache(maxsize=1024)
def normal_noise(bits: int, count: int) -> float:
    """E(decoded - x)^2 for groups of `count` independent standard normal values, coded in `bits` bits.

    A value between neighbouring levels a < e is moved with variance (x - a)(e - x). The two extremes of the group are
    exact; given them the others follow a truncated normal law. The mean over the extremes is taken on a grid of equal
    probability of their joint law (greatest first, then the least given the greatest), the inner integral in closed
    form.
    """
    if count < 3:
        return 0.0
    middle = (np.arange(_QUADRATURE) + 0.5) / _QUADRATURE
    high = ndtri(middle ** (1 / count))[:, None]
    low = ndtri(ndtr(high) * -np.expm1(np.log1p(-middle) / (count - 1)))
    edges = low[..., None] + (high - low)[..., None] * np.linspace(0, 1, 1 << min(bits, 8))
    variance = _rounding_energy(edges) / (ndtr(high) - ndtr(low))
    # Beyond 8 bits the density is flat within a step: the energy goes with the square of the step.
    finer = (((1 << min(bits, 8)) - 1) / ((1 << bits) - 1)) ** 2
    return float(variance.mean()) * (count - 2) / count * finer


def _rounding_energy(edges: np.ndarray) -> np.ndarray:
    """The integral of (x - a)(e - x) under the normal density, summed over the cells between consecutive `edges`."""
    left, right = edges[..., :-1], edges[..., 1:]
    mass = np.diff(ndtr(edges))
    density = np.exp(-(edges**2) / 2) / _SQRT_TAU
    first = -np.diff(density)
    second = mass - np.diff(edges * density)
    return ((left + right) * first - second - left * right * mass).sum(-1)


def group_noise(size: Sequence[int], order: Sequence[int], bits: int) -> float:
    """`normal_noise` over the groups of a tensor, the shorter groups at the end of a dimension included."""
    physical = layout.physical_size(size, order)
    shares = [(1, 1.0)]
    for extent, part in zip(physical, layout.group_extents(physical), strict=True):
        rest = extent % part
        shares = [
            (count * piece, share * weight)
            for count, share in shares
            for piece, weight in ((part, 1 - rest / extent), (rest, rest / extent))
            if weight
        ]
    return sum(share * normal_noise(bits, count) for count, share in shares)


def code_bytes(size: Sequence[int], order: Sequence[int], bits: int, dtype: torch.dtype) -> int:
    """Bytes of codes and ranges of a tensor of `size` and `dtype`."""
    plan = layout.packing(size, order, bits)
    return plan.word_bytes + 2 * math.prod(layout.group_counts(plan.physical)) * dtype.itemsize


def bits_of(held: SavedAs) -> int:
    """`held.spec.bits`. Raises `ValueError` when it is missing."""
    if held.spec.bits is None:
        raise ValueError(f"bits=None: codec {held.spec.codec!r} needs one of {', '.join(map(str, layout.CODE_BITS))}")
    layout.check_bits(held.spec.bits)
    return held.spec.bits
