"""How the elements of a tensor are arranged inside a payload.

A codec reads a tensor in the order in which it lies in memory, so that neither encoding nor decoding ever copies it to
another layout. `order` lists the logical dimensions from the outermost in memory to the innermost: (0, 2, 3, 1) for
channels-last images, (0, 1, 2, 3, 4) for contiguous volumes. "Physical" below means: permuted by `order`.

Three arrangements, all with one aim, that the innermost loop runs over contiguous elements and that every division
in an index depends on outer loop variables only. That keeps generated loops vectorised, and lets a decode be inlined
into the loop of whatever reads it.

* `Packing`: elements that share an int32 word are neighbours along *rows*, not along the innermost dimension: word
  row m holds rows m p .. m p + p - 1, p elements a word.
* `group_extents`: the boxes of about 256 contiguous elements that share a quantisation range.
* `Folding`: element g r + j of a sample belongs to probe j; fast when r is a whole number of outer rows.

Known gaps: sizes are static integers. A long innermost dimension without a divisor near 256 (a prime number of
features) still works, but the loops over it are not vectorised.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WORD_BITS = 32
WORD_BYTES = 4
GROUP = 256
CODE_BITS = (16, 8, 4, 2, 1)
UNROLLED_TERMS = 8
# Random numbers that an eager codec makes at a time.
BLOCK = 2**19

# Rows from so many elements on are worth vector instructions.
LANES = 16
_SHORTEST_ROW = 64
_ALLOWED_PADDING = (1 / 8, 1 / 2)
_FOLD_SLACK = 0.9


def check_order(size: Sequence[int], order: Sequence[int]) -> None:
    """Raises `ValueError` unless `order` is a permutation of the dimensions of a codable `size`."""
    if sorted(order) != list(range(len(size))):
        raise ValueError(f"order={tuple(order)}: must be a permutation of the {len(size)} dimensions of {tuple(size)}")
    if not size or math.prod(size) == 0:
        raise ValueError(f"size={tuple(size)}: a codec needs at least one dimension and one element")


def check_bits(bits: int) -> None:
    """Raises `ValueError` unless `bits` is a code width."""
    if bits not in CODE_BITS:
        raise ValueError(f"bits={bits}: must be one of {', '.join(map(str, CODE_BITS))}")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What a codec computes in: float64 for float64, else float32. Raises `ValueError` when `dtype` is not real."""
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype}: must be a floating-point type")
    return torch.float64 if dtype == torch.float64 else torch.float32


