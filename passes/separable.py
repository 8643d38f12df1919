"""Whether a graph treats the samples of a batch apart, so that it may run on one slice of the batch after another.

A network without batch statistics computes every sample's result from that sample and the parameters alone. Then the
result of a batch is the results of its slices, put together, and the gradient of every parameter is the sum over them:
exactly, whatever the slices' size. The activations that are alive at once shrink with the slice.

The proof is by following the batch dimension through the forward's operations. Every value is one of

* *shared*: computed from parameters and constants, the same for all slices;
* *batched* along one dimension, whose index is sample-major: sample times m plus a position within the sample;
* *uniform*: one number everywhere, or random numbers, which fit both.

An operation passes when it computes each sample of its result from the same sample of its operands; one that is not
known to do so stops the proof. What stops it most often is the reduction over the batch in batch normalisation.

Known gap: in-place changes of buffers and results that are no batch (a loss computed inside the model) stop it as well.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch._inductor.inductor_prims  # defines the pooling operator below
from torch import fx

from .graph import (
    ancestors,
    arguments,
    is_elementwise,
    is_primal,
    is_reduction,
    layer_of,
    output_node,
    shape_of,
    tensor_of,
)

aten = torch.ops.aten
prims = torch.ops.prims


class _Uniform:
    """The dimension of a value that is the same at every index, or random."""


UNIFORM = _Uniform()
# The batch dimension of a value; None for a shared one.
Dim = int | None | _Uniform


class Mixing(Exception):
    """An operation that may mix samples: the proof stops at `node`, for `reason`."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        place = layer_of(node)
        super().__init__(f"{reason} ({node.name}{' in ' + place if place else ''})")
        self.node, self.reason = node, reason


def why_not_separable(joint: fx.GraphModule, batched: Sequence[bool], batch: int, results: int) -> str:
    """Why a joint graph may not run on slices of its batch; "" when it may.

    `batched[i]` says whether the i-th input holds `batch` samples along its first dimension; the first `results`
    outputs are the forward's.
    """
    placeholders = [node for node in joint.graph.find_nodes(op="placeholder") if is_primal(node)]
    if len(placeholders) != len(batched):
        return "inputs share memory"
    inputs = {node: 0 for node, is_batched in zip(placeholders, batched, strict=True) if is_batched}
    outputs = arguments(output_node(joint.graph))[0][:results]
    try:
        check_separable([node for node in outputs if isinstance(node, fx.Node)], inputs, batch)
    except Mixing as found:
        return str(found)
    return ""


def check_separable(results: Sequence[fx.Node], inputs: Mapping[fx.Node, int], batch: int) -> None:
    """Raise `Mixing` unless every result is computed sample by sample.

    `results` are forward values, `inputs` the placeholders that hold samples, with the dimension of the batch; `batch`
    is its size. The dimension of every result must be its first, with one index for a sample.
    """
    dims = _Dims(dict(inputs), batch)
    for node in ancestors(results):
        dims.visit(node)
    for node in results:
        value = tensor_of(node)
        if value is None or dims.of(node) != 0 or int(value.shape[0]) != batch:
            raise Mixing(node, "a result of the model is not one row for each sample")


