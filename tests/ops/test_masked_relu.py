"""ReLU that holds bits: the numbers of torch's own, bit by bit."""

from __future__ import annotations

import math

import pytest
import torch

import xconv_fx.ops.masked_relu  # noqa: F401 (registers the ops)

relu = torch.ops.xconv.relu


def draw(shape=(3, 5, 7, 6), dtype=torch.float32):
    """Values around zero, both zeros, infinities and NaN among them."""
    x = torch.randn(shape, dtype=dtype)
    x.flatten()[:5] = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan], dtype=dtype)
    return x.requires_grad_()


def same(mine, theirs):
    return torch.equal(mine.nan_to_num(123), theirs.nan_to_num(123))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_value_and_gradient_are_those_of_torch(dtype, layout):
    x = draw(dtype=dtype)
    strided = x.detach().to(memory_format=layout).requires_grad_()
    out = relu(strided)
    grad = torch.randn_like(x)
    assert same(out, x.relu()) and out.stride() == strided.relu().stride()
    assert same(torch.autograd.grad(out, strided, grad)[0], torch.autograd.grad(x.relu(), x, grad)[0])


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (33,), (2, 3, 4, 5, 6)])
def test_shapes(shape):
    x = torch.randn(shape, requires_grad=True)
    relu(x).sum().backward()
    assert torch.equal(x.grad, (x > 0).float())


def test_only_bits_are_held(saved_by):
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    held, _ = saved_by(lambda: relu(x))
    assert [tensor.nbytes for tensor in held] == [x.numel() // 8]
    assert saved_by(lambda: relu(x.detach()))[0] == []


def test_second_derivatives():
    x = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: relu(x * 3 + 1).square(), x)


# torch 2.14 and later make copies of arguments that are no leaves, and look at their gradients.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck():
    x = torch.randn(3, 4, 5, requires_grad=True)
    torch.library.opcheck(relu.default, (x,))
    words = torch.ops.xconv.pack_mask(x.detach() <= 0, [0, 1, 2])
    torch.library.opcheck(torch.ops.xconv.masked_relu.default, (x, words))
