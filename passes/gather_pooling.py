"""Replace the scatter in max-pooling's backward by a gather from the window offsets (`ops/pool.py`)."""

from __future__ import annotations

import torch
from torch import fx

from xconv_fx.ops.pool import overlapping_windows

from .graph import arguments, is_view, origin_meta, tensor_of

aten, prims = torch.ops.aten, torch.ops.prims

# Above this many windows over one position the gather reads more than the scatter writes.
MOST_WINDOWS = 9


def gather_pooling(gm: fx.GraphModule) -> None:
    """Rewrite the joint graph in place; a no-op where nothing is pooled."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.scatter_add.default):
        _replace_scatter(gm.graph, node)
    for node in gm.graph.find_nodes(op="call_function", target=aten.max_pool3d_with_indices_backward.default):
        _replace_call(gm.graph, node)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _replace_scatter(graph: fx.Graph, node: fx.Node) -> None:
    """The backward of 1d and 2d pooling, decomposed into a scatter between views."""
    base, _, index, grad = arguments(node)
    views = [user for user in node.users if is_view(user)]
    if len(views) != len(node.users) or base.target is not aten.full.default:
        return
    gathered = _gather(graph, node, _through_views(grad, stop=4), _through_views(index), views)
    if gathered is not None:
        for view in views:
            view.replace_all_uses_with(gathered)


def _replace_call(graph: fx.Graph, node: fx.Node) -> None:
    """The backward of 3d pooling: an extern kernel that holds pooling's input although it reads its shape alone."""
    grad, indices = arguments(node)[0], arguments(node)[-1]
    gathered = _gather(graph, node, grad, indices, [node])
    if gathered is not None:
        node.replace_all_uses_with(gathered)


def _gather(
    graph: fx.Graph, node: fx.Node, pooled: fx.Node, indices: fx.Node, outputs: list[fx.Node]
) -> fx.Node | None:
    """The gather that computes the `outputs`, placed before `node`; None where it does not apply or does not pay."""
    if indices.target is not prims._low_memory_max_pool_offsets_to_indices.default:
        return None
    offsets, kernel, size, stride, padding, dilation = arguments(indices)
    value, source = tensor_of(offsets), tensor_of(pooled)
    if value is None or source is None or source.shape != value.shape:
        return None
    if any(d != 1 for d in dilation) or overlapping_windows(kernel, stride) > MOST_WINDOWS:
        return None
    full = torch.Size([*value.shape[:2], *size])
    if any(tensor_of(output).shape != full for output in outputs):  # type: ignore[union-attr]
        return None
    with graph.inserting_before(node):
        gathered = graph.call_function(
            torch.ops.xconv.max_pool_backward.default,
            (pooled, offsets, list(size), list(kernel), list(stride), list(padding)),
        )
    gathered.meta = {**origin_meta(node), "val": outputs[0].meta["val"], "partitioner_tag": "is_backward"}
    return gathered


def _through_views(node: fx.Node, stop: int = 0) -> fx.Node:
    """The value behind views; with `stop`, the first one of at least that many dims."""
    while is_view(node) and not (stop and len(node.meta["val"].shape) >= stop):
        node = node.all_input_nodes[0]
    return node
