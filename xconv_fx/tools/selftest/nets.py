"""Six small networks that need nothing but torch, and two of the size that is trained.

Batch, instance, group, layer and no normalisation, depthwise, strided and transposed convolutions, volumes, pooling and
skip connections. Steps take milliseconds: what counts here is what is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Net:
    """A network and the shape of its input, batch included."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return self.name

    def build(self, device: str, dtype: torch.dtype = torch.float32, last: bool = False) -> tuple[nn.Module, Tensor]:
        """The network and an input, on a device, channels-last or not."""
        order: Any = torch.contiguous_format
        if last:
            order = torch.channels_last if len(self.shape) == 4 else torch.channels_last_3d
        model: Any = self.make().to(device=device, dtype=dtype)
        model.to(memory_format=order)
        return model, torch.randn(self.shape).to(device=device, dtype=dtype).to(memory_format=order)


class _Residual(nn.Module):
    """A residual block of convolutions, the first strided; `kernels` by `widths`, as in ResNet."""

    def __init__(self, before: int, widths: Sequence[int], kernels: Sequence[int], stride: int = 1) -> None:
        super().__init__()
        inner: list[nn.Module] = []
        channels = before
        # The stride of a bottleneck is that of its 3x3 convolution.
        strided = kernels.index(3)
        for place, (width, kernel) in enumerate(zip(widths, kernels, strict=True)):
            step = stride if place == strided else 1
            inner += [
                nn.Conv2d(channels, width, kernel, step, kernel // 2, bias=False), nn.BatchNorm2d(width), nn.ReLU()
            ]  # fmt: skip
            channels = width
        self.inner = nn.Sequential(*inner[:-1])
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != before:
            self.shortcut = nn.Sequential(nn.Conv2d(before, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.inner(x) + self.shortcut(x))


class _UNet(nn.Module):
    """One level down and up, with a skip connection, in 2D or 3D."""

    def __init__(self, dims: int, norm: Callable[[int], nn.Module], width: int) -> None:
        super().__init__()
        conv, transposed = ((nn.Conv2d, nn.ConvTranspose2d), (nn.Conv3d, nn.ConvTranspose3d))[dims - 2]

        def block(before: int, after: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(conv(before, after, 3, stride, 1), norm(after), nn.LeakyReLU(inplace=True))

        self.high, self.low = block(1, width), block(width, 2 * width, 2)
        self.up = transposed(2 * width, width, 2, 2)
        self.last = nn.Sequential(block(2 * width, width), conv(width, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        high = self.high(x)
        return self.last(torch.cat([high, self.up(self.low(high))], 1))


class _ConvNeXt(nn.Module):
    """A block of ConvNeXt: depthwise convolution, layer norm, and two linear layers over channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.inner = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(self.depthwise(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


def _resnet() -> nn.Module:
    blocks = [_Residual(16, (16, 16), (3, 3)), _Residual(16, (32, 32), (3, 3), 2)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), *blocks, nn.Conv2d(32, 5, 1))


def _vgg() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 16), (16, 32)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 5, 1))


def _convnext() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 4, 4), _ConvNeXt(16), _ConvNeXt(16), nn.Conv2d(16, 5, 1))


def _upscaler() -> nn.Module:
    inner = [layer for _ in range(3) for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.SiLU())]
    return nn.Sequential(nn.Conv2d(1, 16, 5, padding=2), nn.SiLU(), *inner, nn.Conv2d(16, 4, 3, padding=1),
                         nn.PixelShuffle(2))  # fmt: skip


NETS = (
    Net("resnet", _resnet, (8, 3, 32, 32)),
    Net("vgg", _vgg, (8, 3, 32, 32)),
    Net("unet2d", lambda: _UNet(2, lambda width: nn.InstanceNorm2d(width, affine=True), 8), (4, 1, 48, 48)),
    Net("unet3d", lambda: _UNet(3, lambda width: nn.GroupNorm(4, width), 8), (2, 1, 16, 16, 16)),
    Net("convnext", _convnext, (4, 3, 96, 96)),
    Net("upscaler", _upscaler, (4, 1, 32, 32)),
)


def resnet50() -> nn.Module:
    """ResNet-50 (He et al., arXiv 1512.03385), with its 25.6 million parameters."""
    stem = (nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    layers: list[nn.Module] = [*stem]
    before = 64
    for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for number in range(count):
            stride = 2 if number == 0 and width > 64 else 1
            layers.append(_Residual(before, (width, width, 4 * width), (1, 3, 1), stride))
            before = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 1000))


# What a board of 8 GB trains.
LARGE = (
    Net("resnet50", resnet50, (32, 3, 224, 224)),
    Net("unet3d-large", lambda: _UNet(3, lambda width: nn.InstanceNorm3d(width, affine=True), 32), (2, 1, 96, 96, 96)),
)
