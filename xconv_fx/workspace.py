"""Bytes that extern kernels allocate inside a call, where they can be known.

On CPU, ATen's convolution has several backends, and torch itself says which one runs:

* the native ones unfold their input (im2col), C k^d x output positions, which can dwarf every activation;
* oneDNN on channels-last images reorders the weights only, but for weight gradients with groups, where it pads each
  group to the processor's vectors (64 times the weights of a depthwise convolution), and those of 16-bit images, which
  every thread transposes and sums up in float32;
* oneDNN on volumes and on contiguous images copies activations into blocked layouts of its own, in pieces that depend
  on the strides and on the processor's vectors, and needs scratch for the weight gradients of volumes in any layout.

No rule of ours fits the last three, so the call is made once on tensors of the same shapes and the allocator is watched
(`measured`, cached; above `LARGEST` bytes, and in plans for no machine in particular, a rough rule is used instead).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import _disable_current_modes

from .cudnn import cudnn_workspace
from .measure import allocated_by, storage_bytes
from .ops import volume
from .portable import is_portable

aten = torch.ops.aten


# The largest operands, in bytes, on which a call is made to see what it allocates.
LARGEST = 1 << 28
# The depth of a shallow volume, whose convolution takes little time.
SHALLOW = 8


def workspace_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes allocated and freed within one call of `func` beyond its outputs; 0 where nothing is known."""
    if func in volume.OPERATORS:
        if is_portable():
            return 0
        if func is torch.ops.xconv.volume_weight_gradient.default:
            args = tuple(map(_cut, volume.two_slabs(args), args))
        return measured(func, *_signature(args))
    if func is aten.convolution.default:
        return _measured_by_depth(args) if _is_measured(func, args) else _convolution(*args[:9])
    if func is aten.convolution_backward.default:
        few = _few_images(args)
        if _is_measured(func, few):
            return measured(func, *_signature(few))
        _, x, weight, _, stride, padding, dilation, transposed, output_padding, groups, mask = args
        work = _convolution(x, weight, None, stride, padding, dilation, transposed, output_padding, groups)
        # The weight gradient is produced in the library's blocked layout and copied out of it.
        return work + (weight.numel() * weight.element_size() if mask[1] else 0)
    return 0


def _measured_by_depth(args: tuple[Any, ...]) -> int:
    """The workspace of a convolution; of deep volumes, that of two shallower ones, continued along a line.

    What oneDNN copies grows with the depth, and the arithmetic as well: a call at full size can take seconds.
    """
    x, weight, *geometry = args[:9]
    # A single volume has to be so deep that it does not go to another library.
    least = volume.NATIVE // (x.shape[1] * x.shape[3]) + 1 if x.shape[0] == 1 else 1
    shallow = max(SHALLOW, least)
    if x.dim() != 5 or x.shape[2] <= 2 * shallow:
        return measured(aten.convolution.default, *_signature(args[:9]))
    less, more = (
        measured(aten.convolution.default, *_signature((_cut(x[:, :, :depth], x), weight, *geometry)))
        for depth in (shallow, 2 * shallow)
    )
    return less + (more - less) * (int(x.shape[2]) - shallow) // shallow


