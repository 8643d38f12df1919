"""Generated kernels for the codec operators: lowerings for torch.compile's Inductor.

Every private API of Inductor that the codecs touch is in this file; checked with torch 2.13.0.

What the loops look like, and why:

* Decoding is one pointwise expression over the tensor's elements in physical order, seen through a permutation, so
  that Inductor can inline it into the loop that reads it: `where(unpack_mask(w), g, 0)` is one kernel that never
  writes a boolean, and a decoded tensor that only pointwise kernels read is never stored.
* Encoding a word unrolls over the elements that share it. These lie in different rows, so that each load is a vector
  of neighbours and the loop is vectorised over the words of a row.
* Encoders read buffers that exist anyway: a tensor that others read as well is realised first, and what only the
  encoder reads (the comparison that makes a mask, the subtraction of a mean) is inlined, on top of realised inputs.
  Inlining through to the producer's inputs would keep those alive.

Known gap: none of this is dynamic; sizes are integers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
import torch.fx
from torch._inductor import config, ir
from torch._inductor.lowering import lowerings, register_lowering
from torch._inductor.virtualized import V, ops
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from . import fold, hash, layout, quantize

CHECKED_VERSION = "2.13.0"

Index = Sequence[sympy.Expr]
Value = Any

_SEED_MASK = 0x7FFFFFFF
_CHEAP_READS = 2


def install() -> None:
    """Teaches Inductor the codec operators. Calling it again changes nothing."""
    for op, lower in _LOWERINGS.items():
        if op not in lowerings:
            register_lowering(op, type_promotion_kind=None)(lower)


# Index arithmetic


def _linear(index: Index, extents: Sequence[int]) -> sympy.Expr:
    position: sympy.Expr = sympy.S.Zero
    for coordinate, extent in zip(index, extents, strict=True):
        position = position * extent + coordinate
    return position


def _unravel(position: sympy.Expr, extents: Sequence[int]) -> list[sympy.Expr]:
    index: list[sympy.Expr] = []
    stride = 1
    for extent in reversed(extents[1:]):
        index.append(ModularIndexing(position, stride, extent))
        stride *= extent
    return [FloorDiv(position, stride), *reversed(index)] if extents else []


def _group(index: Index, physical: tuple[int, ...]) -> list[sympy.Expr]:
    return [FloorDiv(at, part) for at, part in zip(index, layout.group_extents(physical), strict=True)]


# Loop bodies

_VALUES = hash.Arithmetic(
    constant=lambda value, dtype: ops.constant(value, dtype),
    shift=lambda word, count, dtype: ops.bitwise_right_shift(word, ops.constant(count, dtype)),
    narrow=lambda word: ops.to_dtype(word, torch.int32),
)


def _keys(seed: ir.TensorBox, salt: int, stream: int) -> ir.TensorBox:
    """The two keys as a buffer: deriving them takes more operations than hashing an element."""
    load, rank = seed.make_loader(), len(seed.get_size())

    def body(index: Index) -> Value:
        halves = hash.split_seed(load([sympy.S.Zero] * rank), _VALUES)
        first, second = hash.derive_keys(*halves, hash.salts(salt, stream), _VALUES)
        is_first = ops.eq(ops.index_expr(index[0], torch.int32), ops.constant(0, torch.int32))
        return ops.where(is_first, first, second)

    keys = ir.Pointwise.create(device=seed.get_device(), dtype=torch.int32, inner_fn=body, ranges=[2])
    keys.realize()
    return keys


def _random_bits(keys: ir.TensorBox, position: sympy.Expr) -> Value:
    load = keys.make_loader()
    pair = (load([sympy.S.Zero]), load([sympy.S.One]))
    return hash.keyed_hash(ops.index_expr(position, torch.int32), pair, _VALUES)


def _uniform(bits: Value, wide: torch.dtype) -> Value:
    upper = ops.to_dtype(hash.logical_shift(bits, 8, _VALUES), torch.float32)
    return ops.to_dtype(ops.mul(upper, ops.constant(2.0**-24, torch.float32)), wide)


def _guarded(
    position: sympy.Expr, end: int, largest: int, load: Callable[[Index], Value], at: Index, other: float
) -> Value:
    """`load(at)`, or `other` where `position` is `end` or more; `largest` is the greatest value `position` takes."""
    if largest < end:
        return load(at)
    inside = ops.lt(ops.index_expr(position, torch.int32), ops.constant(end, torch.int32))
    return ops.masked(inside, functools.partial(load, at), other)


# Inputs and outputs


def _readable(x: ir.TensorBox) -> ir.TensorBox:
    """`x` such that loading each element once, in any order, recomputes little and keeps no further buffer alive."""
    node: Any = V.graph.current_node.args[0]
    box = x.data
    unrealised = isinstance(box, ir.StorageBox) and isinstance(box.data, ir.Pointwise)
    ours = x.get_dtype() == torch.bool or len(node.users) == 1
    if not (unrealised and ours and x.num_reads() <= _CHEAP_READS and node.target in lowerings):
        x.realize()
        return x
    sources = [V.graph.env[source] for source in node.all_input_nodes if source in V.graph.env]
    if len(sources) < len(node.all_input_nodes):
        # The interpreter has dropped what nothing reads any more: `x` keeps its expression.
        return x
    for source in sources:
        source.realize()
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda source: V.graph.env[source])
    return lowerings[node.target](*args, **kwargs)


def _loader(x: ir.TensorBox, order: Sequence[int], dtype: torch.dtype) -> Callable[[Index], Value]:
    """Loads the element of `x` at a physical index, as `dtype`."""
    load, positions = x.make_loader(), layout.inverse(order)
    return lambda index: ops.to_dtype(load([index[position] for position in positions]), dtype)


def _decoded(
    like: ir.TensorBox,
    dtype: torch.dtype,
    physical: Sequence[int],
    order: Sequence[int],
    body: Callable[[Index], Value],
) -> ir.TensorBox:
    x = ir.Pointwise.create(device=like.get_device(), dtype=dtype, inner_fn=body, ranges=list(physical))
    return lowerings[torch.ops.aten.permute.default](x, list(layout.inverse(order)))


def _summed(
    like: ir.TensorBox, dtype: torch.dtype, body: Callable[[Index, Index], Value], shape: Sequence[int], count: int
) -> ir.TensorBox:
    """A buffer of `shape` that holds the sum of `body(index, [i])` over i < `count`, in a loop over i."""
    with config.patch(unroll_reductions_threshold=1):
        total = ir.Reduction.create(
            device=like.get_device_or_error(),
            dst_dtype=dtype,
            src_dtype=dtype,
            inner_fn=body,
            ranges=list(shape),
            reduction_ranges=[count],
            reduction_type="sum",
        )
    total.realize()
    return total


# Packing


def _packed(like: ir.TensorBox, plan: layout.Packing, code: Callable[[Index], Value]) -> ir.TensorBox:
    """Words whose codes are `code(physical index)`, int32 values below 2**bits."""
    leading = plan.physical[: plan.split]
    run = min(plan.per_word, layout.UNROLLED_TERMS)
    runs = plan.per_word // run

    def body(index: Index, within: Index) -> Value:
        first = within[0] * run
        word = None
        for place in range(run):
            row = index[0] * plan.per_word + first + place
            largest = (plan.words[0] - 1) * plan.per_word + (runs - 1) * run + place
            at = [*_unravel(row, leading), *index[1:]]
            value = _guarded(row, plan.rows, largest, code, at, 0)
            value = ops.bitwise_left_shift(value, ops.constant(place * plan.bits, torch.int32)) if place else value
            word = ops.bitwise_or(word, value) if place else value
        return ops.bitwise_left_shift(word, ops.index_expr(first * plan.bits, torch.int32)) if runs > 1 else word

    # Runs of one word share no bit: their sum is their union. A loop over runs is compiled faster than all of them.
    return _summed(like, torch.int32, body, plan.words, runs)


def _unpacked(words: ir.TensorBox, plan: layout.Packing) -> Callable[[Index], Value]:
    load = words.make_loader()
    leading = plan.physical[: plan.split]

    def code(index: Index) -> Value:
        row = _linear(index[: plan.split], leading)
        word = load([FloorDiv(row, plan.per_word), *index[plan.split :]])
        place = ops.index_expr(ModularIndexing(row, 1, plan.per_word) * plan.bits, torch.int32)
        return ops.bitwise_and(ops.bitwise_right_shift(word, place), ops.constant((1 << plan.bits) - 1, torch.int32))

    return code


def _lower_pack_mask(mask: ir.TensorBox, order: Sequence[int]) -> ir.TensorBox:
    mask = _readable(mask)
    plan = layout.packing(mask.get_size(), order, 1)
    return _packed(mask, plan, _loader(mask, order, torch.int32))


def _lower_unpack_mask(words: ir.TensorBox, size: Sequence[int], order: Sequence[int]) -> ir.TensorBox:
    plan = layout.packing(size, order, 1)
    code = _unpacked(words, plan)
    return _decoded(words, torch.bool, plan.physical, order, lambda at: ops.ne(code(at), ops.constant(0, torch.int32)))


# Quantisation


def _extreme(x: ir.TensorBox, order: Sequence[int], kind: Any) -> ir.TensorBox:
    load, physical = _loader(x, order, x.get_dtype()), layout.physical_size(x.get_size(), order)
    parts, counts = layout.group_extents(physical), layout.group_counts(physical)
    cut = [dim for dim, part in enumerate(parts) if part > 1]

    def body(index: Index, within: Index) -> Value:
        at = list(index[1:])
        for dim, offset in zip(cut, within, strict=True):
            # The last group may be short: its last element is read again, which changes no extreme.
            at[dim] = at[dim] * parts[dim] + offset
            if physical[dim] % parts[dim]:
                at[dim] = sympy.Min(at[dim], physical[dim] - 1)
        return load(at)

    dtype = x.get_dtype()
    result = ir.Reduction.create(
        device=x.get_device_or_error(),
        dst_dtype=dtype,
        src_dtype=dtype,
        inner_fn=body,
        ranges=[1, *counts],
        reduction_ranges=[parts[dim] for dim in cut],
        reduction_type=kind,
    )
    result.realize()
    return result


def _spread(
    ranges: ir.TensorBox, physical: tuple[int, ...], bits: int, wide: torch.dtype
) -> Callable[[Index], tuple[Value, Value]]:
    """The least value and the step of the group of a physical index."""
    load = ranges.make_loader()

    def at(index: Index) -> tuple[Value, Value]:
        group = _group(index, physical)
        low, high = (ops.to_dtype(load([sympy.Integer(side), *group]), wide) for side in (0, 1))
        return low, ops.truediv(ops.sub(high, low), ops.constant(float((1 << bits) - 1), wide))

    return at


def _lower_quantize(
    x: ir.TensorBox, seed: ir.TensorBox, salt: int, bits: int, order: Sequence[int]
) -> tuple[ir.TensorBox, ir.TensorBox]:
    x.realize()
    plan = layout.packing(x.get_size(), order, bits)
    sides = [_extreme(x, order, kind) for kind in ("min", "max")]
    # The two reductions write into halves of one buffer, whose strides must be those the fake rule promises.
    with config.patch(comprehensive_padding=False):
        ranges = ir.TensorBox(ir.ConcatKernel.create(sides, 0))
    wide = layout.accumulator(x.get_dtype())
    load, spread = _loader(x, order, wide), _spread(ranges, plan.physical, bits, wide)
    keys = _keys(seed, salt, quantize.STREAM)

    def code(at: Index) -> Value:
        low, step = spread(at)
        zero, levels = (ops.constant(value, wide) for value in (0.0, float((1 << bits) - 1)))
        position = ops.truediv(ops.sub(load(at), low), step)
        position = ops.minimum(ops.where(ops.gt(position, zero), position, zero), levels)
        below = ops.floor(position)
        draw = _uniform(_random_bits(keys, _linear(at, plan.physical)), wide)
        up = ops.lt(draw, ops.sub(position, below))
        return ops.add(ops.to_dtype(below, torch.int32), ops.to_dtype(up, torch.int32))

    return _packed(x, plan, code), ranges


def _lower_dequantize(
    codes: ir.TensorBox,
    ranges: ir.TensorBox,
    size: Sequence[int],
    order: Sequence[int],
    bits: int,
    dtype: torch.dtype,
) -> ir.TensorBox:
    plan, wide = layout.packing(size, order, bits), layout.accumulator(dtype)
    code, spread = _unpacked(codes, plan), _spread(ranges, plan.physical, bits, wide)

    def body(at: Index) -> Value:
        low, step = spread(at)
        return ops.to_dtype(ops.add(low, ops.mul(ops.to_dtype(code(at), wide), step)), dtype)

    return _decoded(codes, dtype, plan.physical, order, body)


# Folding


def _signed(value: Value, bits: Value, bit: Value) -> Value:
    negative = ops.ne(ops.bitwise_and(bits, bit), ops.constant(0, torch.int32))
    return ops.where(negative, ops.neg(value), value)


def _lower_fold(x: ir.TensorBox, seed: ir.TensorBox, salt: int, probes: int, order: Sequence[int]) -> ir.TensorBox:
    x = _readable(x)
    plan, wide = layout.folding(x.get_size(), order, probes), layout.accumulator(x.get_dtype())
    keys = _keys(seed, salt, fold.STREAM)
    leading = plan.physical[1 : plan.split]
    load = _loader(x, order, wide)
    rows = math.prod(leading)

    def body(index: Index, within: Index) -> Value:
        (batch,) = within
        column = _linear(index, [plan.samples, plan.rows, *plan.block])
        bits = _random_bits(keys, column + batch * (plan.samples * probes))
        total = None
        for place in range(min(layout.UNROLLED_TERMS, plan.terms)):
            row = (batch * layout.UNROLLED_TERMS + place) * plan.rows + index[1]
            largest = ((plan.batches - 1) * layout.UNROLLED_TERMS + place + 1) * plan.rows - 1
            at = [index[0], *_unravel(row, leading), *index[2:]]
            value = _guarded(row, rows, largest, load, at, 0.0)
            term = _signed(value, bits, ops.constant(1 << place, torch.int32))
            total = ops.add(total, term) if place else term
        return total

    sums = _summed(x, wide, body, [plan.samples, plan.rows, *plan.block], plan.batches)
    return lowerings[torch.ops.aten.view.default](sums, [plan.samples, probes])


def _lower_unfold(
    sums: ir.TensorBox,
    seed: ir.TensorBox,
    salt: int,
    size: Sequence[int],
    order: Sequence[int],
    dtype: torch.dtype,
) -> ir.TensorBox:
    probes = int(sums.get_size()[1])
    plan = layout.folding(size, order, probes)
    keys = _keys(seed, salt, fold.STREAM)
    load, leading = sums.make_loader(), plan.physical[1 : plan.split]

    def body(index: Index) -> Value:
        row = _linear(index[1 : plan.split], leading)
        term, row = FloorDiv(row, plan.rows), ModularIndexing(row, 1, plan.rows)
        column = _linear([row, *index[plan.split :]], [plan.rows, *plan.block])
        batch, place = FloorDiv(term, layout.UNROLLED_TERMS), ModularIndexing(term, 1, layout.UNROLLED_TERMS)
        position = index[0] * probes + column + batch * (plan.samples * probes)
        bits = _random_bits(keys, position)
        bit = ops.bitwise_left_shift(ops.constant(1, torch.int32), ops.index_expr(place, torch.int32))
        return ops.to_dtype(_signed(load([index[0], column]), bits, bit), dtype)

    return _decoded(sums, dtype, plan.physical, order, body)


_LOWERINGS: dict[Any, Callable[..., Any]] = {
    torch.ops.xconv.pack_mask.default: _lower_pack_mask,
    torch.ops.xconv.unpack_mask.default: _lower_unpack_mask,
    torch.ops.xconv.quantize.default: _lower_quantize,
    torch.ops.xconv.dequantize.default: _lower_dequantize,
    torch.ops.xconv.fold.default: _lower_fold,
    torch.ops.xconv.unfold.default: _lower_unfold,
}
