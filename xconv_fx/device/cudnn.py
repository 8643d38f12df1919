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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

WORKSPACE_LIMIT = 1 << 30


def cudnn_workspace(func: Any, args: Sequence[Any], results: Any) -> int:
    """Bytes that a call on CUDA is assumed to take besides its `results`; 0 for all but convolutions.

    The planner asks for calls in a graph, the audit for those in generated code. Tensors may be fake.
    """
    if func is aten.convolution.default:
        operands, weight, made = [args[0]], args[1], [results]
        sums = 0
    elif func is aten.convolution_backward.default:
        gradient, x, weight, wanted = *args[:3], args[10]
        operands = [gradient, x] if wanted[1] else [gradient]
        made = [results[0]] if wanted[0] else []
        sums = 4 * weight.numel() if wanted[1] else 0
    else:
        return 0
    laid_out = any(map(is_channels_last, (*operands, weight)))
    copies = 0 if laid_out else sum(value.numel() * value.element_size() for value in (*operands, *made))
    return min(copies + sums, WORKSPACE_LIMIT)


def is_channels_last(value: Tensor) -> bool:
    """Whether images or volumes are laid out channels-last, which those of one channel or pixel always are."""
    order = {4: torch.channels_last, 5: torch.channels_last_3d}.get(value.dim())
    return order is None or value.is_contiguous(memory_format=order)
