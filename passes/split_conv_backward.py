"""Split every `convolution_backward` into its weight half and its input half.

A fused node holds the layer's input until the input gradient has been allocated, which is where a backward pass
peaks. The weight half comes first in the graph: what is held for it is released before the input gradient exists.
The input half reads the input's shape alone, so a layer with a frozen weight needs no residual at all.

A depthwise convolution on CUDA has kernels of its own, and those of its input gradient are called by
`convolution_backward` alone: as a transposed convolution in so many groups it is several times slower. There the input
half is `convolution_backward` as well. That wants an operand of the input's shape, of which it reads nothing else: the
incoming gradient where that has it. Where it has not (strides), the node stays whole.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx

from xconv_fx.ops.conv import ConvBackward, input_gradient

from .graph import arguments, inline, is_tangent, origin_meta, shape_of, tensor_of

aten = torch.ops.aten


def split_backward(gm: fx.GraphModule, channels_last: bool = True, device: str | None = None) -> None:
    """Rewrite the joint graph in place. A node that computes only a weight gradient stays as it is.

    `channels_last` says that Inductor will lay out images so, `device` where the graph will be, if that is not where it
    was traced.
    """
    for node in gm.graph.find_nodes(op="call_function", target=aten.convolution_backward.default):
        call = ConvBackward.of(node)
        if call.of_input:
            if channels_last:
                _share_layout(gm.graph, node)
            own = _has_own_kernels(call, device)
            if not own or shape_of(call.x) == shape_of(call.grad):
                _split(gm.graph, node, _own_input_half if own else _input_half)
    gm.graph.lint()
    gm.recompile()


def _share_layout(graph: fx.Graph, node: fx.Node) -> None:
    """One channels-last copy of an incoming gradient for both halves, where Inductor would make one for each."""
    grad = ConvBackward.of(node).grad
    value = tensor_of(grad)
    if (
        not is_tangent(grad)
        or value is None
        or value.dim() != 4
        or value.is_contiguous(memory_format=torch.channels_last)
    ):
        return
    with graph.inserting_before(node):
        (copied,) = inline(graph, lambda g: g.clone(memory_format=torch.channels_last), [grad], origin_meta(node))
    node.replace_input_with(grad, copied)


def _has_own_kernels(call: ConvBackward, device: str | None) -> bool:
    """Whether this is a depthwise convolution that will be on CUDA."""
    value = tensor_of(call.x)
    assert value is not None
    depthwise = 1 < call.geometry.groups == value.shape[1] and not call.geometry.transposed
    return depthwise and torch.device(device or value.device).type == "cuda"


def _split(graph: fx.Graph, node: fx.Node, input_half: Callable[[fx.Graph, fx.Node], fx.Node]) -> None:
    outputs = {arguments(user)[1]: user for user in node.users}
    with graph.inserting_before(node):
        halves = {**_parameter_half(graph, node), 0: input_half(graph, node)}
    for index, old in outputs.items():
        halves[index].meta = {**old.meta, **halves[index].meta}
        old.replace_all_uses_with(halves[index])
        graph.erase_node(old)
    graph.erase_node(node)


def _parameter_half(graph: fx.Graph, node: fx.Node) -> dict[int, fx.Node]:
    """The gradients of weight (1) and bias (2), those that the node computes."""
    call = ConvBackward.of(node)
    if not call.of_weight:
        return {2: _bias_gradient(graph, node)} if call.of_bias else {}
    half = graph.call_function(aten.convolution_backward.default, (*node.args[:-1], [False, True, call.of_bias]))
    value = node.meta["val"]
    half.meta = {**origin_meta(node), "val": (None, value[1], value[2] if call.of_bias else None)}
    picked = {}
    for index in (1, 2) if call.of_bias else (1,):
        picked[index] = graph.call_function(operator.getitem, (half, index))
        picked[index].meta = {**origin_meta(node), "val": value[index]}
    return picked


def _bias_gradient(graph: fx.Graph, node: fx.Node) -> fx.Node:
    grad = ConvBackward.of(node).grad
    dims = [dim for dim in range(len(grad.meta["val"].shape)) if dim != 1]
    return inline(graph, lambda g: aten.sum.dim_IntList(g, dims), [grad], origin_meta(node))[0]


def _own_input_half(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """By `convolution_backward`, which the incoming gradient shows the input's shape."""
    call, value = ConvBackward.of(node), node.meta["val"]
    wanted = [True, False, False]
    half = graph.call_function(
        aten.convolution_backward.default, (call.grad, call.grad, call.weight, None, *call.geometry.arguments, wanted)
    )
    half.meta = {**origin_meta(node), "val": (value[0], None, None)}
    picked = graph.call_function(operator.getitem, (half, 0))
    picked.meta = {**origin_meta(node), "val": value[0]}
    return picked


def _input_half(graph: fx.Graph, node: fx.Node) -> fx.Node:
    call = ConvBackward.of(node)
    value = tensor_of(call.x)
    assert value is not None
    size = list(value.shape)

    def half(g: Tensor, w: Tensor) -> Tensor:
        return input_gradient(g, w, size, *call.geometry.arguments)

    return inline(graph, half, [call.grad, call.weight], origin_meta(node))[0]