class _Dims:
    """The batch dimension of every value visited."""

    def __init__(self, known: dict[fx.Node, int], batch: int) -> None:
        self.batch = batch
        self.found: dict[fx.Node, Dim] = dict(known)

    def of(self, node: fx.Node) -> Dim:
        return self.found[node]

    def visit(self, node: fx.Node) -> None:
        if node in self.found or node.op == "output":
            return
        if node.op in ("placeholder", "get_attr"):
            self.found[node] = None
            return
        inputs = node.all_input_nodes
        if node.target in _FILLED or (_is_random(node) and not any(isinstance(self.found[arg], int) for arg in inputs)):
            self.found[node] = UNIFORM
        elif all(self.found[arg] is None for arg in inputs):
            self.found[node] = None
        elif is_elementwise(node) and node.target not in _RULES and not _is_codec(node):
            self.found[node] = self.elementwise(node)
        elif is_reduction(node):
            self.found[node] = self.reduced(node)
        elif node.target in _RULES:
            self.found[node] = _RULES[node.target](self, node)
        else:
            raise Mixing(node, f"{node.target} is not known to treat samples apart")

    def sole(self, node: fx.Node) -> int:
        """The batch dimension of an operation whose first operand alone may be batched."""
        first, *rest = node.all_input_nodes
        dim = self.found[first]
        if not isinstance(dim, int) or any(self.found[arg] is not None for arg in rest):
            raise Mixing(node, f"{node.target} reads samples where weights are expected")
        return dim

    def elementwise(self, node: fx.Node) -> Dim:
        """Broadcasting lines up last dimensions: every batched operand must have its batch in the same place."""
        shape = shape_of(node)
        places: set[int] = set()
        for arg in node.all_input_nodes:
            dim = self.found[arg]
            if isinstance(dim, int):
                place = dim - len(shape_of(arg)) + len(shape)
                if shape_of(arg)[dim] != shape[place]:
                    raise Mixing(node, "samples are broadcast against something else")
                places.add(place)
        if not places:
            return UNIFORM if all(self.found[arg] is UNIFORM for arg in node.all_input_nodes) else None
        if len(places) > 1:
            raise Mixing(node, "samples are combined with other samples")
        place = places.pop()
        for arg in node.all_input_nodes:
            at = place - len(shape) + len(shape_of(arg))
            if self.found[arg] is None and at >= 0 and shape_of(arg)[at] != 1:
                raise Mixing(node, "each sample meets a constant of its own")
        return place

    def reduced(self, node: fx.Node) -> Dim:
        """A reduction over dimensions that leave the batch out."""
        source = node.all_input_nodes[0]
        dim = self.sole(node)
        rank = len(shape_of(source))
        over: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if over is None or (isinstance(over, (list, tuple)) and not over):
            raise Mixing(node, "a reduction over all samples")
        axes = {axis % rank for axis in (over if isinstance(over, (list, tuple)) else [over])}
        if dim in axes:
            raise Mixing(node, "a reduction over samples, as in batch normalisation")
        value = node.meta["val"]
        kept = len((value[0] if isinstance(value, (tuple, list)) else value).shape) == rank
        return dim if kept else dim - sum(axis < dim for axis in axes)

    def view(self, node: fx.Node) -> Dim:
        """The samples of the result: where the same rows in front of them end, if whole samples follow."""
        source = node.all_input_nodes[0]
        dim = self.found[source]
        if not isinstance(dim, int):
            return dim
        old, new = shape_of(source), shape_of(node)
        before = prod(old[:dim])
        for place, size in enumerate(new):
            if prod(new[:place]) == before and size % self.batch == 0 and (size > 1 or self.batch == 1):
                return place
        raise Mixing(node, "a change of shape that splits samples")

    def permuted(self, node: fx.Node) -> Dim:
        dim = self.found[node.all_input_nodes[0]]
        return (
            dim if not isinstance(dim, int) else [int(d) % len(shape_of(node)) for d in arguments(node)[1]].index(dim)
        )

    def transposed(self, node: fx.Node) -> Dim:
        dim, rank = self.found[node.all_input_nodes[0]], len(shape_of(node))
        first, second = (0, 1) if node.target is aten.t.default else (int(d) % rank for d in arguments(node)[1:3])
        if not isinstance(dim, int):
            return dim
        return {first: second, second: first}.get(dim, dim) if rank > 1 else dim

    def unsqueezed(self, node: fx.Node) -> Dim:
        dim = self.found[node.all_input_nodes[0]]
        return dim if not isinstance(dim, int) else dim + (int(arguments(node)[1]) % len(shape_of(node)) <= dim)

    def squeezed(self, node: fx.Node) -> Dim:
        source = node.all_input_nodes[0]
        dim, shape = self.found[source], shape_of(source)
        if not isinstance(dim, int):
            return dim
        given = arguments(node)[1] if len(node.args) > 1 else range(len(shape))
        axes = {int(d) % len(shape) for d in (given if isinstance(given, (list, tuple, range)) else [given])}
        gone = {axis for axis in axes if shape[axis] == 1}
        if dim in gone:
            raise Mixing(node, "the batch dimension is removed")
        return dim - sum(axis < dim for axis in gone)

    def expanded(self, node: fx.Node) -> Dim:
        source = node.all_input_nodes[0]
        dim = self.found[source]
        if not isinstance(dim, int):
            return dim
        place = dim + len(shape_of(node)) - len(shape_of(source))
        if shape_of(node)[place] != shape_of(source)[dim]:
            raise Mixing(node, "samples are repeated")
        return place

    def along(self, node: fx.Node, axis: int) -> Dim:
        """An operation that picks from or goes along another dimension than the batch's."""
        dim = self.sole(node)
        if axis % len(shape_of(node.all_input_nodes[0])) == dim:
            raise Mixing(node, f"{node.target} picks samples")
        return dim

    def sliced(self, node: fx.Node) -> Dim:
        return self.along(node, int(arguments(node)[1]) if len(node.args) > 1 else 0)

    def split(self, node: fx.Node) -> Dim:
        return self.along(node, int(arguments(node)[2]) if len(node.args) > 2 else 0)

    def softmax(self, node: fx.Node) -> Dim:
        return self.along(node, int(arguments(node)[1]))

    def selected(self, node: fx.Node) -> Dim:
        dim, axis = self.sliced(node), int(arguments(node)[1]) % len(shape_of(node.all_input_nodes[0]))
        assert isinstance(dim, int)
        return dim - (axis < dim)

    def concatenated(self, node: fx.Node) -> Dim:
        parts = arguments(node)[0]
        rank = len(shape_of(parts[0]))
        axis = int(arguments(node)[1]) % rank if len(node.args) > 1 else 0
        dims = {self.found[part] for part in parts}
        if len(dims) != 1 or axis in dims:
            raise Mixing(node, "samples are put beside each other, or beside constants")
        return dims.pop()

    def padded(self, node: fx.Node) -> Dim:
        dim, pad = self.sole(node), arguments(node)[1]
        if len(pad) // 2 > len(shape_of(node)) - 1 - dim:
            raise Mixing(node, "samples are added by padding")
        return dim

    def first_dim(self, node: fx.Node) -> Dim:
        """Convolutions, pooling and resampling: the batch is the first dimension, each sample apart."""
        if self.sole(node) != 0:
            raise Mixing(node, "samples are not the first dimension")
        return 0

    def product(self, node: fx.Node) -> Dim:
        """A matrix product with a shared matrix keeps the rows (or columns) of the other one apart."""
        *bias, left, right = node.all_input_nodes if len(node.all_input_nodes) > 1 else node.all_input_nodes * 2
        a, b = self.found[left], self.found[right]
        if any(self.found[part] is not None for part in bias):
            raise Mixing(node, "a bias for each sample")
        if a == 0 and b is None:
            return 0
        if a is None and b == 1 and not bias:
            return 1
        raise Mixing(node, "a product of samples with samples")

    def batched_product(self, node: fx.Node) -> Dim:
        dims = [self.found[part] for part in arguments(node)[-2:]]
        if len(node.args) > 2 or not all(dim == 0 for dim in dims):
            raise Mixing(node, "a product of samples with something else")
        return 0

    def indexed(self, node: fx.Node) -> Dim:
        """Positions picked by shared indices, in dimensions behind the batch's."""
        dim, indices = self.sole(node), arguments(node)[1]
        picked = [axis for axis, index in enumerate(indices) if index is not None]
        if not picked or min(picked) <= dim:
            raise Mixing(node, "samples are picked by an index")
        return dim

    def restrided(self, node: fx.Node) -> Dim:
        """What decompositions write for a change of shape: every element once, in the same order."""
        source = node.all_input_nodes[0]
        old, new = source.meta["val"], node.meta["val"]
        if old.storage_offset() == new.storage_offset() and old.numel() == new.numel():
            if old.is_contiguous() and new.is_contiguous():
                return self.view(node)
            sizes = zip(old.shape, new.shape, old.stride(), new.stride(), strict=False)
            if old.dim() == new.dim() and all(n == m and (n == 1 or a == b) for n, m, a, b in sizes):
                return self.found[source]
        raise Mixing(node, "samples are read by strides")

    def item(self, node: fx.Node) -> Dim:
        return self.found[node.all_input_nodes[0]]


