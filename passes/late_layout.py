"""Channels-last copies of a graph's own inputs: what Inductor makes of them, and how long they live.

Inductor runs image networks channels-last. When the forward begins it copies convolution weights to that layout, and
contiguous images as well, and saves the copies for the backward in the place of the originals. A weight's copy is
small; an image's stands beside the caller's own all the way. `late_layout` makes one copy before each convolution
instead, and another before the weight gradient, released at once: one more pass over the input. What is saved is then
a matrix, a view of the image: of anything with four dimensions Inductor would save its copy.

An image of one channel lies in memory in the same way in both layouts, and ATen, which goes by strides, takes it for
contiguous: then a convolution's result is laid out so as well, and its weight gradient copies the incoming gradient
twice. A view with the strides of channels-last costs nothing and avoids that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from xconv_fx import hooks
from xconv_fx.ops import layout

from .graph import (
    arguments,
    first_operation,
    inline,
    is_primal,
    is_view,
    nbytes,
    origin_meta,
    output_node,
    storage_root,
    tensor_of,
)
from .op_table import has
from .partition import Pair

aten = torch.ops.aten


def layout_copies(forward: fx.GraphModule) -> int:
    """Bytes of the copies that Inductor makes when the forward begins and saves for the backward."""
    return sum(map(nbytes, relaid_operands(forward, 0, 1)))


def relaid_operands(forward: fx.GraphModule, *places: int) -> list[fx.Node]:
    """Inputs (place 0) or weights (1) of convolutions that the forward gets in another layout than channels-last."""
    if not hooks.channels_last_convolutions(forward):
        return []
    found: dict[fx.Node, None] = {}
    for node in forward.graph.find_nodes(op="call_function", target=aten.convolution.default):
        for operand in (arguments(node)[place] for place in places):
            value = tensor_of(operand)
            if value is not None and value.dim() == 4 and is_primal(operand) and _is_relaid(value):
                found[operand] = None
    return list(found)


def _is_relaid(value: torch.Tensor) -> bool:
    """Whether channels-last is another layout than the one the tensor has."""
    return (
        value.shape[1] > 1
        and value.shape[2] * value.shape[3] > 1
        and not value.is_contiguous(memory_format=torch.channels_last)
    )


def late_layout(pair: Pair) -> None:
    """Copy contiguous images where convolutions read them; rewrites both halves in place."""
    images = {node.name for node in relaid_operands(pair.forward, 0) if node.meta["val"].is_contiguous()}
    last, relaid = hooks.channels_last_convolutions(pair.forward), bool(images)
    for half in (pair.forward, pair.backward):
        for place, target in ((0, aten.convolution.default), (1, aten.convolution_backward.default)):
            for node in half.graph.find_nodes(op="call_function", target=target):
                image = arguments(node)[place]
                if image.name in images:
                    _lay_out_before(half.graph, node, image, lambda x: x.clone(memory_format=torch.channels_last))
                elif last and is_primal(image) and _is_single(image.meta["val"]):
                    _lay_out_before(half.graph, node, image, _single_channel_last)
                    relaid = True
    for name, (image, placeholder) in pair.saved().items():
        if name in images:
            _save_as_matrix(pair, image, placeholder)
    if relaid:
        _results_as_traced(pair)
    for half in (pair.forward, pair.backward):
        half.recompile()


def _results_as_traced(pair: Pair) -> None:
    """Have the results lie as they were traced, whatever the layout of what they are computed from becomes.

    Inductor takes a graph's layouts from running it on fakes once more, and would return what a convolution of a
    channels-last copy gives. Results that are views are made anew, of what they are views of as that was traced. A
    result that the backward reads is saved as it is returned: one tensor, not two.
    """
    graph, output = pair.forward.graph, output_node(pair.forward.graph)
    values: list[Any] = list(arguments(output)[0])
    as_traced: dict[Any, fx.Node] = {}
    for node in dict.fromkeys(values[: pair.results]):
        if isinstance(node, fx.Node) and not is_primal(_viewed(node)):
            with graph.inserting_before(output):
                _lie_as_traced(graph, node, as_traced)
    output.args = (tuple(as_traced.get(value, value) for value in values),)
    for old in reversed(as_traced):
        if not old.users:
            graph.erase_node(old)


def _lie_as_traced(graph: fx.Graph, node: fx.Node, as_traced: dict[Any, fx.Node]) -> None:
    """Make a node anew that lies as the node was traced, unless it does in any layout."""
    root = _viewed(node)
    if root not in as_traced:
        order = _memory_order(tensor_of(root))
        if order is None:
            return

        def lie(x: torch.Tensor) -> torch.Tensor:
            if order == tuple(range(len(order))):
                return x.clone(memory_format=torch.contiguous_format)
            return layout.to_logical(layout.to_physical(x, order).clone(memory_format=torch.contiguous_format), order)

        (as_traced[root],) = inline(graph, lie, [root], origin_meta(root))
    views = []
    while node not in as_traced:
        views.append(node)
        node = node.all_input_nodes[0]
    for view in reversed(views):
        as_traced[view] = graph.node_copy(view, lambda old: as_traced.get(old, old))


def _viewed(node: fx.Node) -> fx.Node:
    """What a node is a view of, itself if of nothing; beyond `storage_root` where a view is an element of a tuple."""
    root = storage_root(node)
    source = root.all_input_nodes[0] if root.op == "call_function" and is_view(root) else None
    return _viewed(source) if source is not None and has(source, "view") else root


def _memory_order(value: torch.Tensor | None) -> tuple[int, ...] | None:
    """The dimensions from the outermost in memory to the innermost; None for what has gaps, or lies the same way in any
    layout of images and of what is computed from them."""
    if value is None or value.dim() < 3 or (value.dim() == 4 and not _is_relaid(value)):
        return None
    return layout.dense_order(value.shape, value.stride())


def _is_single(value: torch.Tensor) -> bool:
    """Whether this is a contiguous image of one channel, of strides that ATen does not take for channels-last."""
    return value.dim() == 4 and value.shape[1] == 1 and value.is_contiguous() and value.stride(1) > 1


def _single_channel_last(x: torch.Tensor) -> torch.Tensor:
    samples, _, height, width = x.shape
    return aten.as_strided.default(x, [samples, 1, height, width], [height * width, 1, width, 1])


def _lay_out_before(
    graph: fx.Graph, node: fx.Node, image: fx.Node, lay_out: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    with graph.inserting_before(node):
        (relaid,) = inline(graph, lay_out, [image], origin_meta(node))
    node.replace_input_with(image, relaid)


def _save_as_matrix(pair: Pair, image: fx.Node, placeholder: fx.Node) -> None:
    size = list(image.meta["val"].shape)
    with pair.forward.graph.inserting_before(output_node(pair.forward.graph)):
        (matrix,) = inline(pair.forward.graph, lambda x: aten.view.default(x, [size[0], -1]), [image])
    matrix.name = f"{image.name}_matrix"
    saved = pair.add_saved(matrix, matrix.name)
    with pair.backward.graph.inserting_before(first_operation(pair.backward.graph)):
        (restored,) = inline(pair.backward.graph, lambda x: aten.view.default(x, size), [saved])
    placeholder.replace_all_uses_with(restored)
    pair.remove_saved(image, placeholder)
    pair.restored[image.name] = restored
