"""Generated kernels for fixed point (`fixed`); what such loops look like is in `lowering`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.virtualized import ops

from .. import fixed, layout
from . import loops, words
from .loops import Index, Value


def _lower_fix(
    x: ir.TensorBox, positive: ir.TensorBox | None, table: ir.TensorBox, bits: int, order: Sequence[int]
) -> ir.TensorBox:
    x.realize()
    table.realize()
    plan, wide = layout.packing(x.get_size(), order, bits), layout.accumulator(x.get_dtype())
    load, row_of = loops.loader(x, order, wide), _table_loader(table, order)
    signs = None if positive is None else loops.loader(loops.readable(positive, 1), order, torch.bool)
    half = 1 << (bits - 1)

    def code(at: Index, _: sympy.Expr) -> Value:
        lowest, highest, nearest = (ops.constant(float(value), wide) for value in (-half, half - 1, 0.5))
        border, above, below, step = (row_of(field, at) for field in range(fixed.FIELDS))
        least, most, base = lowest, highest, above
        if signs is not None:
            upper = ops.eq(signs(at), ops.gt(step, ops.constant(0.0, wide)))
            least = ops.where(upper, border, lowest)
            most = ops.where(upper, highest, ops.sub(border, ops.constant(1.0, wide)))
            base = ops.where(upper, above, below)
        place = ops.floor(ops.add(ops.truediv(ops.sub(load(at), base), ops.abs(step)), nearest))
        place = ops.where(ops.gt(place, least), place, least)
        place = ops.where(ops.lt(place, most), place, most)
        place = ops.where(ops.gt(place, lowest), place, lowest)
        return ops.to_dtype(ops.add(place, ops.constant(float(half), wide)), torch.int32)

    return words.packed(x, plan, code)


def _lower_unfix(
    codes: ir.TensorBox,
    table: ir.TensorBox,
    size: Sequence[int],
    order: Sequence[int],
    bits: int,
    dtype: torch.dtype,
) -> ir.TensorBox:
    table.realize()
    physical, wide = layout.physical_size(size, order), layout.accumulator(dtype)
    code, row_of = _signed_code(codes, size, order, bits, wide), _table_loader(table, order)

    def body(at: Index) -> Value:
        border, above, below, step = (row_of(field, at) for field in range(fixed.FIELDS))
        value = code(at)
        base = ops.where(ops.ge(value, border), above, below)
        return ops.to_dtype(ops.add(base, ops.mul(value, ops.abs(step))), dtype)

    plan = layout.packing(size, order, bits)
    return loops.decoded(codes, dtype, physical, order, words.counted_as_load(codes, plan, body))


def _lower_fixed_sign(
    codes: ir.TensorBox, table: ir.TensorBox, size: Sequence[int], order: Sequence[int], bits: int
) -> ir.TensorBox:
    table.realize()
    wide = table.get_dtype()
    code, row_of = _signed_code(codes, size, order, bits, wide), _table_loader(table, order)

    def body(at: Index) -> Value:
        upper = ops.ge(code(at), row_of(fixed.BORDER, at))
        return ops.eq(upper, ops.gt(row_of(fixed.STEP, at), ops.constant(0.0, wide)))

    plan = layout.packing(size, order, bits)
    return loops.decoded(codes, torch.bool, plan.physical, order, words.counted_as_load(codes, plan, body))


def _signed_code(
    codes: ir.TensorBox, size: Sequence[int], order: Sequence[int], bits: int, wide: torch.dtype
) -> Callable[[Index], Value]:
    load = words.unpacked(codes, layout.packing(size, order, bits))
    half = float(1 << (bits - 1))
    return lambda at: ops.sub(ops.to_dtype(load(at), wide), ops.constant(half, wide))


def _table_loader(table: ir.TensorBox, order: Sequence[int]) -> Callable[[int, Index], Value]:
    """Loads a field of a table of scales for the element at a physical index."""
    load, (sample, channel) = table.make_loader(), layout.inverse(order)[:2]
    shared = int(table.get_size()[1]) == 1
    return lambda field, at: load([sympy.Integer(field), sympy.S.Zero if shared else at[sample], at[channel]])


LOWERINGS: dict[Any, Callable[..., Any]] = {
    torch.ops.xconv.fix.default: _lower_fix,
    torch.ops.xconv.unfix.default: _lower_unfix,
    torch.ops.xconv.fixed_sign.default: _lower_fixed_sign,
}
