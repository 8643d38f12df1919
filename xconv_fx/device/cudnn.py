"""Workspaces of cuDNN's convolutions: an assumption, because only cuDNN on the GPU at hand knows them.

Tensor cores read and write channels-last. For operands that are not, cuDNN's kernels copy them into that order in their
workspace, and the result out of it. Weight gradients are summed over pixels by many thread blocks, in float32. So the
workspace is assumed to hold

* the convolution's input and output (of a gradient: what it reads and writes of that size) unless one of the operands
  is channels-last, which is when cuDNN is given channels-last tensors throughout;
* for a weight gradient, the weight's elements in float32;

and never to exceed `WORKSPACE_LIMIT`. cuDNN's heuristics rank kernels by time, and torch takes the first one whose
workspace it can allocate. So the limit is no limit of theirs: a kernel with a smaller workspace nearly always exists.

Known gaps: float64 and the FFT and Winograd kernels, which `torch.backends.cudnn.benchmark` can choose. Depthwise
convolutions that torch runs by a kernel of its own take none of this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

WORKSPACE_LIMIT = 1 << 30


def cudnn_workspace(node: fx.Node) -> int:
    """Bytes that a node of a graph on CUDA is assumed to take inside its call; 0 for all but convolutions."""
    if node.target is aten.convolution.default:
        operands, weight, results = [_value(node.args[0])], _value(node.args[1]), [node.meta["val"]]
        sums = 0
    elif node.target is aten.convolution_backward.default:
        gradient, x, weight = (_value(arg) for arg in node.args[:3])
        wanted: Any = node.args[10]
        operands = [gradient, x] if wanted[1] else [gradient]
        results = [node.meta["val"][0]] if wanted[0] else []
        sums = 4 * weight.numel() if wanted[1] else 0
    else:
        return 0
    laid_out = any(map(is_channels_last, (*operands, weight)))
    copies = 0 if laid_out else sum(value.numel() * value.element_size() for value in (*operands, *results))
    return min(copies + sums, WORKSPACE_LIMIT)


def is_channels_last(value: Tensor) -> bool:
    """Whether images or volumes are laid out channels-last, which those of one channel or pixel always are."""
    order = {4: torch.channels_last, 5: torch.channels_last_3d}.get(value.dim())
    return order is None or value.is_contiguous(memory_format=order)


def _value(arg: Any) -> Tensor:
    value = arg.meta["val"]
    assert isinstance(value, Tensor)
    return value
