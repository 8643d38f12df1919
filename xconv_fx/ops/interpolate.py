"""Backwards of interpolation as gathers: each input position adds up the output positions that read it.

PyTorch takes `torch.nn.functional.interpolate` apart into reads of its input at computed positions, and autograd makes
of each a scatter into a buffer of the input's size, of a gradient of the output's size: eight of each for trilinear
interpolation of a volume, none of which is fused. Gathering writes every element once and holds nothing.

`interpolate_backward(grad (N, C, *out), input_size, mode, align_corners, scales) -> (N, C, *in)`, for 1 to 3 spatial
dims. `mode` is one of `MODES`; `scales` are the factors that were given, 0.0 for each that was not. What a position of
the output reads, and by which weights, is computed as `torch._decomp` does for the forward: by the same formulas,
rounded in the same dtype. A result lies as its gradient does: contiguous, or channels-last.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from xconv_fx.hooks.dispatch import plainly

from . import layout

# `torch.nn.functional.interpolate` calls these linear, bilinear or trilinear, and bicubic.
MODES = ("nearest", "nearest-exact", "linear", "cubic")

# Axes are gone through one by one where together they had more terms than this for each element: where kernels read
# vectors, and on a CPU where they read single elements, so that more in one loop take it ten times as long as apart.
MOST_TERMS, MOST_SINGLE_TERMS = 64, 8
# Positions are compared as float32, which holds all whole numbers below this.
_EXTENT_LIMIT = 1 << 24
_LARGEST_DENOMINATOR = 1000
AROUND = (-1, 0, 1, 2)  # What cubic interpolation reads, from the position below.
_A = -0.75  # PyTorch's constant of cubic convolution.


@dataclass(frozen=True)
class Axis:
    """One spatial dim: `extent` positions were resampled to `outputs`; `scale` is the factor given, 0.0 for none.

    Positions and weights are computed in `dtype`, but for the nearest ones, which torch computes in float32.
    """

    extent: int
    outputs: int
    mode: str
    align_corners: bool
    scale: float
    dtype: torch.dtype

    @property
    def step(self) -> float:
        """Positions of the input for each one of the output."""
        if self.mode.startswith("nearest"):
            return self.extent / (self.extent * self.scale if self.scale > 0 else self.outputs)
        if self.align_corners:
            return (self.extent - 1.0) / (self.outputs - 1.0) if self.outputs > 1 else 0.0
        return 1.0 / self.scale if self.scale > 0 else self.extent / self.outputs

    @property
    def slope(self) -> Fraction:
        """About how many positions of the output there are for each one of the input."""
        if self.align_corners and not self.mode.startswith("nearest"):
            return Fraction(self.outputs - 1, self.extent - 1) if self.extent > 1 else Fraction(0)
        given = Fraction(self.scale).limit_denominator(_LARGEST_DENOMINATOR)
        return given or Fraction(self.outputs, self.extent)

    def reads(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """What each position of the output reads: positions of the input and their weights, both (reads, outputs)."""
        position = torch.arange(self.outputs, device=device)
        if self.mode.startswith("nearest"):
            offset = 0.5 if self.mode == "nearest-exact" else 0.0
            nearest = ((position.float() + offset) * self.step).long()
            return nearest.unsqueeze(0), torch.ones_like(nearest, dtype=self.dtype).unsqueeze(0)
        position = position.to(self.dtype)
        source = self.step * position if self.align_corners else self.step * (position + 0.5) - 0.5
        if self.mode == "linear":
            source = source.clamp(min=0.0)
        first = source.floor()
        share = (source - first).clamp(0.0, 1.0)
        places: tuple[int, ...]
        weights: tuple[Tensor, ...]
        places, weights = ((0, 1), (1 - share, share)) if self.mode == "linear" else (AROUND, cubic_weights(share))
        read = torch.stack([first.long() + place for place in places])
        return read.clamp(0, self.extent - 1), torch.stack(weights)

    @functools.cached_property
    def window(self) -> Window | None:
        """Where an input position finds all that read it; None where numbers are too large for 32 bits."""
        return _window(self)


def cubic_weights(share: Any, constant: Callable[[float], Any] = float) -> tuple[Any, Any, Any, Any]:
    """Weights of the four positions around one that is `share` behind the second of them.

    Of tensors, or of whatever else is reckoned with, which `constant` makes of numbers.
    """
    one, two = constant(1.0), constant(2.0)
    return (
        _far(share + one, constant),
        _near(share, constant),
        _near(one - share, constant),
        _far(two - share, constant),
    )


def _near(x: Any, constant: Callable[[float], Any]) -> Any:
    return (constant(_A + 2) * x - constant(_A + 3)) * x * x + constant(1.0)


def _far(x: Any, constant: Callable[[float], Any]) -> Any:
    return ((constant(_A) * x - constant(5 * _A)) * x + constant(8 * _A)) * x - constant(4 * _A)


@dataclass(frozen=True)
class Window:
    """Position i of the input is read by none but the output's (i * `times` + `plus`) // `over`, and `taps` - 1 after.

    `whole` says that it is read by each of these, with a weight of 1.
    """

    times: int
    plus: int
    over: int
    taps: int
    whole: bool

    def first(self, position: int) -> int:
        """The first of them; it may be none of the output's, as may the last."""
        return (position * self.times + self.plus) // self.over


