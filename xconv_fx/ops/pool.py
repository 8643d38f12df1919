"""Backwards of pooling as gathers: each input position adds up what comes from the windows that it was in.

Inductor turns the backward of max-pooling on CPU into a scatter, which needs two int64 copies of the indices and
contiguous copies of its operands, and cannot be fused: five times the pooled tensor in transients, often at the very
peak of a backward. Gathering reads the int8 window offsets that the forward holds anyway, writes each element once and
fuses with whatever reads it. The backward of adaptive average pooling is a call of ATen's, given pooling's input for
its size alone: that input is held, or made of zeros, and where its layout is not that of the gradient both that and
the result are copied. Gathering needs none of these.

`max_pool_backward(grad (N, C, *out), offsets int8 (N, C, *out), input_size, kernel, stride, padding) -> (N, C, *in)`,
for 1 to 3 spatial dims and dilation 1. `offsets` number the winner's place inside its window, as
`prims._low_memory_max_pool_with_offsets` does.

`adaptive_pool_backward(grad (N, C, *out), input_size, order) -> (N, C, *in)`. Window i of O over an extent of H is
floor(i H / O) to ceil((i + 1) H / O), so a position h is in windows floor(h O / H) to ceil((h + 1) O / H) - 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.library.custom_op("xconv::max_pool_backward", mutates_args=())
def max_pool_backward(
    grad: Tensor,
    offsets: Tensor,
    input_size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """Input gradient (N, C, *`input_size`) from the pooled gradient; windows that share a winner add up."""
    places: list[Tensor] = []
    rest = offsets.long()
    for extent in reversed(kernel):
        places.insert(0, rest % extent)
        rest = rest // extent
    position = torch.zeros_like(offsets, dtype=torch.int64)
    for dim, place in enumerate(places):
        start = torch.arange(grad.shape[2 + dim], device=grad.device) * stride[dim] - padding[dim]
        shape = [-1 if other == dim else 1 for other in range(len(kernel))]
        position = position * input_size[dim] + place + start.view(shape)
    flat = grad.new_zeros((*grad.shape[:2], torch.Size(input_size).numel()))
    flat.scatter_add_(2, position.flatten(2), grad.flatten(2))
    return flat.view(*grad.shape[:2], *input_size)


@max_pool_backward.register_fake
def _(
    grad: Tensor,
    offsets: Tensor,
    input_size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    return grad.new_empty((*grad.shape[:2], *input_size))


@torch.library.custom_op("xconv::adaptive_pool_backward", mutates_args=())
def adaptive_pool_backward(grad: Tensor, input_size: Sequence[int], order: Sequence[int]) -> Tensor:
    """Input gradient (N, C, *`input_size`) of adaptive average pooling from the pooled gradient; contiguous.

    A generated kernel's result lies in memory in the `order` of these dims, outermost first.
    """
    for dim, extent in enumerate(input_size, start=2):
        grad = (grad.movedim(dim, -1) @ _shares(grad, extent, grad.shape[dim])).movedim(-1, dim)
    return grad.clone(memory_format=torch.contiguous_format)


@adaptive_pool_backward.register_fake
def _(grad: Tensor, input_size: Sequence[int], order: Sequence[int]) -> Tensor:
    return grad.new_empty((*grad.shape[:2], *input_size))


def _shares(like: Tensor, extent: int, windows: int) -> Tensor:
    """What a window's gradient gives each position along a dim: (windows, extent)."""
    position, window = torch.arange(extent, device=like.device), torch.arange(windows, device=like.device).unsqueeze(1)
    first, end = window * extent // windows, -(-(window + 1) * extent // windows)
    return ((position >= first) & (position < end)).to(like.dtype) / (end - first)


def adaptive_windows(extent: int, windows: int) -> int:
    """How many of adaptive pooling's windows can share one position along a dim."""
    return max(-(-(h + 1) * windows // extent) - h * windows // extent for h in range(extent))


def overlapping_windows(kernel: Sequence[int], stride: Sequence[int]) -> int:
    """How many windows can share one input position."""
    count = 1
    for extent, step in zip(kernel, stride, strict=True):
        count *= -(-extent // step)
    return count