def _is_measured(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether oneDNN runs this, and more than weights are laid out anew for it."""
    x, weight, *_ = args if func is aten.convolution.default else (args[1], args[2])
    geometry = args[3:9] if func is aten.convolution.default else args[4:10]
    if x.device.type != "cpu" or x.dim() not in (4, 5) or is_portable():
        return False
    scratch = func is aten.convolution_backward.default and (geometry[5] > 1 or x.element_size() < 4)
    # ATen goes by strides: an image of one channel can be channels-last and still be taken for contiguous.
    last = torch.channels_last in (suggest_memory_format(x), suggest_memory_format(weight))
    if x.dim() == 4 and not scratch and last:
        return False
    small = sum(arg.numel() * arg.element_size() for arg in args if isinstance(arg, torch.Tensor)) < LARGEST
    # oneDNN's transposed backend has no name in torch's Python binding.
    return small and "Slow" not in str(torch._C._select_conv_backend(x, weight, None, *geometry))


def _few_images(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a 16-bit weight gradient, cut down to some samples for each thread: its scratch is the same."""
    grad, x, *rest = args
    few = 4 * torch.get_num_threads()
    if x.dim() != 4 or x.element_size() >= 4 or x.shape[0] <= few or rest[-1][0]:
        return args
    return (grad[:few], x[:few], *rest)


def _signature(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments without data: tensors by their shape, strides and dtype."""

    def describe(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return _Shaped(tuple(map(int, value.shape)), tuple(map(int, value.stride())), value.dtype)
        return tuple(value) if isinstance(value, (list, tuple)) else value

    return tuple(map(describe, args))


@dataclass(frozen=True)
class _Shaped:
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def real(self) -> torch.Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype).zero_()


@functools.cache
def measured(func: Any, *signature: Any) -> int:
    """Bytes that one call allocates beyond its outputs, by the allocator's own events."""
    with _disable_current_modes(), torch.no_grad():
        args = [value.real() if isinstance(value, _Shaped) else value for value in signature]
        peak, outputs = allocated_by(lambda: func(*args))
    return max(0, peak - storage_bytes(outputs))


def node_workspace(node: torch.fx.Node) -> int:
    """`workspace_bytes` of a graph's node, its arguments taken from their fake tensors."""
    if node.target not in (aten.convolution.default, aten.convolution_backward.default):
        return 0
    if node.args[0].meta["val"].device.type == "cuda":  # type: ignore[union-attr]
        return cudnn_workspace(node)
    args: Any = torch.fx.node.map_arg(node.args, lambda arg: _laid_out(arg.meta["val"]))  # type: ignore[arg-type]
    kernel = volume.operator_for(node.target, args)
    return workspace_bytes(kernel or node.target, volume.arguments_for(kernel, args, args) if kernel else args)


def _cut(part: Any, whole: Any) -> Any:
    """A part of an operand, with memory of its own if the whole has that; a view is copied by the library."""
    if not isinstance(part, torch.Tensor) or part.shape == whole.shape:
        return part
    reach = 1 + sum((size - 1) * stride for size, stride in zip(whole.shape, whole.stride(), strict=True))
    return torch.empty_like(part) if reach == whole.numel() else part


def _laid_out(value: torch.Tensor) -> torch.Tensor:
    """An operand as Inductor will lay it out: images channels-last, as it decides for nearly all networks."""
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value


def _convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> int:
    if x.device.type != "cpu":
        return 0
    weight_bytes = weight.numel() * weight.element_size()
    backend = str(
        torch._C._select_conv_backend(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
    )
    if "Slow" not in backend:
        return weight_bytes
    if backend.endswith((".Slow2d", ".Slow3d")) and volume.is_pointwise(weight, stride, padding):
        return 0  # Unfolding such an input is a view of it.
    columns = weight.numel() // weight.size(0)
    positions = _positions(x, weight, stride, padding, dilation, transposed, output_padding)
    samples = x.size(0) if backend.endswith(_WHOLE_BATCH) else 1
    return columns * positions * samples * x.element_size()


# The native backends that unfold the whole batch at once; the others (dilated, transposed 3d) go sample by sample.
_WHOLE_BATCH = (".Slow2d", ".Slow3d", ".SlowTranspose2d")


def _positions(
    x: torch.Tensor, weight: torch.Tensor, stride: Any, padding: Any, dilation: Any, transposed: bool, extra: Any
) -> int:
    """Spatial positions of the unfolded side: the convolution's output, or a transposed convolution's input."""
    if transposed:
        return prod(x.shape[2:])
    rank = x.dim() - 2
    broadcast = [list(v) * (rank if len(v) == 1 else 1) for v in (stride, padding, dilation)]
    return prod(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(x.shape[2:], weight.shape[2:], *broadcast, strict=True)
    )
