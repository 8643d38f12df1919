"""Kernels that address 2**31 elements and more: in 64 bits, while random draws are counted in 32 wherever they run."""

from __future__ import annotations

import pytest
from helpers.fake_cuda import FakeCuda
from helpers.fake_cuda.units import Unit

LARGE = (1, 32, 2**13, 2**14), (0, 2, 3, 1)
# The first factor of the hash, which wraps in 32 bits.
FACTOR = 2146121005


# In double precision codes are written by generated loops; else by a kernel of ours, which says itself what has how
# many bits (`quantize_kernel`).
UNITS = Unit("quantize", *LARGE, 4, dtype="float64"), Unit("fold", *LARGE, 2**28), Unit("mask", *LARGE)


@pytest.mark.parametrize("unit", UNITS)
def test_places_are_of_64_bits_and_draws_of_32(cuda: FakeCuda, unit: Unit) -> None:
    """Otherwise the draws of a kernel would depend on the largest tensor that it touches besides."""
    code = cuda.call("units:generate", unit).code
    kernels = [part.partition("async_compile.")[0] for part in code.split("async_compile.triton(")[1:]]
    large = [kernel for kernel in kernels if "tl.int64) * XBLOCK" in kernel]
    assert large
    # Keys are derived in 64 bits, by a kernel of their own or beside the ranges of groups; those that draw load two.
    drawing = [kernel for kernel in large if f"{FACTOR}, tl.int32" in kernel]
    assert bool(drawing) == (unit.name != "mask")
    for kernel in drawing:
        assert f"{FACTOR}, tl.int64" not in kernel
