"""Bytes that extern kernels allocate inside a call, where they are known.

On CPU, ATen's convolution has several backends. oneDNN's allocates little through the tensor allocator (reordered
weights); the native ones, which run in float64, without oneDNN's support for bfloat16, and often in 3d, unfold the
input (im2col): C k^d x output positions, which can dwarf every activation. Which backend runs is asked of torch itself.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch

aten = torch.ops.aten


def workspace_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes allocated and freed within one call of `func` beyond its outputs; 0 where nothing is known."""
    if func is aten.convolution.default:
        x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args[:9]
        return _convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups, 1)
    if func is aten.convolution_backward.default:
        _, x, weight, _, stride, padding, dilation, transposed, output_padding, groups, mask = args
        work = _convolution(x, weight, None, stride, padding, dilation, transposed, output_padding, groups, 1)
        # The weight gradient is produced in the library's blocked layout and copied out of it.
        return work + (weight.numel() * weight.element_size() if mask[1] else 0)
    return 0


def node_workspace(node: torch.fx.Node) -> int:
    """`workspace_bytes` of a graph's node, its arguments taken from their fake tensors."""
    if node.target not in (aten.convolution.default, aten.convolution_backward.default):
        return 0
    return workspace_bytes(node.target, torch.fx.node.map_arg(node.args, lambda arg: arg.meta["val"]))  # type: ignore[arg-type]


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
    copies: int,
) -> int:
    if x.device.type != "cpu":
        return 0
    weight_bytes = weight.numel() * weight.element_size()
    backend = str(
        torch._C._select_conv_backend(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
    )
    if "Slow" not in backend:
        return copies * weight_bytes
    if backend.endswith("Slow2d") and _is_pointwise(weight, stride, padding):
        return 0  # Unfolding such an input is a view of it.
    columns = weight.numel() // weight.size(0)
    positions = _positions(x, weight, stride, padding, dilation, transposed, output_padding)
    samples = x.size(0) if backend.endswith(_WHOLE_BATCH) else 1
    return columns * positions * samples * x.element_size()


# The native backends that unfold the whole batch at once; the others (dilated, transposed 3d) go sample by sample.
_WHOLE_BATCH = (".Slow2d", ".Slow3d", ".SlowTranspose2d")


def _is_pointwise(weight: torch.Tensor, stride: Any, padding: Any) -> bool:
    return set(weight.shape[2:]) == {1} and set(stride) == {1} and set(padding) == {0}


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
