"""Inductor's private API, as the codecs' lowerings use it: loads, loops, random bits, index arithmetic.

Checked with torch 2.13.0. `Value` is what Inductor calls an `OpsValue`, the result of an operation inside a loop body;
`Index` a list of integer expressions, one a dimension. "Physical" is meant as in `layout`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
import torch.fx
from torch._inductor import config, ir
from torch._inductor.cpu_vec_isa import VecAVX2, pick_vec_isa
from torch._inductor.lowering import fallback_handler, lowerings
from torch._inductor.virtualized import V, ops
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from .. import counter_rng, layout

Index = Sequence[sympy.Expr]
Value = Any

# A tensor computed from more buffers than this is stored before it is encoded.
_CHEAP_READS = 2


def linear(index: Index, extents: Sequence[int]) -> sympy.Expr:
    """The position of `index` in a dense array of `extents`."""
    position: sympy.Expr = sympy.S.Zero
    for coordinate, extent in zip(index, extents, strict=True):
        position = position * extent + coordinate
    return position


def unravel(position: sympy.Expr, extents: Sequence[int]) -> list[sympy.Expr]:
    """Inverse of `linear`."""
    index: list[sympy.Expr] = []
    stride = 1
    for extent in reversed(extents[1:]):
        index.append(ModularIndexing(position, stride, extent))
        stride *= extent
    return [FloorDiv(position, stride), *reversed(index)] if extents else []


VALUES = counter_rng.Arithmetic(
    constant=lambda value, dtype: ops.constant(value, dtype),
    shift=lambda word, count, dtype: ops.bitwise_right_shift(word, ops.constant(count, dtype)),
    narrow=lambda word: ops.to_dtype(word, torch.int32),
)


def keys(seed: ir.TensorBox, stream: int) -> ir.TensorBox:
    """The two keys of a stream, in a buffer: deriving them takes more operations than hashing an element."""
    load, rank = seed.make_loader(), len(seed.get_size())

    def body(index: Index) -> Value:
        halves = counter_rng.split_seed(load([sympy.S.Zero] * rank), VALUES)
        first, second = counter_rng.derive_keys(*halves, counter_rng.constants(stream), VALUES)
        is_first = ops.eq(ops.index_expr(index[0], torch.int32), ops.constant(0, torch.int32))
        return ops.where(is_first, first, second)

    pair = ir.Pointwise.create(device=seed.get_device(), dtype=torch.int32, inner_fn=body, ranges=[2])
    pair.realize()
    return pair


def table(
    like: ir.TensorBox, dtype: torch.dtype, body: Callable[[Index], Value], shape: Sequence[int]
) -> Callable[[Index], Value]:
    """Loads from a small buffer of `shape` on the device of `like`, computed once: `body(index)` for each index.

    Of what reads no buffer Inductor's own loaders would make it part of their readers again.
    """
    values: Any = ir.Pointwise.create(device=like.get_device(), dtype=dtype, inner_fn=body, ranges=list(shape))
    values.realize()
    buffer = values.data.data
    return lambda index: ir.Buffer.make_loader(buffer)(index)


def called(op: Any, order: Sequence[int], x: ir.TensorBox, *arguments: Any) -> Any:
    """A call of the operator itself, its first operand laid out as `order` says."""
    strides = layout.dense_strides([int(extent) for extent in x.get_size()], order)
    laid_out = ir.ExternKernel.require_exact_strides(x, strides)
    return fallback_handler(op, add_to_fallback_set=False)(laid_out, *arguments)


def random_bits(keys: ir.TensorBox, row: sympy.Expr, inner: Index, extents: Sequence[int]) -> Value:
    """`hash.random_bits` of one element of a dense array of rows, in a loop body."""
    return counter_rng.keyed_hash(_numbered(row, inner, extents), _pair(keys), VALUES)


def random_halves(
    keys: ir.TensorBox, count: int, row: sympy.Expr | Value, inner: Index, extents: Sequence[int]
) -> tuple[Value, Value]:
    """`hash.random_halves` of one element of a dense array of rows, in a loop body; of a computed `row` as well."""
    return counter_rng.keyed_halves(_numbered(row, inner, extents), _pair(keys), count, VALUES)


def _pair(keys: ir.TensorBox) -> tuple[Value, Value]:
    load = keys.make_loader()
    return load([sympy.S.Zero]), load([sympy.S.One])


def _numbered(row: sympy.Expr | Value, inner: Index, extents: Sequence[int]) -> Value:
    """The position of an element in a dense array of rows.

    Numbering the lanes of a vector takes C++ as long as a hash; a body that reads several rows should do it once. The
    union with 0 costs nothing and keeps Inductor from adding up the two expressions, which would number every row.
    """
    if isinstance(row, sympy.Expr):
        first = ops.index_expr(row * math.prod(extents), torch.int32)
    else:
        first = ops.mul(row, ops.constant(math.prod(extents), torch.int32))
    if not inner:
        return first
    lanes = ops.bitwise_or(ops.index_expr(linear(inner, extents), torch.int32), ops.constant(0, torch.int32))
    return ops.add(first, lanes)


def at_most(position: sympy.Expr, last: int, largest: int) -> sympy.Expr:
    """The lesser of `position` and `last`; `largest` is the greatest value `position` takes."""
    return position if largest <= last else sympy.Min(position, last)


def guarded(position: sympy.Expr, end: int, largest: int, body: Callable[[], Value], other: float) -> Value:
    """`body()`, or `other` where `position` is `end` or more; `largest` is the greatest value `position` takes."""
    if largest < end:
        return body()
    inside = ops.lt(ops.index_expr(position, torch.int32), ops.constant(end, torch.int32))
    return ops.masked(inside, body, other)


def word_loader(words: ir.TensorBox) -> Callable[[Index], Value]:
    """Loads int32 `words`, with AVX2 through a mask that holds everywhere.

    PyTorch's plain AVX2 load of int32 goes through the stack and waits some 20 cycles for the store to be forwarded;
    its masked load is one instruction. That one reads whole vectors even at the end of a loop, so that the mask must
    keep it inside the buffer: where rows are no whole number of vectors it compares the position in the inner block.
    """
    load, inner = words.make_loader(), [int(extent) for extent in words.get_size()[1:]]
    if words.get_device_or_error().type != "cpu" or not isinstance(pick_vec_isa(), VecAVX2) or not inner:
        return load
    if inner[-1] % pick_vec_isa().nelements() == 0:
        return lambda index: ops.masked(ops.constant(True, torch.bool), lambda: load(index), 0)
    end = math.prod(inner)
    if end >= counter_rng.INDEX_LIMIT:  # The comparison below is one of int32.
        return load

    def inside(index: Index) -> Value:
        position = ops.index_expr(linear(index[1:], inner), torch.int32)
        return ops.masked(ops.lt(position, ops.constant(end, torch.int32)), lambda: load(index), 0)

    return inside


def readable(x: ir.TensorBox, argument: int = 0) -> ir.TensorBox:
    """`x` such that loading each element once, in any order, recomputes little and keeps no further buffer alive.

    `argument` is its place among the arguments of the operator that is lowered.
    """
    node: Any = V.graph.current_node.args[argument]
    box = x.data
    unrealised = isinstance(box, ir.StorageBox) and isinstance(box.data, ir.Pointwise)
    ours = x.get_dtype() == torch.bool or len(node.users) == 1
    cheap = x.num_reads() <= _CHEAP_READS or all(_stored_anyway(source) for source in node.all_input_nodes)
    if not (unrealised and ours and cheap and node.target in lowerings):
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


def _stored_anyway(node: torch.fx.Node) -> bool:
    """Whether something other than a loop reads the node, so that Inductor will give it a buffer in any case."""
    return any(
        isinstance(user.target, torch._ops.OpOverload)
        and torch.Tag.pointwise not in user.target.tags
        and user.target.namespace != "xconv"
        for user in node.users
    )


def loader(x: ir.TensorBox, order: Sequence[int], dtype: torch.dtype) -> Callable[[Index], Value]:
    """Loads the element of `x` at a physical index, as `dtype`."""
    load, positions = x.make_loader(), layout.inverse(order)
    return lambda index: ops.to_dtype(load([index[position] for position in positions]), dtype)


def decoded(
    like: ir.TensorBox,
    dtype: torch.dtype,
    physical: Sequence[int],
    order: Sequence[int],
    body: Callable[[Index], Value],
) -> ir.TensorBox:
    """The tensor whose element at a physical index is `body(index)`: never stored unless a reader needs it stored."""
    x = ir.Pointwise.create(device=like.get_device(), dtype=dtype, inner_fn=body, ranges=list(physical))
    return lowerings[torch.ops.aten.permute.default](x, list(layout.inverse(order)))


def summed(
    like: ir.TensorBox,
    dtype: torch.dtype,
    body: Callable[[Index, Index], Value],
    shape: Sequence[int],
    counts: Sequence[int],
) -> ir.TensorBox:
    """A buffer of `shape` that holds the sum of `body(index, within)`, in loops over all `within` the `counts`."""
    with config.patch(unroll_reductions_threshold=1):
        total = ir.Reduction.create(
            device=like.get_device_or_error(),
            dst_dtype=dtype,
            src_dtype=dtype,
            inner_fn=body,
            ranges=list(shape),
            reduction_ranges=list(counts),
            reduction_type="sum",
        )
    total.realize()
    return total


def converted(x: ir.TensorBox, dtype: torch.dtype) -> ir.TensorBox:
    """`x` in another dtype."""
    return x if x.get_dtype() == dtype else lowerings[torch.ops.prims.convert_element_type.default](x, dtype)


def ranges(x: ir.TensorBox, order: Sequence[int], parts: Sequence[int]) -> ir.TensorBox:
    """The least and the greatest value of each group of the extents `parts`: a buffer (2, *groups)."""
    sides = [_extreme(x, order, parts, kind) for kind in ("min", "max")]
    # The two reductions write into halves of one buffer, whose strides must be those the fake rule promises.
    with config.patch(comprehensive_padding=False):
        return ir.TensorBox(ir.ConcatKernel.create(sides, 0))


def _extreme(x: ir.TensorBox, order: Sequence[int], parts: Sequence[int], kind: Any) -> ir.TensorBox:
    load, physical = loader(x, order, x.get_dtype()), layout.physical_size(x.get_size(), order)
    counts = [-(-extent // part) for extent, part in zip(physical, parts, strict=True)]
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
