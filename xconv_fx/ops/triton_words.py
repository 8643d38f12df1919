"""The hash of `counter_rng` for Triton kernels of ours, and whether there can be such kernels.

Every integer is an unsigned word of 32 bits, whose products and sums wrap by themselves.

Known gap: where Triton is not installed (a wheel of torch for CUDA brings it on Linux), there are none.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from . import counter_rng

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def usable(device: torch.device | None) -> bool:
    """Whether tensors of this device are for kernels of ours."""
    return triton is not None and device is not None and device.type == "cuda"


def launched_on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which kernels are launched on the device of a tensor."""
    return torch.cuda.device_of(tensor)


if triton is not None:
    GOLDEN, ORIGIN = tl.constexpr(counter_rng.GOLDEN), tl.constexpr(counter_rng.ORIGIN)
    FIRST, SECOND = tl.constexpr(counter_rng.FIRST_FACTOR), tl.constexpr(counter_rng.SECOND_FACTOR)

    @triton.jit
    def mix(word):
        """`counter_rng._mix`."""
        word = (word ^ (word >> 16)) * tl.full((), FIRST, tl.uint32)
        word = (word ^ (word >> 15)) * tl.full((), SECOND, tl.uint32)
        return word ^ (word >> 16)

    @triton.jit
    def constants(stream):
        """`counter_rng.constants` of an unsigned number."""
        golden = tl.full((), GOLDEN, tl.uint32)
        first = mix(tl.full((), ORIGIN, tl.uint32) + stream * golden)
        return first, mix(first + golden)

    @triton.jit
    def halves(seed):
        """`counter_rng.split_seed`."""
        return (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)

    @triton.jit
    def keys(seed, stream):
        """`counter_rng.derive_keys` of a seed and an unsigned stream."""
        low, high = halves(seed)
        first, second = constants(stream)
        one, other = mix(low ^ first), mix(high ^ second)
        return mix(one ^ other), mix(one + other)

    @triton.jit
    def keyed_product(index, first, second):
        """`counter_rng._keyed_product` of an unsigned index under two keys."""
        word = index ^ first
        word = (word ^ (word >> 16)) * tl.full((), FIRST, tl.uint32)
        word = (word ^ (word >> 15)) + second
        return word * tl.full((), SECOND, tl.uint32)
