"""Which operations compute each sample of their result from the same sample of their operands: one table of rules.

`rule_of(node)` is a function of (`SampleDims`, node) that gives the batch dimension of the node's result, or raises
`Mixing`; some operand is batched. None where an operation is not known. What is known of results of shared operands
alone is in `shared_values.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import fx

from xconv_fx.hooks.dispatch import OpOverload, arguments_of

from .graph import arguments, is_elementwise, is_reduction, shape_of
from .op_table import batch_rule
from .sample_dims import Dim, Mixing, SampleDims

aten = torch.ops.aten

Rule = Callable[[SampleDims, fx.Node], Dim]


def rule_of(node: fx.Node) -> Rule | None:
    if node.target is operator.getitem:
        return unchanged
    if name := batch_rule(node.target):
        return RULES[name]
    if is_elementwise(node) and not _is_codec(node):
        return elementwise
    return reduced if is_reduction(node) else None


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """The operator's argument of this name, positional, by keyword or as its schema has it; else `default`."""
    for place, known in enumerate(arguments_of(node.target)):
        if known.name == name:
            if place < len(node.args):
                return node.args[place]
            return node.kwargs.get(name, known.default_value)
    return default


def axes_of(node: fx.Node, name: str, rank: int) -> list[int]:
    """The dimensions that an argument names, none of them negative."""
    given = argument(node, name)
    return [int(axis) % rank for axis in (given if isinstance(given, (list, tuple)) else [given])]


def _is_codec(node: fx.Node) -> bool:
    """Whether it is an operator of a codec, of a model that holds sketches itself: its results have another shape."""
    return isinstance(node.target, OpOverload) and node.target.namespace == "xconv"


def _first(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0]


def moved(node: fx.Node) -> list[int | None]:
    """For each dimension of the result of a rearrangement the one of its operand that it is; None for a new one."""
    old = shape_of(_first(node))
    every: list[int | None] = list(range(len(old)))
    target = node.target
    if target is aten.permute.default:
        return [*axes_of(node, "dims", len(old))]
    if target is aten.t.default:
        return every[::-1]
    if target is aten.transpose.int:
        a, b = axes_of(node, "dim0", len(old))[0], axes_of(node, "dim1", len(old))[0]
        every[a], every[b] = every[b], every[a]
    elif target is aten.unsqueeze.default:
        every.insert(axes_of(node, "dim", len(old) + 1)[0], None)
    elif target in _SQUEEZES:
        given = range(len(old)) if target is aten.squeeze.default else axes_of(node, "dim", len(old))
        every = [axis for axis in range(len(old)) if axis not in given or old[axis] != 1]
    elif target in (aten.select.int, aten.unbind.int):
        every.pop(axes_of(node, "dim", len(old))[0])
    elif target is aten.expand.default:
        return [*[None] * (len(shape_of(node)) - len(old)), *every]
    return every


def rearranged(dims: SampleDims, node: fx.Node) -> Dim:
    dim, places = dims.batched(_first(node)), moved(node)
    if dim not in places:
        gone = "picks a sample" if node.target in (aten.select.int, aten.unbind.int) else "removes the batch dimension"
        raise Mixing(node, f"{node.target} {gone}")
    return places.index(dim)


def elementwise(dims: SampleDims, node: fx.Node) -> Dim:
    """Broadcasting lines up last dimensions: every batched operand must have its batch in the same place."""
    return dims.line_up(node, node.all_input_nodes, shape_of(node))


def reduced(dims: SampleDims, node: fx.Node) -> Dim:
    """A reduction over dimensions that leave the batch out."""
    dim, rank = dims.sole(node), len(shape_of(_first(node)))
    over = argument(node, "dim")
    if over is None or (isinstance(over, (list, tuple)) and not over):
        raise Mixing(node, "a reduction over all samples")
    axes = set(axes_of(node, "dim", rank))
    if dim in axes:
        raise Mixing(node, "a reduction over samples, as in batch normalisation")
    return dim if len(shape_of(node)) == rank else dim - sum(axis < dim for axis in axes)


def view(dims: SampleDims, node: fx.Node) -> Dim:
    """The samples of the result: where the same rows in front of them end, if whole samples follow."""
    dim = dims.batched(_first(node))
    place = samples_after_view(shape_of(_first(node)), dim, shape_of(node), dims.batch)
    if place is None:
        raise Mixing(node, "a change of shape that splits samples")
    return place


