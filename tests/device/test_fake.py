"""Models and tensors without memory."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from xconv_fx.device.fake import fake_module, fake_tensor
from xconv_fx.errors import UnsupportedModelError
from xconv_fx.hooks.fake import cudnn_layouts, fake_mode


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.first.bias.requires_grad_(False)
        self.register_buffer("scale", torch.ones(4))
        self.plain = torch.ones(3, dtype=torch.int64)


def test_a_fake_copy():
    model, mode = Tied(), fake_mode()
    fake = fake_module(model, mode, None)
    assert isinstance(fake, Tied)
    values = [*fake.parameters(), *fake.buffers(), fake.plain]
    assert all(isinstance(value, FakeTensor) and value.device.type == "cpu" for value in values)
    assert fake.second.weight is fake.first.weight and isinstance(fake.first.weight, nn.Parameter)
    assert fake.first.weight.requires_grad and not fake.first.bias.requires_grad
    assert (fake.plain.dtype, fake.plain.shape) == (torch.int64, (3,))
    assert not any(isinstance(value, FakeTensor) for value in model.state_dict().values())


def test_meta_tensors_come_to_the_cpu():
    mode = fake_mode()
    assert fake_tensor(torch.empty(2, 3, device="meta"), mode, None).device.type == "cpu"
    assert fake_module(nn.Linear(2, 2, device="meta"), mode, "cpu").weight.device.type == "cpu"


def test_layouts():
    mode = fake_mode()
    assert fake_tensor(torch.randn(3, 4).t(), mode, None).stride() == (1, 4)
    images = fake_module(nn.Conv2d(4, 8, 3), mode, None, channels_last=True).weight
    volumes = fake_tensor(torch.randn(1, 2, 3, 3, 3), mode, None, channels_last=True)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert volumes.is_contiguous(memory_format=torch.channels_last_3d)


def test_what_cannot_be_copied():
    with pytest.raises(UnsupportedModelError, match=r"sizes are not known yet.*LazyConv2d its sizes"):
        fake_module(nn.Sequential(nn.LazyConv2d(4, 3)), fake_mode(), None)
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()
    with pytest.raises(UnsupportedModelError, match="cannot be copied"):
        fake_module(model, fake_mode(), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rank", "order"), [(2, torch.channels_last), (3, torch.channels_last_3d)])
def test_convolutions_are_laid_out_as_by_cudnn(dtype, rank, order):
    """Channels-last if one operand is, whatever libraries of the CPU can do with the dtype."""
    convolution = torch.conv2d if rank == 2 else torch.conv3d
    with fake_mode(), cudnn_layouts():
        x, weight = torch.randn(2, 4, *[8] * rank, dtype=dtype), torch.randn(4, 4, *[3] * rank, dtype=dtype)
        assert convolution(x, weight).is_contiguous()
        assert convolution(x.to(memory_format=order), weight).is_contiguous(memory_format=order)
        assert convolution(x, weight.to(memory_format=order)).is_contiguous(memory_format=order)
