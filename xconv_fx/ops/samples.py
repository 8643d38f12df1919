"""Codes of another width for each sample of a batch: 1, 2, 4 or 8 bits, so many on average, with the least noise.

ActNN (Chen et al., ICML 2021, section 4.2) shares bits out among the samples as well as the layers. Rounding a sample's
values to b bits adds a variance to the weight gradient of about R^2 |dy|^2 / (2^b - 1)^2, with R the ranges of its
groups and dy the gradient of the layer's result. R is known when codes are made. dy is not: it is taken from when a
sample was last seen, where the user keeps `xconv_fx.SampleGradients`, and else left out.

The widths are found in every step, but the bits of a batch add up to the same number, so that shapes are static and the
compiled graph serves every step. A *unit* is the memory of one bit for every element of a sample; a sample of b bits
has b of them, in which its codes lie packed as in `layout.Packing`. Samples are outermost in memory, and groups do not
span two of them.

Besides its own gradient, a part of the batch's mean counts for every sample. What was noted is old: a twentieth is best
in a network trained on digits, in whose later epochs it leaves a third to a half of the variance (the gradient of the
step itself, were it known, would leave a twentieth). Batch normalisation gives each sample's values a part in the
gradients of all: there, it is a half. Without that, samples of small gradients were coded so coarsely that the variance
grew. benchmarks/sample_bits.py measures both.

Known gaps: bits that pay for no sample's next width are left over, fewer than four a batch. Gradients are those of the
network's results, the same for every layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import layout, quantize, sample_gradients
from .bit_shares import COSTS, GAINS, LEAST_WEIGHT, MIXED, STALE, WIDTHS, shares
from .counter_rng import check_countable

# Averages that leave something to share out.
AVERAGES = (2, 4)
# Elements that a sample's last words may leave unused, relative to all.
_ALLOWED_PADDING = 1 / 16


def rows_of(size: Sequence[int], order: Sequence[int]) -> layout.Packing:
    """How one sample is cut into rows, 32 of which make a word row of every unit."""
    physical = layout.physical_size(size, order)[1:]
    splits = [layout.Packing(physical, split, 1) for split in range(len(physical), 0, -1)]
    tight = [plan for plan in splits if plan.padding <= _ALLOWED_PADDING and math.prod(plan.inner) >= layout.LANES]
    return tight[0] if tight else min(splits, key=lambda plan: plan.padding)


def shareable(size: Sequence[int], order: Sequence[int], bits: int) -> bool:
    """Whether bits can be shared out: samples outermost and several, and hardly larger than their padding."""
    if bits not in AVERAGES or len(size) < 2 or order[0] != 0 or size[0] < 2:
        return False
    return rows_of(size, order).padding <= _ALLOWED_PADDING


def payload_bytes(size: Sequence[int], order: Sequence[int], bits: int, dtype: torch.dtype) -> int:
    """Bytes of codes, ranges and widths of a tensor of `size` and `dtype`, in `bits` bits on average."""
    ranges = 2 * math.prod(_group_counts(size, order)) * dtype.itemsize
    return size[0] * bits * rows_of(size, order).word_bytes + ranges + 2 * 4 * size[0]


def counts(size: Sequence[int], order: Sequence[int]) -> int:
    """How many numbers the kernels count in an int32: padded rows, draws for pairs of them, bits of a column."""
    plan = rows_of(size, order)
    rows = int(size[0]) * plan.padded_rows
    return max(rows, rows // 2 * math.prod(plan.inner), plan.padded_rows * WIDTHS[-1])


@torch.library.custom_op(
    "xconv::group_ranges",
    mutates_args=(),
    schema="(Tensor x, int[] order) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)
def group_ranges(x: Tensor, order: Sequence[int]) -> Tensor:
    """The least and greatest value of each group of `x`, in its dtype: (2, samples, *groups of a sample)."""
    layout.check_order(x.shape, order)
    physical = layout.to_physical(x, order)
    return quantize.extremes(physical, layout.group_extents(tuple(physical.shape), apart=True))


@group_ranges.register_fake
def _(x: Tensor, order: Sequence[int]) -> Tensor:
    return x.new_empty(2, *_group_counts(x.shape, order))


@torch.library.custom_op("xconv::share_bits", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def share_bits(ranges: Tensor, bits: int, mixed: bool) -> tuple[Tensor, Tensor]:
    """The widths of least noise for the samples of `ranges` (2, samples, *groups), `bits` on average.

    Reads the gradients that were noted of the samples (`xconv_fx.SampleGradients`), which makes it impure. `mixed` says
    that the network mixes samples, so that those without a gradient count as well.

    Returns int32 (2, samples), the widths and the number of the first unit of each sample, and (3, samples * bits):
    for every unit its sample, that one's width, and which of its units this is. Units that are left over, whose words
    are zeros, come after those of the first sample.
    """
    low, high = ranges.flatten(2).float()
    weights = (high - low).square().sum(1)
    noted = sample_gradients.weights(len(weights), weights.device)
    if noted is not None:
        weights = weights * (noted + noted.mean() * (MIXED if mixed else STALE))
    widths = least_noise(weights, bits)
    first = widths.cumsum(0) - widths
    unit = torch.arange(len(widths) * bits, device=widths.device)
    sample = torch.searchsorted(first, unit, right=True) - 1
    sample = sample.masked_fill(unit >= widths.sum(), 0)
    units = torch.stack((sample, widths[sample], unit - first[sample]))
    return torch.stack((widths, first)).int(), units.int()


@share_bits.register_fake
def _(ranges: Tensor, bits: int, mixed: bool) -> tuple[Tensor, Tensor]:
    samples = ranges.shape[1]
    return ranges.new_empty(2, samples, dtype=torch.int32), ranges.new_empty(3, samples * bits, dtype=torch.int32)


def least_noise(weights: Tensor, average: int) -> Tensor:
    """Widths (int64, of `WIDTHS`) for samples with these weights that minimise the sum of w / (2^b - 1)^2.

    At most `average` bits on average. The next bits go where they take most noise away for each of them, which is the
    best there is but for the last few, which pay for smaller steps. Weights that are not finite count as the largest
    finite one.
    """
    weights = weights.double().nan_to_num(nan=math.inf, posinf=math.inf)
    weights = weights.clamp(max=weights.masked_fill(weights.isinf(), 0).amax())
    costs = weights.new_tensor(COSTS)
    # Steps by samples: among equals, all samples take a step before one takes two.
    worth = weights.new_tensor(GAINS)[:, None] * weights.clamp(min=LEAST_WEIGHT)
    order = worth.flatten().argsort(descending=True, stable=True)
    taken = costs.repeat_interleave(len(weights))[order]
    given = torch.zeros_like(taken)
    given[order] = taken * (taken.cumsum(0) <= (average - WIDTHS[0]) * len(weights))
    widths = (WIDTHS[0] + given.view(len(costs), -1).sum(0)).long()
    for width, cost in zip(WIDTHS, COSTS, strict=False):
        widths = _widened(widths, width, cost, worth[0], average)
    return widths


def _widened(widths: Tensor, width: int, cost: int, worth: Tensor, average: int) -> Tensor:
    """With the next width for as many samples of this one as the bits that are left over pay for."""
    left = average * len(widths) - widths.sum()
    order = worth.masked_fill(widths != width, -1).argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return widths + cost * ((widths == width) & ((rank + 1) * cost <= left))


@torch.library.custom_op(
    "xconv::quantize_samples",
    mutates_args=(),
    schema="(Tensor x, Tensor ranges, Tensor units, Tensor seed, int bits, int[] order) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)
def quantize_samples(x: Tensor, ranges: Tensor, units: Tensor, seed: Tensor, bits: int, order: Sequence[int]) -> Tensor:
    """Codes of a floating-point `x`, `bits` bits on average: int32 (samples * bits * word rows of a unit, *inner).

    `ranges` and `units` are those of `group_ranges` and `share_bits`; `seed` is int64 with one element.
    """
    check_countable(x.shape, counts(x.shape, order))
    plan, physical = rows_of(x.shape, order), layout.to_physical(x, order)
    parts = layout.group_extents(tuple(physical.shape), apart=True)
    words = x.new_zeros(_words(x.shape, bits, plan), dtype=torch.int32)
    for sample, width, first in _first_units(units):
        codes = quantize.positions(physical[sample, None], ranges[:, sample, None], parts, width)
        rows = layout.to_rows(codes.view(plan.physical), plan).contiguous()
        rows = quantize.cut_off(rows, plan, width, seed, sample * plan.padded_rows)
        part = _of_width(plan, width)
        words.narrow(0, first * plan.words[0], part.words[0]).copy_(layout.pack(rows, part))
    return words


@quantize_samples.register_fake
def _(x: Tensor, ranges: Tensor, units: Tensor, seed: Tensor, bits: int, order: Sequence[int]) -> Tensor:
    layout.accumulator(x.dtype)
    check_countable(x.shape, counts(x.shape, order))
    return x.new_empty(_words(x.shape, bits, rows_of(x.shape, order)), dtype=torch.int32)


@torch.library.custom_op(
    "xconv::dequantize_samples",
    mutates_args=(),
    schema="(Tensor codes, Tensor ranges, Tensor widths, int[] size, int[] order, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)
def dequantize_samples(
    codes: Tensor, ranges: Tensor, widths: Tensor, size: Sequence[int], order: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The tensor of shape `size` and type `dtype` that `quantize_samples` encoded, with strides dense in `order`.

    `widths` are those of `share_bits`.
    """
    plan, physical = rows_of(size, order), layout.physical_size(size, order)
    parts = layout.group_extents(physical, apart=True)
    decoded = ranges.new_empty(physical, dtype=dtype)
    for sample, (width, first) in enumerate(widths.t().tolist()):
        part = _of_width(plan, width)
        words = codes.narrow(0, first * plan.words[0], part.words[0])
        rows = layout.unpack(words, part, layout.accumulator(dtype))[: plan.rows].reshape(1, *plan.physical)
        decoded[sample] = quantize.levels(rows, ranges[:, sample, None], parts, width)[0].to(dtype)
    return layout.to_logical(decoded, order)


