"""Replicate padding beside PyTorch's own, by itself and in compiled networks, where Inductor alone fails."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from xconv_fx.passes.replicate_padding import replicate_pad

PADS = [(1, 2), (0, 3), (0, 0), (2, 0, 1, 1), (0, 0, 0, 0), (0, 1, 0, 1), (1, 0, 2, 3, 0, 1)]


@pytest.mark.parametrize("pad", PADS)
def test_is_the_same_with_its_gradient(pad: tuple[int, ...]) -> None:
    dims = len(pad) // 2
    x = torch.randn(2, 3, *(4, 5, 6)[:dims], dtype=torch.float64, requires_grad=True)
    wanted, found = F.pad(x, pad, mode="replicate"), replicate_pad(x, pad)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert found is not x
    direction = torch.randn_like(wanted)
    for mine, theirs in zip(
        torch.autograd.grad(found, x, direction), torch.autograd.grad(wanted, x, direction), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


class Padded(nn.Module):
    """An image that a convolution made is padded, in two spellings, once by nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)
        self.pad = nn.ReplicationPad2d((1, 0, 0, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pad(self.first(x).relu())
        return self.last(F.pad(F.pad(x, [0, 0, 0, 0], "replicate"), (0, 1, 0, 1), mode="replicate"))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("options", [{}, {"mem_budget": "90%", "codecs": "exact"}, {"slices": 2}], ids=str)
def test_images_behind_a_convolution_are_padded(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    net, x = Padded(), torch.randn(4, 3, 16, 16)
    mine = copy.deepcopy(net)
    net(x).square().mean().backward()
    torch.compile(mine, backend="xconv", options=options)(x).square().mean().backward()
    for expected, found in zip(net.parameters(), mine.parameters(), strict=True):
        assert expected.grad is not None and found.grad is not None
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6)
