"""Generated kernels for codes of another width for each sample (`samples`).

Decoding reads one word an element, as codes of one width do: where that word lies and how far it is shifted depends on
the sample and the row, which outer loops go through, so that the innermost loop still reads neighbours. Encoding writes
every word in the order of memory; of the 32 rows that a word may hold it computes all, and keeps those that the
sample's width leaves room for. That is `bits` times the work of codes of one width.

Private APIs of Inductor as in `loops`. `share_bits` has no kernel here: it sorts a few numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.virtualized import ops
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from .. import layout, quantize, samples
from ..layout import UNROLLED_TERMS, WORD_BITS
from . import loops
from .loops import Index, Value


def _lower_group_ranges(x: ir.TensorBox, order: Sequence[int]) -> ir.TensorBox:
    x.realize()
    return loops.ranges(x, order, layout.group_extents(layout.physical_size(x.get_size(), order), apart=True))


def _int(value: int) -> Value:
    return ops.constant(value, torch.int32)


def _indirect(position: Value, end: int) -> Any:
    """A loaded position as one that can index."""
    return ops.indirect_indexing(position, sympy.Integer(end), check=False, wrap_neg=False)


def _range_of(ranges: ir.TensorBox, physical: tuple[int, ...], wide: torch.dtype) -> Callable[[Index], Any]:
    """The least value and the spread of the group of a physical index."""
    load, parts = ranges.make_loader(), layout.group_extents(physical, apart=True)

    def read(at: Index) -> tuple[Value, Value]:
        group = [at[0], *(FloorDiv(place, part) for place, part in zip(at[1:], parts[1:], strict=True))]
        low, high = (ops.to_dtype(load([sympy.Integer(side), *group]), wide) for side in (0, 1))
        return low, ops.sub(high, low)

    return read


def _by_width(width: Value, of: Callable[[int], float], dtype: torch.dtype) -> Value:
    """A constant that depends on the width."""
    chosen = ops.constant(of(samples.WIDTHS[0]), dtype)
    for one in samples.WIDTHS[1:]:
        chosen = ops.where(ops.eq(width, _int(one)), ops.constant(of(one), dtype), chosen)
    return chosen


def _lower_quantize_samples(
    x: ir.TensorBox, ranges: ir.TensorBox, units: ir.TensorBox, seed: ir.TensorBox, bits: int, order: Sequence[int]
) -> ir.TensorBox:
    x.realize()
    size = [int(extent) for extent in x.get_size()]
    physical, plan, wide = (
        layout.physical_size(size, order),
        samples.rows_of(size, order),
        layout.accumulator(x.get_dtype()),
    )
    leading, each = plan.physical[: plan.split], plan.words[0]
    load, load_unit = loops.loader(x, order, wide), units.make_loader()
    range_of, keys = _range_of(ranges, physical, wide), loops.keys(seed, quantize.STREAM)
    fraction, _ = quantize.fixed_point(bits)

    def body(index: Index, within: Index) -> Value:
        sample, width, unit = (load_unit([sympy.Integer(row), FloorDiv(index[0], each)]) for row in range(3))
        at_sample = _indirect(sample, size[0])
        most = _by_width(width, lambda b: quantize.fixed_point(b)[1], wide)
        rows_a_word = _by_width(width, lambda b: WORD_BITS // b, torch.int32)
        word = ops.add(ops.mul(unit, _int(each)), ops.index_expr(ModularIndexing(index[0], 1, each), torch.int32))
        first = ops.mul(word, rows_a_word)
        ahead, used = ops.mul(sample, _int(plan.padded_rows)), ops.lt(unit, width)

        def code(place: Value, row: Value, draw: Value) -> Value:
            at_row = _indirect(ops.minimum(row, _int(plan.rows - 1)), plan.rows)
            at = [at_sample, *loops.unravel(at_row, leading), *index[1:]]
            low, spread = range_of(at)
            scale = ops.minimum(ops.truediv(most, spread), ops.constant(torch.finfo(wide).max, wide))
            position = ops.mul(ops.sub(load(at), low), scale)
            zero = ops.constant(0.0, wide)
            position = ops.to_dtype(ops.where(ops.gt(position, zero), position, zero), torch.int32)
            cut = ops.bitwise_right_shift(ops.add(position, draw), _int(fraction))
            greatest = ops.sub(ops.bitwise_left_shift(_int(1), width), _int(1))
            shift = ops.mul(place, width)
            # A shift by all bits of a word or more is undefined, even where its result is not wanted.
            digit = ops.bitwise_left_shift(ops.minimum(cut, greatest), ops.bitwise_and(shift, _int(WORD_BITS - 1)))
            return ops.where(ops.and_(used, ops.lt(shift, _int(WORD_BITS))), digit, _int(0))

        total = None
        for pair in range(0, UNROLLED_TERMS, 2):
            place = ops.index_expr(within[0] * UNROLLED_TERMS + pair, torch.int32)
            row = ops.add(first, place)
            # Rows come in pairs that share a hash; a word's first row is even.
            drawn = ops.bitwise_right_shift(ops.add(ahead, row), _int(1))
            draws = loops.random_halves(keys, fraction, drawn, index[1:], plan.inner)
            for more, draw in enumerate(draws):
                digit = code(ops.add(place, _int(more)), ops.add(row, _int(more)), draw)
                total = digit if total is None else ops.bitwise_or(total, digit)
        return total

    words = [size[0] * bits * each, *plan.inner]
    # Runs of one word share no bit: their sum is their union.
    return loops.summed(x, torch.int32, body, words, [WORD_BITS // UNROLLED_TERMS])


def _lower_dequantize_samples(
    codes: ir.TensorBox,
    ranges: ir.TensorBox,
    widths: ir.TensorBox,
    size: Sequence[int],
    order: Sequence[int],
    dtype: torch.dtype,
) -> ir.TensorBox:
    physical, plan, wide = layout.physical_size(size, order), samples.rows_of(size, order), layout.accumulator(dtype)
    leading, each, end = plan.physical[: plan.split], plan.words[0], int(codes.get_size()[0])
    load, load_width, range_of = codes.make_loader(), widths.make_loader(), _range_of(ranges, physical, wide)

    def body(at: Index) -> Value:
        width, unit = (load_width([sympy.Integer(row), at[0]]) for row in (0, 1))
        row = loops.linear(at[1 : plan.split + 1], leading)
        bit = ops.mul(ops.index_expr(row, torch.int32), width)
        word = ops.add(ops.mul(unit, _int(each)), ops.bitwise_right_shift(bit, _int(5)))
        code = ops.bitwise_right_shift(
            load([_indirect(word, end), *at[plan.split + 1 :]]), ops.bitwise_and(bit, _int(WORD_BITS - 1))
        )
        code = ops.bitwise_and(code, ops.sub(ops.bitwise_left_shift(_int(1), width), _int(1)))
        low, spread = range_of(at)
        step = ops.mul(spread, _by_width(width, quantize.step_of, wide))
        return ops.to_dtype(ops.add(low, ops.mul(ops.to_dtype(code, wide), step)), dtype)

    return loops.decoded(codes, dtype, physical, order, body)


LOWERINGS: dict[Any, Callable[..., Any]] = {
    torch.ops.xconv.group_ranges.default: _lower_group_ranges,
    torch.ops.xconv.quantize_samples.default: _lower_quantize_samples,
    torch.ops.xconv.dequantize_samples.default: _lower_dequantize_samples,
}
