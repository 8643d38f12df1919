"""3D convolutions on the CPU in less memory and time than ATen gives them.

`volume_weight_gradient` goes through the volume in slabs of its depth, with the halo that the kernel needs. oneDNN
transposes what it is given, one sample for each thread: 24 MB for a 34 MB input of two samples. Eight slabs take a
quarter of that, and half of the time, since a slab's transposed operands stay in the processor's caches. The slabs'
gradients add up to the exact one. For a 1x1x1 kernel it is a product of matrices, of the volumes as they lie in memory.

`single_convolution` is for one small volume: ATen gives a batch of one with channels x depth x height up to 20480 to
its native convolution, which unfolds it, for a 3x3x3 kernel into 27 times its memory at up to seven times oneDNN's
time. Two samples always go to oneDNN, so the operator shows it the volume twice. The slabs of a single volume's weight
gradient go to it two by two, for the same reason.

`pointwise_convolution` is for 1x1x1 kernels where ATen would take its native convolution, as it does in one thread:
that copies a channels-last volume. Here too, volumes are matrices as they lie in memory.

With AVX-512 oneDNN reads several channels-last volumes in float32 as they lie, in less memory and time than slabs take.

`operator_for` says where the operators are worth it, which is decided by shapes and the processor. They are put in the
place of `aten.convolution` and `aten.convolution_backward` after autograd, and have no derivatives of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xconv_fx.hooks.dispatch import convolution_backend
from xconv_fx.reproducible import is_portable

from .conv import ConvBackward, Convolution

aten = torch.ops.aten

# A single volume goes to oneDNN when channels x depth x height exceed this (ATen's Convolution.cpp).
NATIVE = 20480
# Unfolding that takes more than this many times the operands is avoided; with few input channels it is cheap and fast.
UNFOLDED = 2
# Slabs of a volume: at most so many, of at least so many bytes in both operands.
SLABS, SLAB_BYTES = 8, 1 << 19


def _single_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """`aten.convolution` of `x` (1, C, D, H, W)."""
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    return aten.convolution.default(_twice(x), weight, bias, *geometry)[:1].clone()


single_convolution = torch.library.custom_op(
    "xconv::single_convolution", _single_convolution, mutates_args=(), tags=(torch.Tag.needs_fixed_stride_order,)
)
# Traceable as it is.
single_convolution.register_fake(_single_convolution)


def _pointwise_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """`aten.convolution` of `x` (N, C, D, H, W) with a 1x1x1 kernel, stride 1, no padding and one group; contiguous."""
    matrix = weight.flatten(1).t() if transposed else weight.flatten(1)
    out = x.new_empty(x.shape[0], matrix.shape[0], *x.shape[2:])
    for sample, result in zip(x, out, strict=True):
        if bias is None:
            torch.mm(matrix, _matrix(sample), out=result.flatten(1))
        else:
            torch.addmm(bias.unsqueeze(1), matrix, _matrix(sample), out=result.flatten(1))
    return out


pointwise_convolution = torch.library.custom_op(
    "xconv::pointwise_convolution", _pointwise_convolution, mutates_args=(), tags=(torch.Tag.needs_fixed_stride_order,)
)


@pointwise_convolution.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1 if transposed else 0], *x.shape[2:])


@torch.library.custom_op("xconv::volume_weight_gradient", mutates_args=(), tags=(torch.Tag.needs_fixed_stride_order,))
def volume_weight_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    with_bias: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    groups: int,
    slabs: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias from `grad` (N, O, D', H', W') and `x` (N, C, D, H, W).

    The first has the shape and the layout of `weight`, of which nothing else is read. The second has no elements
    unless it is wanted.
    """
    of_bias = grad.sum((0, 2, 3, 4)) if with_bias else grad.new_empty(0)
    if not transposed and groups == 1 and is_pointwise(weight, stride, padding):
        return _pointwise_gradient(grad, x, weight), of_bias
    if transposed:
        # A transposed convolution is the adjoint of a plain one, whose input has the shape of `grad`.
        grad, x = x, grad
    total: Tensor | None = None
    depth = -(-grad.shape[2] // slabs)
    for first in range(0, grad.shape[2], depth * _together(grad)):
        part = _slab_gradient(grad, x, weight, first, depth, stride, padding, dilation, groups)
        # Sums of 16-bit gradients are rounded once, at the end.
        part = part.float() if part.dtype.itemsize < 4 else part
        total = part if total is None else total.add_(part)
    assert total is not None
    of_weight = torch.empty_like(weight)
    return total if _same_layout(total, of_weight) else of_weight.copy_(total), of_bias


@volume_weight_gradient.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    with_bias: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    groups: int,
    slabs: int,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), grad.new_empty(grad.shape[1] if with_bias else 0)


