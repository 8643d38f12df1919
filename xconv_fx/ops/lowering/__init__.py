"""Generated kernels for the codec operators: lowerings for torch.compile's Inductor.

Private APIs of Inductor are touched here and in `loops`, nowhere else in the codecs; checked with torch 2.13.0.

What the loops look like, and why:

* Decoding is one pointwise expression over the tensor's elements in physical order, seen through a permutation, so
  that Inductor can inline it into the loop that reads it: `where(unpack_mask(w), g, 0)` is one kernel that never
  writes a boolean, and a decoded tensor that only pointwise kernels read is never stored.
* Encoding a word unrolls over the elements that share it. These lie in different rows, so that each load is a vector
  of neighbours and the loop is vectorised over the words of a row.
* Encoders read buffers that exist anyway: a tensor that others read as well is realised first, and what only the
  encoder reads (the comparison that makes a mask, the subtraction of a mean) is inlined, on top of realised inputs.
  Inlining through to the producer's inputs would keep those alive.

* On a GPU, quantisation whose groups fit is a call of a kernel of ours that reads the tensor once (`quantize_kernel`).

Known gap: none of this is dynamic; sizes are integers.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.lowering import lowerings, register_lowering
from torch._inductor.virtualized import ops
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from .. import (
    fold,
    layout,
    materialize,  # noqa: F401 (defines an operator)
    pool,
    quantize,
    quantize_kernel,
    triton_words,
)
from . import fixed, interpolate, loops, samples, words
from .loops import Index, Value


def install() -> None:
    """Teaches Inductor the codec operators. Calling it again changes nothing."""
    for op, lower in _LOWERINGS.items():
        if op not in lowerings:
            register_lowering(op, type_promotion_kind=None)(lower)


def _group(index: Index, physical: tuple[int, ...]) -> list[sympy.Expr]:
    return [FloorDiv(at, part) for at, part in zip(index, layout.group_extents(physical), strict=True)]


# Masks


def _lower_pack_mask(mask: ir.TensorBox, order: Sequence[int]) -> ir.TensorBox:
    mask = loops.readable(mask)
    plan = layout.packing(mask.get_size(), order, 1)
    load = loops.loader(mask, order, torch.int32)
    return words.packed(mask, plan, lambda at, row: load(at))


def _lower_unpack_mask(packed_mask: ir.TensorBox, size: Sequence[int], order: Sequence[int]) -> ir.TensorBox:
    plan = layout.packing(size, order, 1)
    code = words.unpacked(packed_mask, plan)
    return loops.decoded(
        packed_mask, torch.bool, plan.physical, order, lambda at: ops.ne(code(at), ops.constant(0, torch.int32))
    )


# Quantisation


def _low_and_spread(load: Callable[[Index], Value], group: Index, wide: torch.dtype) -> tuple[Value, Value]:
    low, high = (ops.to_dtype(load([sympy.Integer(side), *group]), wide) for side in (0, 1))
    return low, ops.sub(high, low)


def _ranges_by_row(ranges: ir.TensorBox, plan: layout.Packing) -> Callable[[Index, sympy.Expr], tuple[Value, Index]]:
    """How to load the ranges, and the group of a physical index in a row: with as few divisions as there can be.

    Where groups are whole runs of rows, the row alone tells the group. Inductor simplifies an index for seconds that
    takes a row apart into its dimensions and puts it together again.
    """
    parts, counts = layout.group_extents(plan.physical), layout.group_counts(plan.physical)
    inner = range(plan.split, len(plan.physical))
    run = math.prod(parts[: plan.split])
    outer = next((dim for dim in range(plan.split) if parts[dim] > 1), plan.split)
    whole = parts[outer + 1 : plan.split] == plan.physical[outer + 1 : plan.split]
    if whole and all(plan.physical[dim] % parts[dim] == 0 for dim in range(plan.split)):
        shape = [2, plan.rows // run, *(counts[dim] for dim in inner)]
        load = lowerings[torch.ops.aten.view.default](ranges, shape).make_loader()
        return lambda at, row: (load, [FloorDiv(row, run), *(FloorDiv(at[dim], parts[dim]) for dim in inner)])
    load = ranges.make_loader()
    return lambda at, row: (load, _group(at, plan.physical))


def _lower_quantize(
    x: ir.TensorBox, seed: ir.TensorBox, bits: int, order: Sequence[int]
) -> tuple[ir.TensorBox, ir.TensorBox]:
    x.realize()
    plan = layout.packing(x.get_size(), order, bits)
    if triton_words.usable(x.get_device()) and quantize_kernel.tiles_of(plan, x.get_dtype()) is not None:
        return loops.called(torch.ops.xconv.quantize.default, order, x, seed, bits, list(order))
    ranges = loops.ranges(x, order, layout.group_extents(plan.physical))
    wide = layout.accumulator(x.get_dtype())
    load, range_of = loops.loader(x, order, wide), _ranges_by_row(ranges, plan)
    keys = loops.keys(seed, quantize.STREAM)

    fraction, top = quantize.fixed_point(bits)
    # C++ loops over 16-bit floats handle vectors in pairs, and PyTorch converts a pair to int32 through the stack.
    joined = min(16 // bits, plan.per_word, layout.UNROLLED_TERMS) if x.get_dtype().itemsize == 2 else 1

    def position(at: Index, row: sympy.Expr) -> Value:
        low, spread = _low_and_spread(*range_of(at, row), wide)
        zero, most, largest = (ops.constant(value, wide) for value in (0.0, top, torch.finfo(wide).max))
        position = ops.mul(ops.sub(load(at), low), ops.minimum(ops.truediv(most, spread), largest))
        position = ops.where(ops.gt(position, zero), position, zero)
        return ops.floor(position) if joined > 1 else ops.to_dtype(position, torch.int32)

    def rounding(rows: Sequence[sympy.Expr], inner: Index) -> Callable[[Value, int], Value]:
        pairs = [loops.random_halves(keys, fraction, row / 2, inner, plan.inner) for row in rows[::2]]
        cut_off = _cut_off if joined == 1 else _cut_off_float
        return lambda value, place: cut_off(value, pairs[place // 2][place % 2], fraction, bits)

    return words.packed(x, plan, position, rounding, joined), ranges


def _cut_off_float(position: Value, draw: Value, fraction: int, bits: int) -> Value:
    """`_cut_off` of a whole float32 position, exact below 2**24."""
    position = ops.add(position, ops.to_dtype(draw, torch.float32))
    code = ops.floor(ops.mul(position, ops.constant(2.0**-fraction, torch.float32)))
    most = ops.constant(float((1 << bits) - 1), torch.float32)
    return ops.where(ops.lt(code, most), code, most)


def _cut_off(position: Value, draw: Value, fraction: int, bits: int) -> Value:
    position = ops.add(position, draw)
    code = ops.bitwise_right_shift(position, ops.constant(fraction, torch.int32))
    return ops.minimum(code, ops.constant((1 << bits) - 1, torch.int32))


def _lower_dequantize(
    codes: ir.TensorBox,
    ranges: ir.TensorBox,
    size: Sequence[int],
    order: Sequence[int],
    bits: int,
    dtype: torch.dtype,
) -> ir.TensorBox:
    plan, wide = layout.packing(size, order, bits), layout.accumulator(dtype)
    code, load = words.unpacked(codes, plan), ranges.make_loader()

    def body(at: Index) -> Value:
        low, spread = _low_and_spread(load, _group(at, plan.physical), wide)
        step = ops.mul(spread, ops.constant(quantize.step_of(bits), wide))
        return ops.to_dtype(ops.add(low, ops.mul(ops.to_dtype(code(at), wide), step)), dtype)

    return loops.decoded(codes, dtype, plan.physical, order, body)


# Folding


def _signed(value: Value, bits: Value, bit: Value) -> Value:
    negative = ops.ne(ops.bitwise_and(bits, bit), ops.constant(0, torch.int32))
    return ops.where(negative, ops.neg(value), value)


def _lower_fold(x: ir.TensorBox, seed: ir.TensorBox, probes: int, order: Sequence[int]) -> ir.TensorBox:
    x = loops.readable(x)
    plan, wide = layout.folding(x.get_size(), order, probes), layout.accumulator(x.get_dtype())
    keys = loops.keys(seed, fold.STREAM)
    leading = plan.physical[1 : plan.split]
    load = loops.loader(x, order, wide)
    rows = math.prod(leading)

    def body(index: Index, within: Index) -> Value:
        (batch,) = within
        row = loops.linear([batch, *index[:2]], [plan.batches, plan.samples, plan.rows])
        bits = loops.random_bits(keys, row, index[2:], plan.block)
        total = None
        for place in range(min(layout.UNROLLED_TERMS, plan.terms)):
            row = (batch * layout.UNROLLED_TERMS + place) * plan.rows + index[1]
            largest = ((plan.batches - 1) * layout.UNROLLED_TERMS + place + 1) * plan.rows - 1
            at = [index[0], *loops.unravel(row, leading), *index[2:]]
            value = loops.guarded(row, rows, largest, functools.partial(load, at), 0.0)
            term = _signed(value, bits, ops.constant(1 << place, torch.int32))
            total = ops.add(total, term) if place else term
        return total

    sums = loops.summed(x, wide, body, [plan.samples, plan.rows, *plan.block], [plan.batches])
    return lowerings[torch.ops.aten.view.default](sums, [plan.samples, probes])


def _lower_unfold(
    sums: ir.TensorBox,
    seed: ir.TensorBox,
    size: Sequence[int],
    order: Sequence[int],
    dtype: torch.dtype,
) -> ir.TensorBox:
    probes = int(sums.get_size()[1])
    plan = layout.folding(size, order, probes)
    if plan.terms >= layout.UNROLLED_TERMS:
        # Every sum is read as often as it has terms: decoding it each time costs more than this small a buffer.
        sums.realize()
    keys = loops.keys(seed, fold.STREAM)
    load, leading = sums.make_loader(), plan.physical[1 : plan.split]

    def body(index: Index) -> Value:
        row = loops.linear(index[1 : plan.split], leading)
        term, row = FloorDiv(row, plan.rows), ModularIndexing(row, 1, plan.rows)
        column = loops.linear([row, *index[plan.split :]], [plan.rows, *plan.block])
        batch, place = FloorDiv(term, layout.UNROLLED_TERMS), ModularIndexing(term, 1, layout.UNROLLED_TERMS)
        draw = loops.linear([batch, index[0], row], [plan.batches, plan.samples, plan.rows])
        bits = loops.random_bits(keys, draw, index[plan.split :], plan.block)
        bit = ops.bitwise_left_shift(ops.constant(1, torch.int32), ops.index_expr(place, torch.int32))
        return ops.to_dtype(_signed(load([index[0], column]), bits, bit), dtype)

    return loops.decoded(sums, dtype, plan.physical, order, body)


# Pooling


def _lower_max_pool_backward(
    grad: ir.TensorBox,
    offsets: ir.TensorBox,
    input_size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> ir.TensorBox:
    for tensor in (grad, offsets):
        tensor.realize()
    # The layout of the offsets is that of pooling's input. Inductor finds none in quotients, and takes contiguous.
    order = layout.order_of(offsets.get_size(), offsets.get_stride())
    load_grad, load_offset = grad.make_loader(), offsets.make_loader()
    pooled = [int(extent) for extent in grad.get_size()[2:]]
    windows = list(itertools.product(*(range(-(-k // s)) for k, s in zip(kernel, stride, strict=True))))

    def won(index: Index, back: Sequence[int]) -> Value:
        """The gradient of the window `back` windows before the last one that starts at or before the position."""
        shifted = [at + pad for at, pad in zip(index[2:], padding, strict=True)]
        window = [FloorDiv(at, step) - b for at, step, b in zip(shifted, stride, back, strict=True)]
        place: sympy.Expr = sympy.S.Zero
        conditions = []
        for at, first, extent, step, count in zip(shifted, window, kernel, stride, pooled, strict=True):
            inside = at - first * step
            place = place * extent + inside
            conditions += [(first, 0, count), (inside, 0, extent)]

        def value() -> Value:
            at = [*index[:2], *window]
            chosen = ops.eq(ops.to_dtype(load_offset(at), torch.int32), ops.index_expr(place, torch.int32))
            return ops.where(chosen, load_grad(at), ops.constant(0.0, grad.get_dtype()))

        return ops.masked(_within(conditions), value, 0.0)

    def body(physical: Index) -> Value:
        index = [physical[place] for place in layout.inverse(order)]
        total = won(index, windows[0])
        for back in windows[1:]:
            total = ops.add(total, won(index, back))
        return total

    size = [*grad.get_size()[:2], *input_size]
    return loops.decoded(grad, grad.get_dtype(), [size[dim] for dim in order], order, body)


def _lower_adaptive_pool_backward(grad: ir.TensorBox, input_size: Sequence[int], order: Sequence[int]) -> ir.TensorBox:
    grad.realize()
    load = grad.make_loader()
    dtype = grad.get_dtype()
    pairs = [(extent, int(count)) for extent, count in zip(input_size, grad.get_size()[2:], strict=True)]
    windows = list(itertools.product(*(range(pool.adaptive_windows(*pair)) for pair in pairs)))

    def share(index: Index, ahead: Sequence[int]) -> Value:
        """What comes from the window `ahead` windows after the first that the position is in."""
        window, area, conditions = [], sympy.S.One, []
        for at, (extent, count), further in zip(index[2:], pairs, ahead, strict=True):
            number = FloorDiv(at * count, extent) + further
            first = FloorDiv(number * extent, count)
            area = area * (FloorDiv((number + 1) * extent + count - 1, count) - first)
            window.append(number)
            if further:
                conditions += [(number, 0, count), (at - first, 0, extent)]

        def value() -> Value:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            return ops.truediv(load([*index[:2], *window]), ops.to_dtype(ops.index_expr(area, torch.int32), wide))

        return ops.masked(_within(conditions), value, 0.0) if conditions else value()

    def body(physical: Index) -> Value:
        index = [physical[place] for place in layout.inverse(order)]
        total = share(index, windows[0])
        for ahead in windows[1:]:
            total = ops.add(total, share(index, ahead))
        return total

    size = [*grad.get_size()[:2], *input_size]
    return loops.decoded(grad, dtype, [size[dim] for dim in order], order, body)


def _within(conditions: Sequence[tuple[sympy.Expr, int, int]]) -> Value:
    """Whether first <= position < end holds for every (position, first, end)."""
    result = None
    for position, first, end in conditions:
        value = ops.index_expr(position, torch.int32)
        inside = ops.and_(
            ops.ge(value, ops.constant(first, torch.int32)), ops.lt(value, ops.constant(end, torch.int32))
        )
        result = inside if result is None else ops.and_(result, inside)
    return result


def _lower_stored(x: ir.TensorBox) -> ir.TensorBox:
    x.realize()
    return x


def _lower_apart(x: ir.TensorBox) -> ir.TensorBox:
    return ir.Pointwise.create(
        device=x.get_device(), dtype=x.get_dtype(), inner_fn=x.make_loader(), ranges=list(x.get_size())
    )


_LOWERINGS: dict[Any, Callable[..., Any]] = {
    torch.ops.xconv.pack_mask.default: _lower_pack_mask,
    torch.ops.xconv.unpack_mask.default: _lower_unpack_mask,
    torch.ops.xconv.quantize.default: _lower_quantize,
    torch.ops.xconv.dequantize.default: _lower_dequantize,
    **samples.LOWERINGS,
    **fixed.LOWERINGS,
    **interpolate.LOWERINGS,
    torch.ops.xconv.fold.default: _lower_fold,
    torch.ops.xconv.unfold.default: _lower_unfold,
    torch.ops.xconv.max_pool_backward.default: _lower_max_pool_backward,
    torch.ops.xconv.adaptive_pool_backward.default: _lower_adaptive_pool_backward,
    torch.ops.xconv.stored.default: _lower_stored,
    torch.ops.xconv.apart.default: _lower_apart,
}
