"""Write unpooling as a scatter within each plane.

ATen's decomposition adds to every position where its plane begins among the planes of all samples, and writes into one
row: nothing tells any more that each sample's values go to the sample itself. Written along the positions of a plane it
is the same, and the batch can run in slices.

Works on the graph that Dynamo traced, before autograd sees it; the gradient is autograd's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, fx


def max_unpool(x: Tensor, indices: Tensor, output_size: Sequence[int], *_: object) -> Tensor:
    """`torch.nn.functional.max_unpool2d` and 3d: x and indices (..., *small) to (..., *large)."""
    size = tuple(output_size)
    planes = x.shape[: x.dim() - len(size)]
    flat = x.new_zeros((*planes, prod(size)))
    at, values = (value.flatten(len(planes)) for value in (indices, x))
    return flat.scatter(-1, at, values).unflatten(-1, size)


def scatter_unpooling(gm: fx.GraphModule) -> None:
    """Rewrite a Dynamo graph in place."""
    known = (torch._C._nn.max_unpool2d, torch._C._nn.max_unpool3d)
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in known:
            node.target = max_unpool
    gm.recompile()
