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
        _replace(gm.graph, node)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _replace(graph: fx.Graph, node: fx.Node) -> None:
    base, _, index, grad = arguments(node)
    indices, pooled = _through_views(index), _through_views(grad, stop=4)
    views = [user for user in node.users if is_view(user)]
    if indices.target is not prims._low_memory_max_pool_offsets_to_indices.default or len(views) != len(node.users):
        return
    offsets, kernel, size, stride, padding, dilation = arguments(indices)
    value, source = tensor_of(offsets), tensor_of(pooled)
    if value is None or source is None or source.shape != value.shape or base.target is not aten.full.default:
        return
    if any(d != 1 for d in dilation) or overlapping_windows(kernel, stride) > MOST_WINDOWS:
        return
    full = torch.Size([*value.shape[:2], *size])
    if any(tensor_of(view).shape != full for view in views):  # type: ignore[union-attr]
        return
    with graph.inserting_before(node):
        gathered = graph.call_function(
            torch.ops.xconv.max_pool_backward.default,
            (pooled, offsets, list(size), list(kernel), list(stride), list(padding)),
        )
    gathered.meta = {**origin_meta(node), "val": views[0].meta["val"], "partitioner_tag": "is_backward"}
    for view in views:
        view.replace_all_uses_with(gathered)


def _through_views(node: fx.Node, stop: int = 0) -> fx.Node:
    """The value behind views; with `stop`, the first one of at least that many dims."""
    while is_view(node) and not (stop and len(node.meta["val"].shape) >= stop):
        node = node.all_input_nodes[0]
    return node
