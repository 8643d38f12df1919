"""Analyse the pair: every residual with its bytes, origin, and the kinds of use that the backward makes of it.

A *residual* is a forward value that crosses to the backward. What may be held in its place depends on how the backward
reads it:

* `mask`: compared with a number to give a boolean (the backward of ReLU and its kin), or a boolean itself;
* `weight_grad`: the activation operand of a convolution's or matrix product's weight gradient, whose result leaves the
  graph without meeting the residual again: linear, and nothing downstream depends on it;
* `norm`: read by the backward of a normalisation, where errors travel on through the variance term;
* `other`: any other linear use (a gradient multiplied by the residual);
* `nonlinear`: everything else. An unbiased approximation would not stay unbiased, so only exact codecs are legal.

The normalisation backward is quadratic in its residual through a reduction over all its elements; the bias this leaves
is the rounding variance over their number, and is neglected (stated here, bounded in `is_linear`).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from xconv_fx import hooks
from xconv_fx.codec_spec import CodecSpec
from xconv_fx.ops.codec import SavedAs
from xconv_fx.ops.conv import ConvBackward

from .graph import (
    arguments,
    closure,
    is_tangent,
    is_view,
    layer_of,
    nbytes,
    numel,
    source_of,
    tensor_of,
)
from .op_table import has
from .partition import Pair

aten = torch.ops.aten

# A product of two values that both depend on the residual counts as linear when one of them has been reduced over at
# least this many elements: the bias is below 1/256 of the rounding variance.
REDUCED = 256


@dataclass(frozen=True)
class Residual:
    """One residual: the forward node that produces it, the backward's placeholder, and how it is read.

    `masks` are the backward's comparisons of it, `order` its dims from the outermost in memory; `readers` are the
    layers whose weight gradients read it, `norms` the normalisation layers whose backward does, as far as they have
    names; `reads` say when the readers ran, by autograd's numbers of the forward's operations; `convolved` says whether
    the weight gradient of a convolution does.
    """

    name: str
    forward: fx.Node
    backward: fx.Node
    uses: frozenset[str]
    masks: tuple[fx.Node, ...]
    order: tuple[int, ...]
    readers: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    reads: tuple[int, ...] = ()
    convolved: bool = False

    @property
    def reader(self) -> str:
        """The first layer whose weight gradient reads it, or ""."""
        return next(iter(self.readers), "")

    @property
    def value(self) -> torch.Tensor:
        value = tensor_of(self.forward)
        assert value is not None
        return value

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(n) for n in self.value.shape)

    @property
    def bytes(self) -> int:
        return nbytes(self.forward)

    @property
    def layer(self) -> str:
        return layer_of(self.forward)

    @property
    def source(self) -> str:
        return source_of(self.forward)

    def saved_as(self, spec: CodecSpec) -> SavedAs:
        """The residual as it is held by a codec."""
        return SavedAs(spec, self.shape, self.value.dtype, self.order)


def find_residuals(pair: Pair) -> dict[str, Residual]:
    """Every floating or boolean residual of the pair by name, in the order the forward saves them."""
    channels_last = hooks.channels_last_convolutions(pair.forward)
    tangents = closure(node for node in pair.backward.graph.nodes if is_tangent(node))
    found = {}
    for name, (forward, backward) in pair.residuals().items():
        value = tensor_of(forward)
        if value is None or not (value.dtype.is_floating_point or value.dtype == torch.bool):
            continue
        reach = _reach(backward, tangents)
        uses = _uses(backward, reach, tangents)
        order = physical_order(value, channels_last)
        layers = _readers(reach, tangents), _norms(reach, tangents), _reads(reach, tangents)
        convolved = any(_reads_as_input(reader, value) for reader, value in reach.readers)
        found[name] = Residual(name, forward, backward, uses, reach.masks, order, *layers, convolved)
    return found


@dataclass(frozen=True)
class _Reach:
    """What the backward recomputes from one residual before any gradient is involved.

    `values` are those nodes in order, the residual first, stopping at `masks`: the comparisons among them. `readers`
    are (node that involves a gradient, the value it reads).
    """

    values: tuple[fx.Node, ...]
    masks: tuple[fx.Node, ...]
    readers: tuple[tuple[fx.Node, fx.Node], ...]


def _reach(residual: fx.Node, tangents: set[fx.Node]) -> _Reach:
    values, masks, readers = [residual], [], []
    for value in values:
        for user in value.users:
            if user in tangents:
                readers.append((user, value))
            elif has(user, "comparison") and user not in masks:
                masks.append(user)
            elif user.op != "output" and user not in values and not has(user, "comparison"):
                values.append(user)
    return _Reach(tuple(values), tuple(masks), tuple(readers))


def physical_order(value: torch.Tensor, channels_last: bool) -> tuple[int, ...]:
    """The dims of an activation, outermost in memory first: what Inductor will lay out, as far as can be foreseen."""
    if value.dim() == 4 and channels_last:
        return (0, 2, 3, 1)
    strides = [int(s) for s in value.stride()]
    return tuple(sorted(range(value.dim()), key=lambda dim: (-strides[dim], dim)))


def _uses(residual: fx.Node, reach: _Reach, tangents: set[fx.Node]) -> frozenset[str]:
    if residual.meta["val"].dtype == torch.bool:
        return frozenset({"mask"})
    kinds = {"mask"} if reach.masks else set()
    for reader, value in reach.readers:
        if _is_weight_gradient(reader, value, tangents):
            kinds.add("weight_grad")
        elif is_normalisation(reader):
            kinds.add("norm")
        else:
            kinds.add("other")
    if not is_linear(residual, set(reach.masks)):
        kinds.add("nonlinear")
    return frozenset(kinds)


def _is_weight_gradient(reader: fx.Node, value: fx.Node, tangents: set[fx.Node]) -> bool:
    if _reads_as_input(reader, value):
        return ConvBackward.of(reader).of_weight
    if has(reader, "product"):
        return any(node in tangents for node in reader.all_input_nodes) and leaves_the_graph(reader)
    return False


def _reads_as_input(reader: fx.Node, value: fx.Node) -> bool:
    """Whether the backward of a convolution reads the value as the convolution's input, and not as its gradient."""
    backward = reader.target is aten.convolution_backward.default
    return backward and reader.args[1] is value and reader.args[0] is not value


