"""Cheap strides are the strides that sympy's simplification finds."""

from __future__ import annotations

import itertools

import pytest
import sympy
from torch._inductor.codegen import cpp
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from xconv_fx import hooks
from xconv_fx.hooks import indexing
from xconv_fx.hooks.stride_home import stride_home

# Raised by torch 2.13 itself, while it imports Inductor.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

x, y = (sympy.Symbol(name, integer=True, nonnegative=True) for name in ("x0", "x1"))
HOME = stride_home()
INDICES = {
    "linear": 3 * x + 64 * y + 7,
    "constant": 64 * y,
    "product": 8 * (x + 4 * y),
    "quotient by a vector": FloorDiv(x, 16) + 64 * y,
    "quotient by less": FloorDiv(x, 3) + y,
    "remainder of a vector": ModularIndexing(x, 1, 32) + 4 * FloorDiv(x, 32),
    "digit": ModularIndexing(x, 8, 4) + 16 * y,
    "remainder of less": ModularIndexing(x, 1, 5),
    "nested": FloorDiv(ModularIndexing(x, 1, 64), 8) + 8 * FloorDiv(x, 64),
    "of another": x + ModularIndexing(y, 4, 8),
}


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("vector", [None, 8])
def test_strides_agree(name, vector):
    theirs = HOME.stride_at_vec_range(INDICES[name], x, vector)
    with hooks.cheap_strides():
        ours = cpp.stride_at_vec_range(INDICES[name], x, vector)
        assert HOME.stride_at_vec_range is cpp.stride_at_vec_range
    assert cpp.stride_at_vec_range is HOME.stride_at_vec_range is not indexing._stride
    assert theirs.is_number == ours.is_number
    if theirs.is_number:
        assert theirs == ours


def test_a_stride_holds_for_every_value():
    """Where ours is a number, the index grows by it at each step inside a vector."""
    for index in INDICES.values():
        with hooks.cheap_strides():
            stride = cpp.stride_at_vec_range(index, x, 8)
        if not stride.is_number:
            continue
        for start in range(0, 128, 8):
            values = [int(index.subs({x: start + step, y: 5})) for step in range(8)]
            assert [b - a for a, b in itertools.pairwise(values)] == [stride] * 7, index


def test_nothing_is_patched_when_it_is_off():
    before = HOME.stride_at
    with hooks.cheap_strides(enabled=False):
        assert HOME.stride_at is before
    with hooks.cheap_strides():
        assert HOME.stride_at is not before
    assert HOME.stride_at is before
