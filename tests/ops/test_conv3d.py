"""3D convolutions by slabs and by twos: the same numbers as ATen's, in less memory."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch.library import opcheck

from xconv_fx.measure import allocated_by
from xconv_fx.ops import conv3d
from xconv_fx.reproducible import portable

aten = torch.ops.aten


def call(batch=2, channels=8, out=6, size=(12, 10, 10), kernel=3, stride=1, padding=1, dilation=1, transposed=False,
         extra=0, groups=1, dtype=torch.float32, last=True):  # fmt: skip
    """Arguments of `aten.convolution`, without bias."""
    torch.manual_seed(0)
    form = torch.channels_last_3d if last else torch.contiguous_format
    shape = (channels, out // groups) if transposed else (out, channels // groups)
    x = torch.randn(batch, channels, *size, dtype=dtype).contiguous(memory_format=form)
    weight = torch.randn(*shape, kernel, kernel, kernel, dtype=dtype).contiguous(memory_format=form)
    return x, weight, None, [stride] * 3, [padding] * 3, [dilation] * 3, transposed, [extra] * 3, groups


def backward(args, bias=True):
    """Arguments of `aten.convolution_backward` for the weight gradient of a call."""
    y = aten.convolution.default(*args)
    channels = [y.shape[1]] if bias else None
    return torch.randn_like(y), args[0], args[1], channels, *args[3:], [False, True, bias]


GEOMETRIES = [
    {},
    {"stride": 2},
    {"kernel": 1, "padding": 0},
    {"kernel": 2, "padding": 0, "stride": 2},
    {"kernel": 5, "padding": 3},
    {"dilation": 2, "padding": 2},
    {"dilation": 3, "padding": 0, "kernel": 2},
    {"groups": 2},
    {"transposed": True},
    {"transposed": True, "stride": 2, "kernel": 2, "padding": 0},
    {"transposed": True, "stride": 2, "extra": 1},
    {"size": (5, 9, 8)},
    {"size": (2, 20, 20), "padding": 2},
    {"last": False},
]


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_the_weight_gradient_is_exact(batch, geometry, monkeypatch):
    monkeypatch.setattr(conv3d, "SLAB_BYTES", 1)
    args = backward(call(batch, **geometry))
    kernel = torch.ops.xconv.volume_weight_gradient.default
    weight, bias = kernel(*conv3d.arguments_for(kernel, args, args))
    _, exact, exact_bias = aten.convolution_backward.default(*args)
    scale = exact.abs().max().item()
    torch.testing.assert_close(weight, exact, rtol=1e-4, atol=2e-6 * scale)
    torch.testing.assert_close(bias, exact_bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_single_convolution_is_exact(geometry):
    args = call(1, **geometry)
    got = torch.ops.xconv.single_convolution.default(*args)
    torch.testing.assert_close(got, aten.convolution.default(*args), rtol=1e-4, atol=1e-4)


def test_sixteen_bit_slabs_are_rounded_once(monkeypatch):
    monkeypatch.setattr(conv3d, "SLAB_BYTES", 1)
    args = backward(call(2, dtype=torch.bfloat16, size=(16, 8, 8)), bias=False)
    kernel = torch.ops.xconv.volume_weight_gradient.default
    weight, none = kernel(*conv3d.arguments_for(kernel, args, args))
    exact = aten.convolution_backward.default(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))[1]
    assert weight.dtype == torch.bfloat16 and none.numel() == 0
    assert (weight.double() - exact).norm() < 4e-3 * exact.norm()


def test_operators_keep_their_contracts():
    args = call(1)
    opcheck(torch.ops.xconv.single_convolution.default, args)
    kernel = torch.ops.xconv.volume_weight_gradient.default
    for bias, geometry in itertools.product((False, True), ({}, {"transposed": True, "last": False})):
        args = backward(call(2, size=(8, 8, 8), **geometry), bias)
        opcheck(kernel, (*conv3d.arguments_for(kernel, args, args)[:-1], 3))


def test_where_they_are_worth_it():
    with portable():  # On any processor.
        single, slabs = torch.ops.xconv.single_convolution.default, torch.ops.xconv.volume_weight_gradient.default
        forward, gradient = aten.convolution.default, aten.convolution_backward.default
        small, large = call(1, 16, 16, (16, 32, 8)), call(1, 16, 16, (48, 32, 8))
        assert conv3d.operator_for(forward, small) is single
        assert conv3d.operator_for(forward, large) is None, "oneDNN computes it by itself"
        assert conv3d.operator_for(forward, call(2, 16, 16, (16, 32, 8))) is None
        assert conv3d.operator_for(forward, call(1, 16, 16, dtype=torch.float64)) is None, "oneDNN has no float64"
        assert conv3d.operator_for(gradient, backward(small)) is slabs
        assert conv3d.operator_for(gradient, backward(call(2, 16, 16, (16, 32, 32)))) is slabs
        assert conv3d.operator_for(gradient, backward(call(2, 4, 4, (8, 8, 8)))) is None, "too small for slabs"
        assert conv3d.operator_for(gradient, backward(call(2, 16, 16, (1, 64, 64), padding=1))) is None, "no depth"
        both = (*backward(small)[:10], [True, True, False])
        assert conv3d.operator_for(gradient, both) is None
        image = torch.randn(1, 64, 16, 16), torch.randn(64, 64, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1
        assert conv3d.operator_for(forward, image) is None


def test_they_take_less_memory():
    args = call(1, 16, 16, (32, 32, 32))
    alone, _ = allocated_by(lambda: aten.convolution.default(*args))
    twice, _ = allocated_by(lambda: torch.ops.xconv.single_convolution.default(*args))
    assert twice < alone / 4
    # With AVX-512, oneDNN reads channels-last ones as they lie and copies contiguous ones; AVX2: the other way.
    last = "AVX512" not in torch.backends.cpu.get_cpu_capability()
    args = backward(call(2, 16, 4, (32, 32, 32), last=last), bias=False)
    kernel = torch.ops.xconv.volume_weight_gradient.default
    whole, _ = allocated_by(lambda: aten.convolution_backward.default(*args))
    slabs, _ = allocated_by(lambda: kernel(*conv3d.arguments_for(kernel, args, args)))
    assert slabs < whole / 2


@pytest.mark.parametrize("last", [False, True])
def test_a_pointwise_weight_gradient_copies_nothing(last):
    """The gradient lies contiguous, as losses give it, the input in either layout."""
    args = backward(call(2, 16, 3, (16, 16, 16), kernel=1, padding=0, last=last))
    args = (args[0].contiguous(), *args[1:])
    kernel = conv3d.operator_for(aten.convolution_backward.default, args)
    taken, _ = allocated_by(lambda: kernel(*conv3d.arguments_for(kernel, args, args)))
    assert taken <= 8 * args[2].numel() * 4


@pytest.mark.parametrize("geometry", [{}, {"last": False}, {"transposed": True}, {"dtype": torch.float64}], ids=str)
def test_a_pointwise_convolution_is_exact_and_copies_nothing(geometry):
    x, weight, _, *rest = call(2, 16, 8, kernel=1, padding=0, **geometry)
    kernel = torch.ops.xconv.pointwise_convolution.default
    for bias in (None, torch.randn(8, dtype=x.dtype)):
        args = (x, weight, bias, *rest)
        got = kernel(*conv3d.arguments_for(kernel, args, args))
        taken, _ = allocated_by(functools.partial(kernel, *conv3d.arguments_for(kernel, args, args)))
        torch.testing.assert_close(got, aten.convolution.default(*args), rtol=1e-4, atol=1e-4)
        assert got.is_contiguous() and taken <= got.nbytes + 64
    opcheck(kernel, conv3d.arguments_for(kernel, args, args))


def test_pointwise_convolutions_stand_for_native_ones():
    kernel = torch.ops.xconv.pointwise_convolution.default
    double = call(2, 16, 8, kernel=1, padding=0, dtype=torch.float64)
    assert conv3d.operator_for(aten.convolution.default, double) is kernel, "oneDNN has no float64"
    assert conv3d.operator_for(aten.convolution.default, call(2, 16, 8, kernel=1, padding=1)) is not kernel
    threads = torch.get_num_threads()
    try:
        for number, expected in ((1, kernel), (2, None)):
            torch.set_num_threads(number)
            assert conv3d.operator_for(aten.convolution.default, call(2, 16, 8, kernel=1, padding=0)) is expected
    finally:
        torch.set_num_threads(threads)
