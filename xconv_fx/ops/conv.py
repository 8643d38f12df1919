"""Convolution geometry: the two halves of `aten.convolution_backward`, each reading only what it needs.

The fused backward of a convolution takes the input *and* the weight, although the weight gradient reads nothing of
the weight but its shape, and the input gradient nothing of the input but its shape. Held together, the input of a
layer lives until its input gradient has been allocated, which is where a backward pass peaks. Split:

* `weight_gradient` is `convolution_backward` with only its weight output asked for;
* `input_gradient` is the adjoint of a convolution, which is again an `aten.convolution` with the roles of
  `transposed` turned round. It never sees the input.

Both hold for 1, 2 and 3 spatial dimensions, any stride, dilation, groups, padding, output padding and kernel, even
ones included. Both accept symbolic sizes and trace into plain ATen, so passes may inline them into a graph.

Known gaps: `torch.nn.Conv2d(padding="same")` with an even kernel pads asymmetrically by an explicit
`aten.constant_pad_nd` in front of the convolution; that pad is a node of its own and no business of this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class Geometry:
    """How a convolution moves over its input: one number a spatial dimension, but for `transposed` and `groups`."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        """In the order in which ATen takes them."""
        return self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups


@dataclass(frozen=True)
class Convolution:
    """A call of `aten.convolution`: its operands, be they tensors or nodes of a graph, and its geometry."""

    x: Any
    weight: Any
    bias: Any
    geometry: Geometry

    @staticmethod
    def of(call: Any) -> Convolution:
        """Of a node of a graph, or of the call's arguments."""
        x, weight, bias, *geometry = getattr(call, "args", call)
        return Convolution(x, weight, bias, Geometry(*geometry))


@dataclass(frozen=True)
class ConvBackward:
    """A call of `aten.convolution_backward`: its operands, be they tensors or nodes of a graph, and what it computes.

    `grad` is that of the result; gradients `of_input`, `of_weight` and `of_bias` are computed or not.
    """

    grad: Any
    x: Any
    weight: Any
    bias_sizes: Any
    geometry: Geometry
    of_input: bool
    of_weight: bool
    of_bias: bool

    @staticmethod
    def of(call: Any) -> ConvBackward:
        """Of a node of a graph, or of the call's arguments."""
        grad, x, weight, bias_sizes, *geometry, wanted = getattr(call, "args", call)
        return ConvBackward(grad, x, weight, bias_sizes, Geometry(*geometry), *map(bool, wanted))


def weight_gradient(
    grad_out: Tensor,
    x: Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    *,
    like: Tensor | None = None,
) -> Tensor:
    """The gradient of a convolution's weight: `grad_out` (N, O, ...) and input `x` (N, I, ...) to `weight_size`.

    ATen wants a weight in the call and reads only its shape and layout. `like` is any tensor of the shape, best the
    weight itself: it costs nothing when its memory format is that of `x`. Without it a scalar is expanded to the
    shape, and ATen's kernels copy that into one transient tensor of the weight's size.
    """
    stand_in = grad_out.new_zeros(()).expand(list(weight_size)) if like is None else like
    geometry = (list(stride), list(padding), list(dilation), transposed, list(output_padding), groups)
    return aten.convolution_backward.default(grad_out, x, stand_in, None, *geometry, [False, True, False])[1]


def input_gradient(
    grad_out: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """The gradient of a convolution's input, of shape `input_size` (N, I, ...), from `grad_out` and `weight` alone.

    The adjoint of a convolution is a transposed one. Its output padding is the number of trailing input rows that
    the stride leaves over, which is always below the stride, as ATen demands. The adjoint of a transposed convolution
    is a plain one; where the output padding reaches the stride (legal when the dilation is larger still) it yields
    rows past the end of the input, which are cut off.
    """
    geometry = (list(stride), list(padding), list(dilation))
    if not transposed:
        extra = left_over(grad_out.shape[2:], weight.shape[2:], input_size[2:], stride, padding, dilation)
        return aten.convolution.default(grad_out, weight, None, *geometry, True, extra, groups)
    grad = aten.convolution.default(grad_out, weight, None, *geometry, False, [0] * len(stride), groups)
    for dim, (size, added, step) in enumerate(zip(input_size[2:], output_padding, stride, strict=True), start=2):
        if added >= step:
            grad = aten.slice.Tensor(grad, dim, 0, size)
    return grad


def left_over(
    out: Sequence[int],
    kernel: Sequence[int],
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Trailing input rows in each spatial dim that a convolution from `size` to `out` never starts a window on."""
    return [
        n - ((m - 1) * s - 2 * p + d * (k - 1) + 1)
        for m, k, n, s, p, d in zip(out, kernel, size, stride, padding, dilation, strict=True)
    ]
