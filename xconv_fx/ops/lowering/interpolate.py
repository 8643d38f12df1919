"""Generated kernels for the backward of interpolation (`ops/interpolate.py`).

One loop over the input's positions, and within it one over the few output positions that may read each, written out
where they are very few: 64 loads written out take Inductor half a minute. Which these are, and their weights, is
computed before for each axis, into tables of a few kilobytes: as parts of an index, quotients and borders take longer
still to simplify. An index from a table that inner loops do not change leaves these what they are, so that what is
channels-last is read in whole vectors.

Private APIs of Inductor as in `loops`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.lowering import lowerings
from torch._inductor.virtualized import ops
from torch.utils._sympy.functions import FloorDiv

from .. import interpolate, layout
from ..interpolate import Axis, Window
from . import loops
from .loops import Index, Value

# Up to so many terms are written out; more are added up in loops.
_UNROLLED = 8


def _lower_interpolate_backward(
    grad: ir.TensorBox, input_size: Sequence[int], mode: str, align_corners: bool, scales: Sequence[float]
) -> ir.TensorBox:
    dtype = grad.get_dtype()
    axes = interpolate.axes(grad.get_size()[2:], input_size, mode, align_corners, scales, dtype)
    if not interpolate.gathers(axes):
        arguments = list(input_size), mode, align_corners, list(scales)
        return loops.called(torch.ops.xconv.interpolate_backward.default, range(len(axes) + 2), grad, *arguments)
    grad.realize()
    single = grad.get_device_or_error().type == "cpu" and _order(grad)[-1] >= 2
    rounds = interpolate.rounds(axes, interpolate.MOST_SINGLE_TERMS if single else interpolate.MOST_TERMS)
    for number, places in enumerate(rounds, start=1):
        kept = dtype if number == len(rounds) else layout.accumulator(dtype)
        grad = _gathered(grad, {place + 2: axes[place] for place in places}, kept)
    return grad


def _order(grad: ir.TensorBox) -> Sequence[int]:
    """The dims from the outermost in memory to the innermost; as they come where a view has none."""
    size, stride = grad.get_size(), grad.maybe_get_stride()
    return range(len(size)) if stride is None else layout.order_of(size, stride)


def _gathered(grad: ir.TensorBox, along: Mapping[int, Axis], dtype: torch.dtype) -> ir.TensorBox:
    """The gradient before interpolation along some dims, which lies as `grad` does: one kernel."""
    grad.realize()
    load, wide, order = grad.make_loader(), layout.accumulator(dtype), _order(grad)
    size = [along[dim].extent if dim in along else int(extent) for dim, extent in enumerate(grad.get_size())]
    readers = {dim: _Readers.of(axis, grad) for dim, axis in along.items()}

    def term(physical: Index, taps: Index) -> Value:
        """What a position of the input gets from one of the output, that of these taps."""
        index, weightings = [physical[place] for place in layout.inverse(order)], []
        for tap, (dim, reader) in zip(taps, readers.items(), strict=True):
            index[dim], weighting = reader(tap, index[dim])
            weightings.append(weighting)
        value = ops.to_dtype(load(index), wide)
        for weighting in weightings:
            value = weighting(value)
        return value

    taps = [reader.window.taps for reader in readers.values()]
    physical = [size[dim] for dim in order]
    if math.prod(taps) > _UNROLLED:
        total = loops.summed(grad, wide, term, physical, taps)
        return lowerings[torch.ops.aten.permute.default](loops.converted(total, dtype), list(layout.inverse(order)))

    def body(index: Index) -> Value:
        terms = (term(index, place) for place in itertools.product(*(map(sympy.Integer, range(n)) for n in taps)))
        return ops.to_dtype(functools.reduce(ops.add, terms), dtype)

    return loops.decoded(grad, dtype, physical, order, body)


@dataclass(frozen=True)
class _Readers:
    """What may read a position of the input along an axis: loads of readers and their weights, by (tap, position)."""

    axis: Axis
    window: Window
    position: Callable[[Index], Value] | None = None
    weight: Callable[[Index], Value] | None = None

    @staticmethod
    def of(axis: Axis, like: ir.TensorBox) -> _Readers:
        window = axis.window
        assert window is not None
        if window.whole:
            return _Readers(axis, window)

        def position(index: Index) -> Value:
            return _within(_reader(index[0], index[1], window), axis)

        def weight(index: Index) -> Value:
            return _weight_of(_reader(index[0], index[1], window), index[1], axis)

        shape = [window.taps, axis.extent]
        tables = loops.table(like, torch.int64, position, shape), loops.table(like, axis.dtype, weight, shape)
        return _Readers(axis, window, *tables)

    def __call__(self, tap: sympy.Expr, at: sympy.Expr) -> tuple[sympy.Expr, Callable[[Value], Value]]:
        """One that may read a position of the input, and how to weight the gradient there."""
        if self.position is None or self.weight is None:
            return _reader(tap, at, self.window), lambda value: value
        index = [tap, at]
        reader = ops.indirect_indexing(self.position(index), self.axis.outputs, check=False)
        weight, zero = self.weight(index), ops.constant(0.0, self.axis.dtype)
        if self.axis.mode.startswith("nearest"):
            return reader, lambda value: ops.where(ops.ne(weight, zero), value, zero)
        return reader, lambda value: ops.mul(value, weight)


def _reader(tap: sympy.Expr, position: sympy.Expr, window: Window) -> sympy.Expr:
    """A position of the output that may read `position`, or one beyond its edges."""
    return FloorDiv(position * window.times + window.plus, window.over) + tap


def _within(reader: sympy.Expr, axis: Axis) -> Value:
    number = ops.maximum(_number(reader), ops.constant(0, torch.int32))
    return ops.to_dtype(ops.minimum(number, ops.constant(axis.outputs - 1, torch.int32)), torch.int64)


def _weight_of(reader: sympy.Expr, position: sympy.Expr, axis: Axis) -> Value:
    """By how much `reader` goes by a position of the input; beyond the output's edges, by nothing."""
    number, zero = _number(reader), ops.constant(0.0, axis.dtype)
    weight = _nearest(reader, position, axis) if axis.mode.startswith("nearest") else _weight(reader, position, axis)
    weight = ops.where(ops.ge(number, ops.constant(0, torch.int32)), weight, zero)
    return ops.where(ops.lt(number, ops.constant(axis.outputs, torch.int32)), weight, zero)


