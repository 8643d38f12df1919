"""What is known of values that are the same for every slice of a batch: where they are constant, and where they count.

A first recurrent state of zeros, coordinates beside every sample, a token in front of every sequence: each has a
dimension of the batch's size along which nothing changes. The numbers of the samples themselves, which decompositions
of sampling operations pick with, count along it.
"""

from __future__ import annotations

import operator
from math import prod

import torch
from torch import fx

from .batch_rules import axes_of, moved
from .graph import arguments, is_elementwise, is_reduction, shape_of
from .op_table import has
from .sample_dims import SampleDims, Shared

aten = torch.ops.aten
prims = torch.ops.prims

# Of whose results nothing is known here, although Inductor makes loops of some of them.
_UNKNOWN = (operator.getitem, aten.constant_pad_nd.default, aten._unsafe_index.Tensor)


def shared_value(dims: SampleDims, node: fx.Node) -> Shared:
    """What is known of the result of an operation that reads no samples."""
    inputs, shape = node.all_input_nodes, shape_of(node)
    if has(node, "filled"):
        return Shared(frozenset(range(len(shape))))
    if node.target is prims.iota.default:
        return Shared(counts=0 if node.kwargs["start"] == 0 and node.kwargs["step"] == 1 else None)
    if not inputs or node.target in _UNKNOWN:
        return Shared()
    first = dims.shared(inputs[0])
    if has(node, "same"):
        return first
    if has(node, "moved"):
        return _moved(node, first)
    if has(node, "reshaped"):
        return _viewed(shape_of(inputs[0]), shape, first)
    if node.target is aten.slice.Tensor:
        return Shared(first.constant)
    if node.target is aten.repeat.default:
        return _repeated(node, first)
    if node.target is aten.cat.default:
        axis = axes_of(node, "dim", len(shape))[0]
        parts = [dims.shared(part).constant for part in arguments(node)[0]]
        return Shared(frozenset.intersection(*parts) - {axis})
    if has(node, "product"):
        return _product(dims, node)
    if is_elementwise(node) or node.target is aten.copy.default:
        return Shared(frozenset(axis for axis in range(len(shape)) if _constant(dims, inputs, shape, axis)))
    if is_reduction(node) and len(shape) == len(shape_of(inputs[0])):
        return Shared(first.constant)
    return Shared()


def _constant(dims: SampleDims, operands: list[fx.Node], shape: tuple[int, ...], axis: int) -> bool:
    """Whether all operands, broadcast to `shape`, are constant along this dimension of it."""
    return all(dims.fits(arg, axis - len(shape) + len(shape_of(arg))) for arg in operands)


def _product(dims: SampleDims, node: fx.Node) -> Shared:
    """Equal rows on the left are equal rows of a product of matrices, equal columns on the right equal columns of it.

    So are equal matrices of many, and what is added has to be equal there as well.
    """
    *added, left, right = (arg for arg in arguments(node) if isinstance(arg, fx.Node))
    rank = len(shape_of(node))
    constant = {
        axis
        for axis in range(rank)
        if (axis == rank - 1 or dims.fits(left, axis)) and (axis == rank - 2 or dims.fits(right, axis))
    }
    return Shared(frozenset(axis for axis in constant if _constant(dims, added, shape_of(node), axis)))


def _moved(node: fx.Node, first: Shared) -> Shared:
    old, new, places = shape_of(node.all_input_nodes[0]), shape_of(node), moved(node)
    constant = {
        axis
        for axis, source in enumerate(places)
        if source is None or source in first.constant or old[source] < new[axis]
    }
    return Shared(frozenset(constant), None if first.counts not in places else places.index(first.counts))


def _repeated(node: fx.Node, first: Shared) -> Shared:
    """A dimension of one element, or a new one, is constant once repeated; another one only if it was before."""
    old, times = shape_of(node.all_input_nodes[0]), arguments(node)[1]
    missing = len(times) - len(old)
    return Shared(
        frozenset(
            axis
            for axis in range(len(times))
            if axis < missing or old[axis - missing] == 1 or axis - missing in first.constant
        )
    )


def _viewed(old: tuple[int, ...], new: tuple[int, ...], first: Shared) -> Shared:
    """Dimensions that a change of shape leaves as they are, with the same elements in front of them and behind."""
    if len(first.constant) == len(old):
        return Shared(frozenset(range(len(new))))
    kept = {
        axis: place
        for axis, size in enumerate(old)
        for place, other in enumerate(new)
        if size == other != 1 and prod(old[:axis]) == prod(new[:place])
    }
    constant = frozenset(kept[axis] for axis in first.constant if axis in kept)
    return Shared(constant, kept.get(first.counts) if first.counts is not None else None)