def _weight_gradients(reach: _Reach, tangents: set[fx.Node]) -> Iterator[fx.Node]:
    return (reader for reader, value in reach.readers if _is_weight_gradient(reader, value, tangents))


def _readers(reach: _Reach, tangents: set[fx.Node]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, map(layer_of, _weight_gradients(reach, tangents)))))


def _reads(reach: _Reach, tangents: set[fx.Node]) -> tuple[int, ...]:
    numbers = (node.meta.get("seq_nr") for node in _weight_gradients(reach, tangents))
    return tuple(sorted({number for number in numbers if number is not None}))


def _norms(reach: _Reach, tangents: set[fx.Node]) -> tuple[str, ...]:
    others = (reader for reader, value in reach.readers if not _is_weight_gradient(reader, value, tangents))
    return tuple(dict.fromkeys(filter(None, (layer_of(reader) for reader in others if is_normalisation(reader)))))


def leaves_the_graph(node: fx.Node) -> bool:
    """Whether the node's value only reaches the graph's outputs, through views, sums and conversions."""
    passing = {torch.ops.prims.convert_element_type.default, aten.sum.dim_IntList, aten.clone.default}
    return all(
        user.op == "output" or ((is_view(user) or user.target in passing) and leaves_the_graph(user))
        for user in node.users
    )


def is_normalisation(node: fx.Node) -> bool:
    return any("norm" in str(node.meta.get(key, "")) for key in ("original_aten", "source_fn_stack"))


def is_linear(residual: fx.Node, masks: set[fx.Node] = frozenset()) -> bool:  # type: ignore[assignment]
    """Whether every output of the backward is linear in the residual, its `masks` taken as known.

    Values that depend on the residual are followed to the outputs. A product of two of them is quadratic, and passes
    only when one factor was reduced over at least `REDUCED` elements.
    """
    total = numel(residual)
    known = _known_through(masks, residual)
    dependent = {residual}
    # In the graph's order, so that all inputs of a node are looked at before it.
    waiting = list(residual.users)
    heapq.heapify(waiting)
    while waiting:
        node = heapq.heappop(waiting)
        if node in dependent or node in known or not node.users:
            continue
        if not _keeps_linearity(node, [arg for arg in node.all_input_nodes if arg in dependent], total):
            return False
        dependent.add(node)
        for user in node.users:
            heapq.heappush(waiting, user)
    return True


def _known_through(masks: set[fx.Node], residual: fx.Node) -> set[fx.Node]:
    """The masks, and what lies between the residual and nothing but them."""
    known, waiting = set(masks), list(masks)
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source is not residual and source not in known and all(user in known for user in source.users):
                known.add(source)
                waiting.append(source)
    return known


def _keeps_linearity(node: fx.Node, inputs: list[fx.Node], total: int) -> bool:
    if is_view(node) or has(node, "linear"):
        return not (node.target is aten.where.self and node.args[0] in inputs)
    if node.target is aten.div.Tensor:
        return node.args[1] not in inputs
    if has(node, "bilinear"):
        operands = [arg for arg in arguments(node) if arg in inputs]
        large = [arg for arg in operands if numel(arg) * REDUCED > total]
        return len(large) <= 1
    if node.target is aten.max_pool2d_with_indices_backward.default:
        return node.args[0] in inputs and len(inputs) == 1
    if node.target is aten.scatter_add.default:
        return node.args[2] not in inputs
    if "_backward" in str(node.target):
        return inputs == [node.args[0]]
    return False


def small(residual: Residual, total: int) -> bool:
    """Too small to be worth a kernel: below 4 KiB, or a thousandth of all residual bytes."""
    return residual.bytes < max(4096, total // 1000)


def uncompressible(residuals: dict[str, Residual]) -> tuple[str, ...]:
    """A note for each residual that no approximate codec may hold, and why."""
    total = sum(residual.bytes for residual in residuals.values())
    return tuple(
        f"{residual.layer or residual.name}: {residual.name} is read nonlinearly by the backward; "
        "only exact codecs are legal for it"
        for residual in residuals.values()
        if "nonlinear" in residual.uses and not small(residual, total)
    )