def _pointwise_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    total = torch.zeros(weight.shape[:2], dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32)
    for grads, inputs in zip(grad, x, strict=True):
        total += _matrix(grads) @ _matrix(inputs).t()
    return torch.empty_like(weight).copy_(total.view(weight.shape))


def _matrix(sample: Tensor) -> Tensor:
    """(C, D, H, W) as (C, voxels), without a copy if the sample lies contiguous or channels-last."""
    if sample.is_contiguous():
        return sample.flatten(1)
    return sample.permute(1, 2, 3, 0).flatten(0, 2).t()


def is_pointwise(weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether a convolution is a product of a matrix and every pixel or voxel; one of each group."""
    return weight.shape[2:].numel() == 1 and set(stride) == {1} and set(padding) == {0}


def _together(grad: Tensor) -> int:
    """Slabs that are convolved in one call: two of a single volume, as a batch of two."""
    return 2 if grad.shape[0] == 1 else 1


def _slab_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    first: int,
    depth: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """What `depth` rows of `grad` from `first` on contribute, with the rows of `x` that they came from."""
    reach = (depth - 1) * stride[0] + dilation[0] * (weight.shape[2] - 1) + 1
    rows = [first + depth * number for number in range(_together(grad))]
    grads = _joined([_rows(grad, row, row + depth) for row in rows])
    starts = [row * stride[0] - padding[0] for row in rows]
    inputs = _joined([_rows(x, start, start + reach) for start in starts])
    geometry = (stride, [0, *padding[1:]], dilation, False, [0, 0, 0], groups)
    part: Tensor = aten.convolution_backward.default(grads, inputs, weight, None, *geometry, [False, True, False])[1]
    return part


def _rows(volume: Tensor, start: int, end: int) -> Tensor:
    """Rows `start` to `end` of a volume's depth; those outside it are zeros."""
    size = volume.shape[2]
    inside = volume[:, :, min(max(start, 0), size) : min(max(end, 0), size)]
    before, after = min(max(-start, 0), end - start), min(max(end - size, 0), end - start)
    return F.pad(inside, (0, 0, 0, 0, before, after)) if before or after else inside


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def slab_count(grad: Tensor, x: Tensor) -> int:
    """Slabs for a weight gradient, by the operands' size. A single volume's go by twos: an even number."""
    together = _together(grad)
    size = grad.numel() * grad.element_size() + x.numel() * x.element_size()
    return together * max(1, min(SLABS, size // SLAB_BYTES, grad.shape[2] // (2 * together)))


OPERATORS = (
    torch.ops.xconv.single_convolution.default,
    torch.ops.xconv.pointwise_convolution.default,
    torch.ops.xconv.volume_weight_gradient.default,
)


def operator_for(func: Any, args: Sequence[Any]) -> Any:
    """The operator that computes `func(*args)` where that is worth it, else None. Tensors may be fake.

    None as well for an input gradient by `aten.convolution_backward`. Of the other's three results the operator returns
    the last two.
    """
    if func is aten.convolution.default:
        call = Convolution.of(args)
        geometry = call.geometry
        if _is_native(call.x, call.weight, geometry.arguments):
            if geometry.groups == 1 and is_pointwise(call.weight, geometry.stride, geometry.padding):
                return torch.ops.xconv.pointwise_convolution.default
            if _unfolds(call.x, call.weight, geometry.arguments):
                return torch.ops.xconv.single_convolution.default
    if func is aten.convolution_backward.default:
        backward = ConvBackward.of(args)
        if backward.of_weight and not backward.of_input and _is_ours(args):
            return torch.ops.xconv.volume_weight_gradient.default
    return None


def arguments_for(operator: Any, args: Sequence[Any], values: Sequence[Any]) -> tuple[Any, ...]:
    """The operator's arguments from those of the function that it replaces, be they tensors or nodes of a graph.

    `values` are the same with tensors, whose shapes say how many slabs there are.
    """
    if operator is torch.ops.xconv.single_convolution.default:
        return tuple(args[:9])
    if operator is torch.ops.xconv.pointwise_convolution.default:
        return (*args[:3], args[6])
    small, large = _plain_operands(values)
    call = ConvBackward.of(args)
    stride, padding, dilation, transposed, _, groups = call.geometry.arguments
    slabs = slab_count(small, large)
    return (call.grad, call.x, call.weight, call.of_bias, stride, padding, dilation, transposed, groups, slabs)


def two_slabs(args: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of `volume_weight_gradient` cut down to two of its slabs (two pairs of a single volume's).

    A call takes as much memory as with all of them.
    """
    *others, slabs = args
    small, large = _plain_operands(args)
    stride, padding, dilation, extent = args[4][0], args[5][0], args[6][0], args[2].shape[2]
    few = 2 * _together(small)
    if slabs <= few:
        return tuple(args)
    depth = few * -(-small.shape[2] // slabs)
    reach = (depth - 1) * stride + dilation * (extent - 1) + 1 - padding
    small, large = small[:, :, :depth], large[:, :, :reach]
    others[:2] = (large, small) if args[7] else (small, large)
    return (*others, few)


def _is_native(x: Tensor, weight: Tensor, geometry: Sequence[Any]) -> bool:
    """Whether ATen takes its own convolution for a volume."""
    return x.dim() == 5 and x.device.type == "cpu" and "Slow" in _backend(x, weight, geometry)


def _unfolds(x: Tensor, weight: Tensor, geometry: Sequence[Any]) -> bool:
    """Whether a volume is unfolded that two of it would not be."""
    if x.shape[0] != 1 or "Slow" in _backend(_twice(x), weight, geometry):
        return False
    stride, padding, dilation, transposed = geometry[:4]
    spatial = x.shape[2:]
    output = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(spatial, padding, dilation, weight.shape[2:], stride, strict=True)
    ]
    unfolded = weight.numel() // weight.shape[0] * prod(spatial if transposed else output)
    return unfolded > UNFOLDED * (x.numel() + weight.shape[0] * prod(output))


def _is_ours(args: Sequence[Any]) -> bool:
    """Whether a weight gradient is a product, or that of volumes which oneDNN computes and of which there are slabs."""
    weight = args[2]
    if weight.dim() != 5 or weight.device.type != "cpu":
        return False
    if not args[7] and args[9] == 1 and is_pointwise(weight, args[4], args[5]):
        return True
    small, large = _plain_operands(args)
    plain = (*args[4:7], False, [0, 0, 0], args[9])
    if large.shape[0] > 1 and _read_as_they_lie(small, large):
        return False
    several = large.expand(max(2, large.shape[0]), *large.shape[1:])
    return min(small.shape[2], slab_count(small, large)) > 1 and "Slow" not in _backend(several, weight, plain)


def _read_as_they_lie(*operands: Tensor) -> bool:
    """Whether oneDNN transposes no operand: with AVX-512, channels-last ones in float32. Plans for any machine: no."""
    fast = torch.backends.cpu.get_cpu_capability() == "AVX512" and not is_portable()
    return fast and all(
        x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last_3d) for x in operands
    )


def _plain_operands(args: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Output gradient and input of a backward, or of the plain convolution whose adjoint a transposed one is."""
    return (args[1], args[0]) if args[7] else (args[0], args[1])


def _backend(x: Tensor, weight: Tensor, geometry: Sequence[Any]) -> str:
    return convolution_backend(x, weight, None, geometry)


def _same_layout(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.stride() == other.stride()


def _twice(x: Tensor) -> Tensor:
    return x.expand(2, *x.shape[1:])
