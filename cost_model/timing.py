"""Seconds of a kernel by the roofline: it is limited by arithmetic or by memory traffic, whichever takes longer.

    seconds = launch + max(flops / (flop/s), bytes / (bytes/s)) + rearranging

(Williams, Waterman, Patterson: Roofline, CACM 2009.) Good enough to rank codecs: packing and unpacking are limited by
bytes, replayed convolutions by flops. All sizes are plain ints; a multiply-add counts as two flops.

A convolution of few channels falls short of the rate, a depthwise one most of all, because tiles of input by output
channels stay partly empty. `few_channels` says by how much.

Known gaps: an algorithm that saves multiplications (Winograd, FFT) beats its count; loops that are not vectorised, such
as the statistics of normalisation layers in channels-last tensors on the CPU, take several times what their traffic
does.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from .device import DeviceSpec

# Channels on one side with which a convolution reaches half of the rate of a wide one. Measured with oneDNN on a CPU
# (AVX2), where this is within a factor of two from 1 to 64 channels, depthwise weight gradients (slower yet) apart.
HALF_RATE = 2
# How many times longer than a copy it takes to bring an operand into a convolution's own layout, or to unfold it. With
# oneDNN, 7 to 10 were measured for contiguous volumes, and 1 to 2 for weights, which fit into a cache.
REARRANGING = 3


def seconds(
    flops: float,
    traffic: float,
    device: DeviceSpec,
    dtype: str = "float32",
    *,
    weight_flops: float = 0,
    rearranged: float = 0,
) -> float:
    """Time of one kernel that reads and writes `traffic` bytes in all.

    It takes `flops` operations in `dtype`, and `weight_flops` more for weight gradients of convolutions. `rearranged`
    are bytes read and written to bring operands into another layout first.
    """
    arithmetic = flops / device.flops(dtype) + weight_flops / device.weight_flops(dtype)
    return device.launch + max(arithmetic, traffic / device.bandwidth) + REARRANGING * rearranged / device.bandwidth


def few_channels(in_channels: int, out_channels: int) -> float:
    """How many times longer a convolution takes than its flops at full rate: 1 for many channels, 9 for depthwise ones.

    The numbers of channels are those of a group; the same factor goes for both gradients.
    """
    return (1 + HALF_RATE / in_channels) * (1 + HALF_RATE / out_channels)


def conv_flops(
    batch: int, in_channels: int, out_channels: int, kernel: Sequence[int], output: Sequence[int], groups: int = 1
) -> int:
    """Flops of a convolution whose spatial output has the sizes `output`; stride and dilation are in those sizes.

    Its input gradient and its weight gradient pair the same elements, so each of the three takes this number. A
    transposed convolution is the input gradient of a plain one: give it its *input's* spatial sizes as `output`.
    `in_channels` and `out_channels` are totals over the groups. Raises `ValueError` when the groups do not divide them.
    """
    if groups < 1 or in_channels % groups or out_channels % groups:
        raise ValueError(f"groups: {groups} does not divide {in_channels} and {out_channels} channels")
    return 2 * batch * out_channels * prod(output) * (in_channels // groups) * prod(kernel)


def linear_flops(rows: int, in_features: int, out_features: int) -> int:
    """Flops of a matrix product (rows x in) (in x out); each of its two gradients takes the same number."""
    return 2 * rows * in_features * out_features
