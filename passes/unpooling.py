"""Write unpooling as a scatter within each plane.

ATen's decomposition adds to every position where its plane begins among the planes of all samples, and writes into one
row: nothing tells any more that each sample's values go to the sample itself. Written along the positions of a plane it
is the same, and the batch can run in slices.

Works on the graph that Dynamo traced, before autograd sees it; the gradient is autograd's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

_DIMENSIONS = {
    torch.nn.functional.max_unpool1d: 1,
    torch.nn.functional.max_unpool2d: 2,
    torch.nn.functional.max_unpool3d: 3,
}


def max_unpool(x: Tensor, indices: Tensor, size: Sequence[int]) -> Tensor:
    """`torch.nn.functional.max_unpool2d` and its like: x and indices (..., *small) to (..., *size)."""
    planes = x.shape[: x.dim() - len(size)]
    flat = x.new_zeros((*planes, prod(size)))
    at, values = (value.flatten(len(planes)) for value in (indices, x))
    return flat.scatter(-1, at, values).unflatten(-1, tuple(size))


def scatter_unpooling(gm: fx.GraphModule) -> None:
    """Rewrite a Dynamo graph in place."""
    for node in gm.graph.nodes:
        dimensions = _DIMENSIONS.get(node.target, 0) if node.op == "call_function" else 0
        given: dict[str, Any] = dict(zip(("input", "indices"), node.args, strict=False)) | dict(node.kwargs)
        if dimensions:
            size = tuple(int(n) for n in node.meta["example_value"].shape[-dimensions:])
            node.target, node.args, node.kwargs = max_unpool, (given["input"], given["indices"], size), {}
    gm.recompile()