@dequantize_samples.register_fake
def _(
    codes: Tensor, ranges: Tensor, widths: Tensor, size: Sequence[int], order: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return ranges.new_empty_strided(tuple(size), layout.dense_strides(size, order), dtype=dtype)


def encode(x: Tensor, seed: Tensor, bits: int, order: Sequence[int], mixed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, ranges and widths: what is held of `x`. `mixed` as in `share_bits`.

    On a device that launches every operation, the widths are found by loops of the graph (`bit_shares`).
    """
    ranges = torch.ops.xconv.group_ranges(x, order)
    if x.device.type == "cpu":
        widths, units = torch.ops.xconv.share_bits(ranges, bits, mixed)
    else:
        widths, units = shares(ranges, torch.ops.xconv.noted_gradients(x.shape[0], x.device), bits, mixed)
    return torch.ops.xconv.quantize_samples(x, ranges, units, seed, bits, order), ranges, widths


def _group_counts(size: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    return layout.group_counts(layout.physical_size(size, order), apart=True)


def _words(size: Sequence[int], bits: int, plan: layout.Packing) -> tuple[int, ...]:
    return (int(size[0]) * bits * plan.words[0], *plan.inner)


def _of_width(plan: layout.Packing, width: int) -> layout.Packing:
    """The codes of all padded rows of a sample, in `width` bits."""
    return layout.Packing((plan.padded_rows, *plan.inner), 1, width)


def _first_units(units: Tensor) -> Iterator[tuple[int, int, int]]:
    """Every sample, its width, and the number of its first unit."""
    for number, (sample, width, within) in enumerate(units.t().tolist()):
        if within == 0:
            yield sample, width, number
