"""The backward of max-pooling as a gather: each input position adds up the windows that it won.

Inductor turns the backward of max-pooling on CPU into a scatter, which needs two int64 copies of the indices and
contiguous copies of its operands, and cannot be fused: five times the pooled tensor in transients, often at the very
peak of a backward. Gathering reads the int8 window offsets that the forward holds anyway, writes each element once and
fuses with whatever reads it.

`max_pool_backward(grad (N, C, *out), offsets int8 (N, C, *out), input_size, kernel, stride, padding) -> (N, C, *in)`,
for 1 to 3 spatial dims and dilation 1. `offsets` number the winner's place inside its window, as
`prims._low_memory_max_pool_with_offsets` does.
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


def overlapping_windows(kernel: Sequence[int], stride: Sequence[int]) -> int:
    """How many windows can share one input position."""
    count = 1
    for extent, step in zip(kernel, stride, strict=True):
        count *= -(-extent // step)
    return count