def physical_size(size: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Extents from the outermost dimension in memory to the innermost. Symbolic sizes are pinned to their values."""
    return tuple(int(size[dim]) for dim in order)


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """The permutation that takes a physical tensor back to its logical dimensions."""
    positions = [0] * len(order)
    for position, dim in enumerate(order):
        positions[dim] = position
    return tuple(positions)


def dense_strides(size: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a tensor without gaps whose dimensions lie in memory as `order` says."""
    strides = [0] * len(size)
    step = 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(size[dim], 1)
    return tuple(strides)


def order_of(size: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """The `order` in which a tensor lies in memory. Dimensions of extent 1 stay where the logical order has them."""
    long = sorted((dim for dim in range(len(size)) if size[dim] > 1), key=lambda dim: -strides[dim])
    following = iter(long)
    return tuple(next(following) if size[dim] > 1 else dim for dim in range(len(size)))


def dense_order(size: Sequence[int], strides: Sequence[int]) -> tuple[int, ...] | None:
    """The `order` in which a tensor without gaps lies in memory; None for one that has gaps, or overlaps itself."""
    order = order_of(size, strides)
    dense = dense_strides(size, order)
    return order if all(size[dim] == 1 or strides[dim] == dense[dim] for dim in range(len(size))) else None


def to_physical(x: Tensor, order: Sequence[int]) -> Tensor:
    """`x` permuted so that its last dimension is the innermost in memory. A view."""
    return x.permute(tuple(order))


def to_logical(x: Tensor, order: Sequence[int]) -> Tensor:
    """Inverse of `to_physical`; of a contiguous tensor it has strides dense in `order`."""
    return x.contiguous().permute(inverse(order))


@dataclass(frozen=True)
class Packing:
    """Codes of `bits` bits in int32 words of shape `words`.

    The first `split` physical dimensions form `rows` rows; the others, `inner`, stay as they are. Code number b of
    word row m belongs to row m * per_word + b; codes past the last row are those of the last row's values.
    """

    physical: tuple[int, ...]
    split: int
    bits: int

    @property
    def per_word(self) -> int:
        return WORD_BITS // self.bits

    @property
    def rows(self) -> int:
        return math.prod(self.physical[: self.split])

    @property
    def inner(self) -> tuple[int, ...]:
        return self.physical[self.split :]

    @property
    def words(self) -> tuple[int, ...]:
        return (-(-self.rows // self.per_word), *self.inner)

    @property
    def padded_rows(self) -> int:
        return self.words[0] * self.per_word

    @property
    def word_bytes(self) -> int:
        return WORD_BYTES * math.prod(self.words)

    @property
    def padding(self) -> float:
        """Unused codes for each used one."""
        return self.padded_rows / self.rows - 1


@functools.lru_cache(maxsize=4096)
def _packing(physical: tuple[int, ...], bits: int) -> Packing:
    candidates = [Packing(physical, split, bits) for split in range(len(physical), 0, -1)]
    for allowed in _ALLOWED_PADDING:
        for candidate in candidates:
            if math.prod(candidate.inner) >= _SHORTEST_ROW and candidate.padding <= allowed:
                return candidate
    return min(candidates, key=lambda candidate: candidate.padding)


def packing(size: Sequence[int], order: Sequence[int], bits: int) -> Packing:
    """The shortest rows that are long enough for vector instructions and whose last word row is well filled.

    Short rows keep the rows that share a word close together in memory. Where no split gives such rows (small
    tensors) the one with the least padding is taken.
    """
    return _packing(physical_size(size, order), bits)


def to_rows(physical: Tensor, plan: Packing) -> Tensor:
    """A physical tensor as (padded_rows, *inner). The last row is repeated to fill its word."""
    rows = physical.reshape(plan.rows, *plan.inner)
    if plan.padded_rows == plan.rows:
        return rows
    picks = torch.arange(plan.padded_rows, device=physical.device).clamp(max=plan.rows - 1)
    return rows.index_select(0, picks)


def pack(rows: Tensor, plan: Packing) -> Tensor:
    """int32 words from codes in 0 .. 2**bits - 1 of shape (padded_rows, *inner); see `to_rows`."""
    columns = rows.reshape(plan.words[0], plan.per_word, *plan.inner)
    words = torch.zeros(plan.words, dtype=torch.int32, device=rows.device)
    for position in range(plan.per_word):
        words |= columns[:, position].to(torch.int32) << (position * plan.bits)
    return words


def unpack(words: Tensor, plan: Packing, dtype: torch.dtype = torch.int32) -> Tensor:
    """Inverse of `pack`: a contiguous physical tensor."""
    mask = (1 << plan.bits) - 1
    columns = words.new_empty(plan.words[0], plan.per_word, *plan.inner, dtype=dtype)
    for position in range(plan.per_word):
        columns[:, position] = (words >> (position * plan.bits)) & mask
    return columns.flatten(0, 1)[: plan.rows].reshape(plan.physical)


@functools.lru_cache(maxsize=4096)
def group_extents(physical: tuple[int, ...], apart: bool = False) -> tuple[int, ...]:
    """Extents of the boxes that share a quantisation range, one per physical dimension, about `GROUP` elements each.

    A box is a contiguous run: whole inner dimensions, a part of one dimension, 1 in those further out. Parts divide
    their dimension exactly where it has a fitting divisor, and are of equal length up to rounding otherwise. With
    `apart`, none spans two samples (the outermost dimension).
    """
    if apart:
        return (1, *group_extents(physical[1:]))
    extents = [1] * len(physical)
    room = GROUP
    for dim in reversed(range(len(physical))):
        extent = physical[dim]
        if extent * math.prod(extents) <= room * 3 // 2:
            extents[dim] = extent
            continue
        target = max(1, room // math.prod(extents))
        extents[dim] = _part(extent, target)
        break
    return tuple(extents)


def _part(extent: int, target: int) -> int:
    divisors = [part for part in range(max(1, target // 2), 2 * target + 1) if extent % part == 0]
    if divisors:
        return min(divisors, key=lambda part: abs(math.log(part / target)))
    return -(-extent // max(1, round(extent / target)))


def group_counts(physical: tuple[int, ...], apart: bool = False) -> tuple[int, ...]:
    """How many groups there are along each physical dimension."""
    return tuple(-(-extent // part) for extent, part in zip(physical, group_extents(physical, apart), strict=True))


@dataclass(frozen=True)
class Folding:
    """Sample elements 0 .. length - 1 (physical order) folded into `probes` sums of at most `terms` elements.

    Element p belongs to sum p % probes as its term p // probes. `split` is the number of leading physical dimensions
    (the samples included) that are cut into `rows`-row pieces; the others, `block`, are never divided.
    """

    physical: tuple[int, ...]
    probes: int
    split: int

    @property
    def samples(self) -> int:
        return self.physical[0]

    @property
    def length(self) -> int:
        return math.prod(self.physical[1:])

    @property
    def block(self) -> tuple[int, ...]:
        return self.physical[self.split :]

    @property
    def rows(self) -> int:
        return self.probes // math.prod(self.block)

    @property
    def terms(self) -> int:
        return -(-self.length // self.probes)

    @property
    def batches(self) -> int:
        """Runs of `UNROLLED_TERMS` terms; terms of a run take their signs from different bits of one hash."""
        return -(-self.terms // UNROLLED_TERMS)

    @property
    def full(self) -> int:
        """How many of the sums have `terms` terms; the others have one less."""
        return self.length - (self.terms - 1) * self.probes


def folding(size: Sequence[int], order: Sequence[int], probes: int) -> Folding:
    """How `probes` sums a sample are formed. Raises `ValueError` on a number of probes that cannot be.

    The samples (dimension 0) must be outermost in memory.
    """
    physical = physical_size(size, order)
    if order[0] != 0 or len(size) < 2:
        raise ValueError(f"order={tuple(order)}: folding needs two dimensions or more, the samples (0) outermost")
    length = math.prod(physical[1:])
    if not 1 <= probes <= length:
        raise ValueError(f"probes={probes}: must be in 1 .. {length}, the elements of one sample of {tuple(size)}")
    splits = (split for split in range(1, len(physical) + 1) if probes % math.prod(physical[split:]) == 0)
    return Folding(physical, probes, next(splits))


def fitting_probes(size: Sequence[int], order: Sequence[int], limit: int) -> int:
    """The largest number of sums a sample up to `limit`, in whole outer rows as long as these reach nine tenths of it.

    At most all elements of a sample.
    """
    if limit < 1:
        raise ValueError(f"limit={limit}: must be 1 or more")
    physical = physical_size(size, order)
    limit = min(limit, math.prod(physical[1:]))
    blocks = (math.prod(physical[split:]) for split in range(1, len(physical)))
    return next((limit // b * b for b in blocks if limit // b * b >= _FOLD_SLACK * limit), limit)