def samples_after_view(old: tuple[int, ...], dim: int, new: tuple[int, ...], batch: int) -> int | None:
    """Where the samples are that stood along `dim` of a tensor, after its elements were given another shape."""
    before = prod(old[:dim])
    for place, size in enumerate(new):
        if prod(new[:place]) == before and size % batch == 0 and (size > 1 or batch == 1):
            return place
    return None


def along(*names: str) -> Rule:
    """An operation that goes along the dimensions that these arguments name, none of them the batch's."""

    def rule(dims: SampleDims, node: fx.Node) -> Dim:
        dim, rank = dims.sole(node), len(shape_of(_first(node)))
        axes = {axis for name in names for axis in axes_of(node, name, rank)}
        if dim in axes or not axes:
            raise Mixing(node, f"{node.target} picks samples")
        return dim

    return rule


def last_two(dims: SampleDims, node: fx.Node) -> Dim:
    dim = dims.sole(node)
    if dim >= len(shape_of(node)) - 2:
        raise Mixing(node, f"{node.target} picks samples")
    return dim


def beside_along(dims: SampleDims, node: fx.Node) -> Dim:
    """Operands of the same rank, put together or indexed along another dimension than the batch's."""
    parts = node.all_input_nodes
    dim = dims.batched(next(part for part in parts if dims.is_batched(part)))
    axis = axes_of(node, "dim", len(shape_of(parts[0])))[0]
    sizes = {shape_of(part)[dim] for part in parts}
    if axis == dim or len(sizes) > 1 or not all(_holds(dims, part, dim) for part in parts):
        raise Mixing(node, "samples are put beside each other, or beside constants")
    return dim


def _holds(dims: SampleDims, part: fx.Node, dim: int) -> bool:
    """Whether an operand that is not broadcast has samples along `dim`, or is constant there."""
    found = dims.of(part)
    return found == dim if isinstance(found, int) else dim in found.constant


def select_scattered(dims: SampleDims, node: fx.Node) -> Dim:
    whole, part = arguments(node)[:2]
    axis = axes_of(node, "dim", len(shape_of(whole)))[0]
    dim = dims.batched(whole) if dims.is_batched(whole) else dims.batched(part) + (dims.batched(part) >= axis)
    if dim == axis or not _holds(dims, whole, dim) or not _holds(dims, part, dim - (axis < dim)):
        raise Mixing(node, "samples are written over other samples")
    return dim


def padded(dims: SampleDims, node: fx.Node) -> Dim:
    dim, pad = dims.sole(node), arguments(node)[1]
    if len(pad) // 2 > len(shape_of(node)) - 1 - dim:
        raise Mixing(node, "samples are added by padding")
    return dim


def repeated(dims: SampleDims, node: fx.Node) -> Dim:
    dim, times = dims.sole(node), arguments(node)[1]
    place = dim + len(times) - len(shape_of(_first(node)))
    if times[place] != 1:
        raise Mixing(node, "samples are repeated")
    return place


def expanded(dims: SampleDims, node: fx.Node) -> Dim:
    place = rearranged(dims, node)
    assert isinstance(place, int)
    if shape_of(node)[place] != shape_of(_first(node))[dims.batched(_first(node))]:
        raise Mixing(node, "samples are repeated")
    return place


def first_dim(dims: SampleDims, node: fx.Node) -> Dim:
    """Convolutions, pooling and resampling: the batch is the first dimension, each sample apart."""
    if dims.sole(node) != 0:
        raise Mixing(node, "samples are not the first dimension")
    return 0


def all_first(dims: SampleDims, node: fx.Node) -> Dim:
    """Every operand has samples first, or is the same for all of them."""
    if not all(dims.fits(part, 0) for part in node.all_input_nodes):
        raise Mixing(node, "samples are not the first dimension")
    return 0


def rows(dims: SampleDims, node: fx.Node) -> Dim:
    """Normalisation over last dimensions; a draw for each row of a matrix."""
    dim, shape = dims.sole(node), argument(node, "normalized_shape", (1,))
    if dim >= len(shape_of(_first(node))) - len(shape):
        raise Mixing(node, f"{node.target} reads several samples")
    return dim


