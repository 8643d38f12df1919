"""Let go of what the backward holds for its shape alone.

The backward of average pooling is given the pooling's input and reads nothing but its size. Inductor's partitioner
saves that input all the same. Adaptive pooling's is replaced by a gather (`ops/pool.py`), which is not given it. Where
that is too many windows for one position, and in plain average pooling, of which Inductor generates a gather itself,
the input is replaced by a zero that is expanded to the size, which takes four bytes.

Known gap: the layout that these kernels give their result when they are called, not generated, is contiguous then.
"""

from __future__ import annotations

from math import prod

import torch
from torch import fx

from xconv_fx.ops.layout import order_of
from xconv_fx.ops.pool import adaptive_windows

from .graph import arguments, inline, origin_meta, shape_of, tensor_of

aten = torch.ops.aten

# All take the input as their second argument.
ADAPTIVE = (aten._adaptive_avg_pool2d_backward.default, aten._adaptive_avg_pool3d_backward.default)
READ_SIZE = (aten.avg_pool2d_backward.default, aten.avg_pool3d_backward.default, *ADAPTIVE)
# Above this many windows over one position a gather is left to ATen.
MOST_WINDOWS = 16


def shapes_only(gm: fx.GraphModule, channels_last: bool = True) -> None:
    """Rewrite the joint graph in place; a no-op where nothing is pooled so.

    `channels_last` says that Inductor will lay out images so.
    """
    for target in READ_SIZE:
        for node in gm.graph.find_nodes(op="call_function", target=target):
            if target in ADAPTIVE and _is_gathered(node):
                _gather(gm.graph, node, channels_last)
            else:
                _forget(gm.graph, node)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _is_gathered(node: fx.Node) -> bool:
    """Whether the pooling is of a batch, and few windows share a position."""
    pooled, size = shape_of(arguments(node)[0]), shape_of(node)
    rank = 2 if node.target is ADAPTIVE[0] else 3
    if len(size) != rank + 2 or 0 in (*pooled, *size):
        return False
    return prod(map(adaptive_windows, size[2:], pooled[2:])) <= MOST_WINDOWS


def _gather(graph: fx.Graph, node: fx.Node, channels_last: bool) -> None:
    grad, x = arguments(node)[:2]
    size = shape_of(node)
    order = (0, 2, 3, 1) if channels_last and len(size) == 4 else order_of(size, x.meta["val"].stride())
    with graph.inserting_before(node):
        gathered = graph.call_function(
            torch.ops.xconv.adaptive_pool_backward.default, (grad, list(size[2:]), list(order))
        )
    gathered.meta = {**node.meta, "val": node.meta["val"]}
    node.replace_all_uses_with(gathered)
    graph.erase_node(node)


def _forget(graph: fx.Graph, node: fx.Node) -> None:
    held = arguments(node)[1]
    value = tensor_of(held)
    if value is None:
        return

    def sized() -> torch.Tensor:
        return torch.zeros([1] * value.dim(), dtype=value.dtype, device=value.device).expand(value.shape)

    with graph.inserting_before(node):
        (shape,) = inline(graph, sized, [], origin_meta(node))
    node.replace_input_with(held, shape)
