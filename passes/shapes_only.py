"""Let go of what the backward holds for its shape alone.

The backward of average pooling is given the pooling's input and reads nothing but its size. Inductor's partitioner
saves that input all the same. Here it is replaced by a zero that is expanded to the size, which takes four bytes.

Known gap: the layout that these kernels give their result when they are called, not generated, is contiguous then.
"""

from __future__ import annotations

import torch
from torch import fx

from .graph import arguments, inline, origin_meta, tensor_of

aten = torch.ops.aten

# All take the input as their second argument.
READ_SIZE = (
    aten.avg_pool2d_backward.default,
    aten.avg_pool3d_backward.default,
    aten._adaptive_avg_pool2d_backward.default,
    aten._adaptive_avg_pool3d_backward.default,
)


def shapes_only(gm: fx.GraphModule) -> None:
    """Rewrite the joint graph in place; a no-op where nothing is pooled so."""
    for target in READ_SIZE:
        for node in gm.graph.find_nodes(op="call_function", target=target):
            _forget(gm.graph, node)
    gm.recompile()


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
