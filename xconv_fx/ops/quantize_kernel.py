"""Quantisation on a GPU that reads a tensor once: ranges and codes in one Triton kernel of ours.

Generated loops find the ranges in one kernel and pack the codes in another, which reads everything again: a word's
elements lie in different rows, so that the two loops have nothing in common. Here a block of threads holds the rows of
whole words over the columns of whole groups: it finds the groups' ranges, rounds, packs, and writes both.

Codes and ranges are those of `quantize`, bit by bit: the division is rounded to nearest, as on a CPU.

Known gap: groups of several rows whose number does not divide evenly, or that are not whole runs of a row, and float64,
are left to the generated loops.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import layout
from .triton_words import launched_on, tl, triton

if triton is not None:
    from .triton_words import keyed_product, keys

# Elements that a block of threads holds at most.
_LARGEST = 2**14
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Tiles:
    """Rows of `width` elements, in tiles of `rows` rows and a group's columns: `run` rows by `columns` are a group."""

    plan: layout.Packing
    rows: int
    run: int
    columns: int

    @property
    def width(self) -> int:
        return math.prod(self.plan.inner)


def tiles_of(plan: layout.Packing, dtype: torch.dtype) -> Tiles | None:
    """How a tensor is cut for the kernel; None where it is not for it."""
    parts = layout.group_extents(plan.physical)
    run, columns = math.prod(parts[: plan.split]), math.prod(parts[plan.split :])
    rows = max(plan.per_word, run)
    even = all(extent % part == 0 for extent, part in zip(plan.physical, parts, strict=True))
    if dtype not in _DTYPES or not even or run & (run - 1) or rows * triton.next_power_of_2(columns) > _LARGEST:
        return None
    if run > 1 and (columns != math.prod(plan.inner) or plan.rows % rows):
        return None
    return Tiles(plan, rows, run, columns)


if triton is not None:

    @triton.jit
    def quantize_kernel(
        x, seed, words, ranges, rows, width, groups, STREAM: tl.constexpr, BITS: tl.constexpr, FRACTION: tl.constexpr,
        TOP: tl.constexpr, LARGEST: tl.constexpr, ROWS: tl.constexpr, RUN: tl.constexpr, COLUMNS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One tile: rows of `x` to `words` and to the least and greatest values of their groups in `ranges`."""
        PER_WORD: tl.constexpr = 32 // BITS
        tile, group = tl.program_id(0) // groups, tl.program_id(0) % groups
        row, column = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
        inside, at = (column < COLUMNS)[None, :], (group * COLUMNS + column)[None, :]
        start = tl.minimum(row, rows - 1).to(tl.int64)[:, None] * width
        value = tl.load(x + start + at, inside, other=0.0).to(tl.float32)

        low = tl.min(tl.where(inside, value, float("inf")), 1)
        high = tl.max(tl.where(inside, value, float("-inf")), 1)
        missing = tl.max((inside & (value != value)).to(tl.int32), 1)
        if RUN > 1:
            low = tl.min(tl.reshape(low, (ROWS // RUN, RUN)), 1)
            high = tl.max(tl.reshape(high, (ROWS // RUN, RUN)), 1)
            missing = tl.max(tl.reshape(missing, (ROWS // RUN, RUN)), 1)
        low = tl.where(missing > 0, float("nan"), low)
        high = tl.where(missing > 0, float("nan"), high)
        place = (tile * (ROWS // RUN) + tl.arange(0, ROWS // RUN)).to(tl.int64)
        kept = place < rows // RUN
        ends = ranges + place * groups + group
        tl.store(ends, low.to(ranges.dtype.element_ty), kept)
        tl.store(ends + (rows // RUN).to(tl.int64) * groups, high.to(ranges.dtype.element_ty), kept)

        top = tl.full((ROWS // RUN,), TOP, tl.float32)
        scale = tl.minimum(tl.div_rn(top, high - low), LARGEST)
        if RUN > 1:
            low = tl.reshape(tl.broadcast_to(low[:, None], (ROWS // RUN, RUN)), (ROWS,))
            scale = tl.reshape(tl.broadcast_to(scale[:, None], (ROWS // RUN, RUN)), (ROWS,))
        position = (value - low[:, None]) * scale[:, None]
        position = tl.where(position > 0, position, 0.0).to(tl.int32)

        first, second = keys(tl.load(seed), tl.full((), STREAM, tl.uint32))
        index = ((row // 2)[:, None] * width + at).to(tl.uint32)
        word = keyed_product(index, first, second)
        word = tl.where((row % 2)[:, None] == 0, word ^ (word >> 16), word >> 16)
        code = (position + (word & ((1 << FRACTION) - 1)).to(tl.int32)) >> FRACTION
        digit = tl.minimum(code, (1 << BITS) - 1) << ((row % PER_WORD) * BITS)[:, None]
        # Digits share no bit: their sum is their union.
        packed = tl.sum(tl.reshape(digit, (ROWS // PER_WORD, PER_WORD, BLOCK)), 1)
        number = (tile * (ROWS // PER_WORD) + tl.arange(0, ROWS // PER_WORD)).to(tl.int64)[:, None]
        tl.store(words + number * width + at, packed, inside)


def quantize_once(x: Tensor, seed: Tensor, order: tuple[int, ...], tiles: Tiles, stream: int, fraction: int,
                  top: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `quantize`, of a tensor that is cut into these tiles."""
    plan = tiles.plan
    physical = layout.to_physical(x, order).contiguous()
    words = physical.new_empty(plan.words, dtype=torch.int32)
    ranges = physical.new_empty(2, *layout.group_counts(plan.physical))
    groups = tiles.width // tiles.columns
    with launched_on(x):
        quantize_kernel[(-(-plan.padded_rows // tiles.rows) * groups,)](
            physical, seed, words, ranges, plan.rows, tiles.width, groups, STREAM=stream, BITS=plan.bits,
            FRACTION=fraction, TOP=top, LARGEST=torch.finfo(torch.float32).max, ROWS=tiles.rows, RUN=tiles.run,
            COLUMNS=tiles.columns, BLOCK=triton.next_power_of_2(tiles.columns),
            num_warps=max(4, min(16, tiles.rows * tiles.columns // 1024)),
        )  # fmt: skip
    return words, ranges
