"""Which layers' gradients a graph computes, and where in its forward they run: those that noise can reach.

Not only layers whose input is a residual have a gradient: the first convolution reads the network's input, and scales
of normalisation layers are summed from what the normalisation reads. All of them become noisy by errors that travel in
the output gradients.

Known gap: a matrix product of the output gradient and a parameter that is the gradient of a network's input counts as a
layer's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from xconv_fx.ops.conv import ConvBackward

from .graph import closure, is_tangent, is_view, layer_of, numel
from .op_table import has
from .partition import Pair
from .residuals import Residual, is_normalisation, leaves_the_graph

aten = torch.ops.aten

_CONVERT = torch.ops.prims.convert_element_type.default
# What is summed for a parameter has at most this fraction of the elements that were summed.
_REDUCED = 1 / 16


@dataclass(frozen=True)
class TrainedLayers:
    """`weights` are how many gradients of weights a layer's name stands for ("": layers without a name), `runs` the
    operation of the forward with which a layer begins, `scales` by residual the normalisation layers whose gradients of
    scales are summed from it."""

    weights: Mapping[str, int]
    runs: Mapping[str, fx.Node]
    scales: Mapping[str, tuple[str, ...]]

    @staticmethod
    def of(pair: Pair, residuals: Mapping[str, Residual]) -> TrainedLayers:
        weights: dict[str, int] = {}
        for node in _weight_gradients(pair.backward.graph):
            name = layer_of(node)
            weights[name] = 1 if name else weights.get(name, 0) + 1
        scales = {name: found for name, residual in residuals.items() if (found := _scales(residual))}
        return TrainedLayers(weights, _runs(pair.forward.graph), scales)


def _runs(forward: fx.Graph) -> dict[str, fx.Node]:
    """Where each layer with a weight runs: its first convolution or matrix product."""
    runs: dict[str, fx.Node] = {}
    for node in forward.nodes:
        if node.target is aten.convolution.default or has(node, "product"):
            runs.setdefault(layer_of(node), node)
    return runs


def _weight_gradients(backward: fx.Graph) -> Iterator[fx.Node]:
    tangents = closure(node for node in backward.nodes if is_tangent(node))
    for node in backward.nodes:
        convolution = node.target is aten.convolution_backward.default and ConvBackward.of(node).of_weight
        product = has(node, "product") and node in tangents and leaves_the_graph(node)
        if convolution or (product and any(arg not in tangents for arg in node.all_input_nodes)):
            yield node


def _scales(residual: Residual) -> tuple[str, ...]:
    """The normalisation layers whose scales' gradients are sums of a product of the residual and a gradient."""
    if "norm" not in residual.uses:
        return ()
    limit = numel(residual.backward) * _REDUCED
    reached, waiting = {residual.backward}, [residual.backward]
    products = []
    while waiting:
        for user in waiting.pop().users:
            if user in reached or not is_normalisation(user) or numel(user) <= limit:
                continue
            reached.add(user)
            if len(user.all_input_nodes) > 1 and user.target is aten.mul.Tensor:
                products.append(user)
            if user.target in (aten.mul.Tensor, aten.sub.Tensor, aten.add.Tensor, _CONVERT) or is_view(user):
                waiting.append(user)
    names = (layer_of(product) for product in products if any(_summed(user, limit) for user in product.users))
    return tuple(dict.fromkeys(names))


def _summed(node: fx.Node, limit: float) -> bool:
    """Whether the node is, perhaps after a view, a sum that leaves the graph without another large value."""
    if is_view(node) or node.target is _CONVERT:
        return any(_summed(user, limit) for user in node.users)
    return has(node, "sum") and _leaves_small(node, limit)


def _leaves_small(node: fx.Node, limit: float) -> bool:
    if node.op == "output":
        return True
    return numel(node) <= limit and any(_leaves_small(user, limit) for user in node.users)
