"""Write replicate padding as a concatenation.

Inductor leaves its backward to ATen, and expects a contiguous result as ATen's shape functions say. ATen gives
channels-last ones for images that lie so, as they do behind a convolution: the step ends with an error about strides
(seen in torch 2.13, with any network that pads images so, as the U-Nets of MONAI do). As a concatenation it is fused,
forward and backward, whatever the layout.

Works on the graph that Dynamo traced, before autograd sees it; the gradient is autograd's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from xconv_fx.hooks import dispatch

_NAMES = ("input", "pad", "mode")


def replicate_pad(x: Tensor, pad: Sequence[int]) -> Tensor:
    """`torch.nn.functional.pad(x, pad, mode="replicate")` of a `pad` without negative sizes."""
    padded = x
    for number, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True), start=1):
        dim = x.dim() - number
        last = x.shape[dim] - 1
        shape = list(padded.shape)
        edges = [(padded.narrow(dim, 0, 1), before), (padded.narrow(dim, last, 1), after)]
        first, second = (edge.expand([*shape[:dim], count, *shape[dim + 1 :]]) for edge, count in edges)
        parts = [*([first] if before else []), padded, *([second] if after else [])]
        if len(parts) > 1:
            padded = torch.cat(parts, dim)
    return x.clone() if padded is x else padded


def concatenated_replicate_padding(gm: fx.GraphModule) -> None:
    """Rewrite a Dynamo graph in place."""
    for node in gm.graph.find_nodes(op="call_function", target=dispatch.PAD):
        given: dict[str, Any] = dict(zip(_NAMES, node.args, strict=False)) | dict(node.kwargs)
        pad = given["pad"]
        sizes = pad if isinstance(pad, (list, tuple)) and all(isinstance(size, int) for size in pad) else (-1,)
        if given.get("mode") == "replicate" and min(sizes) >= 0:
            node.target, node.args, node.kwargs = replicate_pad, (given["input"], tuple(sizes)), {}
    gm.recompile()
