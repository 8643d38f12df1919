"""The halves of a convolution's backward against ATen's fused one, in double precision, over a grid of geometries."""

from __future__ import annotations

import itertools

import pytest
import torch

from xconv_fx.ops.conv import input_gradient, weight_gradient

aten = torch.ops.aten
KERNELS = {1: [(1,), (2,), (3,)], 2: [(1, 1), (2, 2), (3, 3), (3, 1)], 3: [(1, 1, 1), (2, 2, 2), (3, 3, 1)]}
SIZES = {1: (11,), 2: (8, 9), 3: (6, 5, 7)}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small only wait for the threads of other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def case(dims, kernel, stride, padding, dilation, groups, transposed, output_padding=0):
    """Gradients of ATen and ours for one geometry, as ((input, weight), (input, weight))."""
    generator = torch.Generator().manual_seed(1)
    channels_in, channels_out = 4, 4 if groups == 4 else 6
    ends = (channels_in, channels_out // groups) if transposed else (channels_out, channels_in // groups)
    x = torch.randn(2, channels_in, *SIZES[dims], dtype=torch.float64, generator=generator)
    weight = torch.randn(*ends, *kernel, dtype=torch.float64, generator=generator)
    spread = ([stride] * dims, [padding] * dims, [dilation] * dims, transposed, [output_padding] * dims, groups)
    out = aten.convolution(x, weight, None, *spread)
    grad_out = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    theirs = aten.convolution_backward(grad_out, x, weight, None, *spread, [True, True, False])[:2]
    ours = (
        input_gradient(grad_out, weight, x.shape, *spread),
        weight_gradient(grad_out, x, weight.shape, *spread),
    )
    return theirs, ours


def close(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


@pytest.mark.parametrize("groups", [1, 2, 4], ids=["dense", "grouped", "depthwise"])
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_grid(dims, transposed, groups):
    for kernel, stride, padding, dilation in itertools.product(KERNELS[dims], (1, 2, 3), (0, 1), (1, 2)):
        theirs, ours = case(dims, kernel, stride, padding, dilation, groups, transposed)
        for mine, reference in zip(ours, theirs, strict=True):
            close(mine, reference)


@pytest.mark.parametrize(
    ("stride", "dilation", "output_padding"), [(2, 1, 1), (3, 1, 2), (3, 2, 1), (1, 2, 1), (2, 3, 2), (1, 3, 2)]
)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_output_padding(dims, stride, dilation, output_padding):
    """The last three reach the stride: the plain convolution yields rows past the input, which must go."""
    for kernel in KERNELS[dims]:
        theirs, ours = case(dims, kernel, stride, 1, dilation, 2, True, output_padding)
        for mine, reference in zip(ours, theirs, strict=True):
            close(mine, reference)


@pytest.mark.parametrize("kernel", [(1, 1), (2, 2), (3, 1)])
def test_padding_beyond_the_kernel(kernel):
    theirs, ours = case(2, kernel, 2, 3, 1, 1, False)
    for mine, reference in zip(ours, theirs, strict=True):
        close(mine, reference)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_weight_is_read_for_its_shape_alone(layout):
    x, grad_out = (torch.randn(2, 4, 6, 6).to(memory_format=layout) for _ in range(2))
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 2)
    weight = torch.full((4, 2, 3, 3), float("nan")).to(memory_format=layout)
    given = weight_gradient(grad_out, x, weight.shape, *geometry, like=weight)
    torch.testing.assert_close(given, weight_gradient(grad_out, x, weight.shape, *geometry))