def _nearest(reader: sympy.Expr, position: sympy.Expr, axis: Axis) -> Value:
    offset, step = (
        ops.constant(value, torch.float32) for value in (0.5 if axis.mode == "nearest-exact" else 0.0, axis.step)
    )
    source = ops.floor(ops.mul(ops.add(_float(reader, torch.float32), offset), step))
    zero, one = (ops.constant(value, axis.dtype) for value in (0.0, 1.0))
    return ops.where(ops.eq(source, _float(position, torch.float32)), one, zero)


def _weight(reader: sympy.Expr, position: sympy.Expr, axis: Axis) -> Value:
    """By how much linear or cubic interpolation at `reader` goes by a position of the input; in the axis's dtype."""
    dtype = axis.dtype
    zero, one, step = (ops.constant(value, dtype) for value in (0.0, 1.0, axis.step))
    at, source = _float(position, dtype), _float(reader, dtype)
    if axis.align_corners:
        source = ops.mul(step, source)
    else:
        half = ops.constant(0.5, dtype)
        source = ops.sub(ops.mul(step, ops.add(source, half)), half)
    if axis.mode == "linear":
        source = ops.minimum(ops.maximum(source, zero), ops.constant(float(axis.extent - 1), dtype))
        return ops.maximum(ops.sub(one, ops.abs(ops.sub(source, at))), zero)
    below = ops.floor(source)
    share, total = ops.sub(source, below), None
    weights = interpolate.cubic_weights(share, lambda value: ops.constant(value, dtype))
    for place, weight in zip(interpolate.AROUND, weights, strict=True):
        read = ops.add(below, ops.constant(float(place), dtype))
        read = ops.minimum(ops.maximum(read, zero), ops.constant(float(axis.extent - 1), dtype))
        term = ops.where(ops.eq(read, at), weight, zero)
        total = term if total is None else ops.add(total, term)
    return total


def _number(position: sympy.Expr) -> Value:
    return ops.index_expr(position, torch.int32)


def _float(position: sympy.Expr, dtype: torch.dtype) -> Value:
    return ops.to_dtype(_number(position), dtype)


LOWERINGS: dict[Any, Callable[..., Any]] = {
    torch.ops.xconv.interpolate_backward.default: _lower_interpolate_backward,
}