@functools.cache
def _window(axis: Axis) -> Window | None:
    times, over = axis.slope.numerator, axis.slope.denominator
    if max(axis.extent, axis.outputs) >= _EXTENT_LIMIT or axis.extent * times >= 1 << 30:
        return None
    with plainly():
        read, weights = axis.reads(torch.device("cpu"))
        used = weights != 0
        reader = torch.arange(axis.outputs).expand(read.shape)[used]
        read, weights = read[used], weights[used]
        first = torch.full((axis.extent,), axis.outputs).scatter_reduce(0, read, reader, "amin")
        last = torch.full((axis.extent,), -1).scatter_reduce(0, read, reader, "amax")
        seen = last >= 0
        line = torch.arange(axis.extent) * times
        plus = int(((first + 1) * over - 1 - line)[seen].min())
        taps = int((last - (line + plus) // over)[seen].max()) + 1
        whole = len(read) == axis.extent * taps and bool((weights == 1).all())
    return Window(times, plus, over, taps, whole)


def axes(
    outputs: Sequence[int],
    input_size: Sequence[int],
    mode: str,
    align_corners: bool,
    scales: Sequence[float],
    dtype: torch.dtype,
) -> list[Axis]:
    """The spatial dims of a backward whose gradient is of `dtype`."""
    wide = layout.accumulator(dtype)
    dims = zip(input_size, outputs, scales, strict=True)
    return [Axis(int(extent), int(count), mode, align_corners, scale, wide) for extent, count, scale in dims]


def gathers(along: Sequence[Axis]) -> bool:
    """Whether there are kernels for these axes."""
    return all(axis.window is not None for axis in along)


def rounds(along: Sequence[Axis], most: int = MOST_TERMS) -> list[list[int]]:
    """Which of the axes are gathered together, kernel by kernel, in at `most` terms: what shrinks most comes first."""
    taps = [1 if axis.window is None else axis.window.taps for axis in along]
    found: list[list[int]] = []
    for place in sorted(range(len(along)), key=lambda place: along[place].extent / along[place].outputs):
        if found and math.prod(taps[other] for other in found[-1]) * taps[place] <= most:
            found[-1].append(place)
        else:
            found.append([place])
    return found


@torch.library.custom_op("xconv::interpolate_backward", mutates_args=())
def interpolate_backward(
    grad: Tensor, input_size: Sequence[int], mode: str, align_corners: bool, scales: Sequence[float]
) -> Tensor:
    """Input gradient (N, C, *`input_size`) from that of what was interpolated; summed up in float32 at least."""
    total = grad.to(layout.accumulator(grad.dtype))
    for dim, axis in enumerate(axes(grad.shape[2:], input_size, mode, align_corners, scales, grad.dtype), start=2):
        shape = [*total.shape[:dim], axis.extent, *total.shape[dim + 1 :]]
        found = total.new_zeros(shape)
        for read, weights in zip(*axis.reads(grad.device), strict=True):
            found.index_add_(dim, read, total * weights.view(-1, *[1] * (total.dim() - dim - 1)))
        total = found
    return total.to(grad.dtype).clone(memory_format=_memory_format(grad))


@interpolate_backward.register_fake
def _(grad: Tensor, input_size: Sequence[int], mode: str, align_corners: bool, scales: Sequence[float]) -> Tensor:
    size = (*grad.shape[:2], *input_size)
    return grad.new_empty(size).contiguous(memory_format=_memory_format(grad))


def _memory_format(grad: Tensor) -> torch.memory_format:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(grad.dim())
    contiguous = last is None or grad.is_contiguous() or not grad.is_contiguous(memory_format=last)
    return torch.contiguous_format if contiguous or last is None else last
