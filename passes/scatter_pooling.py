"""Write the backward of fractional and adaptive max pooling as a scatter within each plane.

ATen's kernels take the positions of the maxima for contiguous, whatever their strides are, and Inductor hands them over
channels-last, as it lays out images: gradients then go to other positions (seen in torch 2.13; 40% of a gradient). The
scatter reads them by their indices. Besides, it reads nothing of pooling's input, which need not be held for it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from .graph import arguments, inline, origin_meta

aten = torch.ops.aten

# The spatial dimensions; all take the gradient and pooling's input first, and the positions last.
_DIMENSIONS = {
    aten.fractional_max_pool2d_backward.default: 2,
    aten.fractional_max_pool3d_backward.default: 3,
    aten.adaptive_max_pool2d_backward.default: 2,
    aten.adaptive_max_pool3d_backward.default: 3,
}


def scatter(shape: torch.Size, dims: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The gradient (*shape) of an input, of a gradient and where in its plane, flat, pooling took each value."""

    def scattered(grad: Tensor, indices: Tensor) -> Tensor:
        flat = grad.new_zeros((*shape[:-dims], shape[-dims:].numel()))
        return flat.scatter_add(-1, indices.flatten(-dims), grad.flatten(-dims)).view(shape)

    return scattered


def scatter_pooling(joint: fx.GraphModule) -> None:
    """Rewrite the joint graph in place."""
    for target, dims in _DIMENSIONS.items():
        for node in joint.graph.find_nodes(op="call_function", target=target):
            grad, indices, shape = arguments(node)[0], arguments(node)[-1], node.meta["val"].shape
            with joint.graph.inserting_before(node):
                (found,) = inline(
                    joint.graph,
                    scatter(shape, dims),
                    [grad, indices],
                    {**origin_meta(node), "partitioner_tag": "is_backward"},
                )
            node.replace_all_uses_with(found)
            joint.graph.erase_node(node)
    joint.recompile()
