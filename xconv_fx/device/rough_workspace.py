"""Rough rules for what convolutions allocate inside a call: for plans that are of no machine in particular.

* ATen's native convolutions unfold their input (im2col): C k^d values for each output position, sample by sample or
  for the whole batch at once;
* oneDNN's reorder the weight, and of a weight gradient the result.

What oneDNN copies besides depends on the processor and is left out (`device/workspace.py` measures it).
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from xconv_fx.hooks import dispatch
from xconv_fx.ops import conv3d

aten = torch.ops.aten


def rough_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes by the rules; 0 for all but ATen's convolutions."""
    if func is aten.convolution.default:
        return _convolution(*args[:9])
    if func is aten.convolution_backward.default:
        _, x, weight, _, *geometry, mask = args
        # The weight gradient is produced in the library's blocked layout and copied out of it.
        return _convolution(x, weight, None, *geometry) + (weight.numel() * weight.element_size() if mask[1] else 0)
    return 0


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
    weight_bytes = weight.numel() * weight.element_size()
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    backend = dispatch.convolution_backend(x, weight, bias, geometry)
    if "Slow" not in backend:
        return weight_bytes
    if backend.endswith((".Slow2d", ".Slow3d")) and conv3d.is_pointwise(weight, stride, padding):
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