def _is_codec(node: fx.Node) -> bool:
    """Whether it is an operator of a codec, of a model that holds sketches itself: its results have another shape."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "xconv"


def _is_random(node: fx.Node) -> bool:
    """Whether the values are random numbers. Inductor's seeds are not: one number that all samples share."""
    if getattr(node.target, "namespace", "") == "prims":
        return node.target is prims.inductor_random.default
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def is_random(graph: fx.Graph) -> bool:
    """Whether the graph draws random numbers."""
    return any(torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) for node in graph.nodes)


_FILLED = {aten.full.default, aten.full_like.default, aten.zeros_like.default, aten.ones_like.default,
           aten.scalar_tensor.default, aten.empty.memory_format}  # fmt: skip


def _named(*names: str) -> list[Any]:
    """Every overload of these operators of ATen."""
    packets = [getattr(aten, name) for name in names]
    return [getattr(packet, overload) for packet in packets for overload in packet.overloads()]


_RULES: dict[Any, Callable[[_Dims, fx.Node], Dim]] = {
    operator.getitem: _Dims.item,
    **dict.fromkeys(_named("view", "reshape", "_unsafe_view"), _Dims.view),
    **dict.fromkeys(_named("permute"), _Dims.permuted),
    **dict.fromkeys([aten.transpose.int, aten.t.default], _Dims.transposed),
    aten.unsqueeze.default: _Dims.unsqueezed,
    **dict.fromkeys([aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims], _Dims.squeezed),
    aten.expand.default: _Dims.expanded,
    **dict.fromkeys([aten.alias.default, aten.detach.default], _Dims.item),
    aten.as_strided.default: _Dims.restrided,
    aten.slice.Tensor: _Dims.sliced,
    aten.select.int: _Dims.selected,
    **dict.fromkeys([aten.split.Tensor, aten.split_with_sizes.default], _Dims.split),
    aten._softmax.default: _Dims.softmax,
    aten._log_softmax.default: _Dims.softmax,
    aten.cat.default: _Dims.concatenated,
    aten.constant_pad_nd.default: _Dims.padded,
    **dict.fromkeys([aten.mm.default, aten.addmm.default], _Dims.product),
    **dict.fromkeys([aten.bmm.default, aten.baddbmm.default], _Dims.batched_product),
    **dict.fromkeys([aten.index.Tensor, aten._unsafe_index.Tensor], _Dims.indexed),
    **dict.fromkeys(
        [
            aten.convolution.default,
            prims._low_memory_max_pool_with_offsets.default,
            *_named(
                "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d",
                "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d",
                "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d",
                "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d", "pixel_shuffle",
                "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d",
                "replication_pad3d", "native_group_norm",
            ),
        ],
        _Dims.first_dim,
    ),
}  # fmt: skip