def looked_up(dims: SampleDims, node: fx.Node) -> Dim:
    """Rows of a shared table, by numbers that belong to samples."""
    table, numbers = arguments(node)[:2]
    if dims.is_batched(table):
        raise Mixing(node, "samples are picked by an index")
    return dims.batched(numbers)


def binned(dims: SampleDims, node: fx.Node) -> Dim:
    return dims.sole(node)


def product(dims: SampleDims, node: fx.Node) -> Dim:
    """A matrix product with a shared matrix keeps the rows (or columns) of the other one apart; also many at once."""
    left, right = arguments(node)[-2:]
    rank = len(shape_of(left))
    a, b = dims.of(left), dims.of(right)
    if rank == 3 and 0 in (a, b) and _holds(dims, left, 0) and _holds(dims, right, 0):
        place = 0
    elif a == rank - 2 and not dims.is_batched(right):
        place = rank - 2
    elif b == rank - 1 and not dims.is_batched(left):
        place = rank - 1
    else:
        raise Mixing(node, "a product of samples with samples")
    for bias in arguments(node)[:-2]:
        if not dims.fits(bias, place - rank + len(shape_of(bias))):
            raise Mixing(node, "a bias for each sample")
    return place


def indexed(dims: SampleDims, node: fx.Node) -> Dim:
    """Positions picked in dimensions behind the batch's, or of each sample by the sample's own numbers."""
    source, indices = arguments(node)[:2]
    picked = [axis for axis, index in enumerate(indices) if index is not None]
    given = [indices[axis] for axis in picked]
    together = picked == list(range(picked[0], picked[-1] + 1))
    rank = max(len(shape_of(index)) for index in given)
    front = picked[0] if together else 0
    if not dims.is_batched(source):
        shape = shape_of(node)[front : front + rank]
        return front + dims.line_up(node, given, shape)
    dim = dims.batched(source)
    if dim not in picked:
        if any(dims.is_batched(index) for index in given):
            raise Mixing(node, "samples are picked by an index")
        if not together:
            return rank + dim - sum(axis < dim for axis in picked)
        return dim if dim < front else dim - len(picked) + rank
    if shape_of(source)[dim] != dims.batch:
        raise Mixing(node, "samples are picked by an index")
    return front + _counted(dims, node, indices[dim], [index for index in given if index is not indices[dim]])


def _counted(dims: SampleDims, node: fx.Node, counter: fx.Node, others: list[fx.Node]) -> int:
    """The place of samples among broadcast indices, of which `counter` numbers the samples in order."""
    known = dims.of(counter)
    if isinstance(known, int) or known.counts is None:
        raise Mixing(node, "samples are picked by an index")
    size = shape_of(counter)[known.counts]
    rank = max(len(shape_of(index)) for index in (counter, *others))
    place = known.counts - len(shape_of(counter)) + rank
    if size != dims.batch or not all(dims.fits(index, place - rank + len(shape_of(index))) for index in others):
        raise Mixing(node, "samples are picked by an index")
    return place


def restrided(dims: SampleDims, node: fx.Node) -> Dim:
    """What decompositions write for a change of shape: every element once, in the same order."""
    source = _first(node)
    old, new = source.meta["val"], node.meta["val"]
    if old.storage_offset() == new.storage_offset() and old.numel() == new.numel():
        if old.is_contiguous() and new.is_contiguous():
            return view(dims, node)
        sizes = zip(old.shape, new.shape, old.stride(), new.stride(), strict=False)
        if old.dim() == new.dim() and all(n == m and (n == 1 or a == b) for n, m, a, b in sizes):
            return dims.of(source)
    raise Mixing(node, "samples are read by strides")


def unchanged(dims: SampleDims, node: fx.Node) -> Dim:
    return dims.of(_first(node))


_SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)

# The rules that rows of `op_table.py` name.
RULES: dict[str, Rule] = {
    "unchanged": unchanged,
    "elementwise": elementwise,
    "view": view,
    "rearranged": rearranged,
    "expanded": expanded,
    "repeated": repeated,
    "restrided": restrided,
    "along dim": along("dim"),
    "along dims": along("dims"),
    "along dimension": along("dimension"),
    "last two": last_two,
    "beside along": beside_along,
    "select scattered": select_scattered,
    "padded": padded,
    "product": product,
    "indexed": indexed,
    "looked up": looked_up,
    "binned": binned,
    "rows": rows,
    "first dim": first_dim,
    "all first": all_first,
}
