"""Small networks for generated CUDA code: a convolution's every kind of neighbour, in 2D, 3D and with 128 channels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Net:
    """A network and the shape of its input."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


def _block(into: int, out: int, norm: type[nn.Module] | None, dim: int) -> list[nn.Module]:
    conv = (nn.Conv2d, nn.Conv3d)[dim - 2](into, out, 3, padding=1, bias=norm is None)
    return [conv, *([norm(out, affine=True)] if norm is not None else []), nn.ReLU() if dim == 2 else nn.LeakyReLU()]


def _net(norm: type[nn.Module] | None, channels: int, depth: int = 2, dim: int = 2) -> nn.Sequential:
    into = 3 if dim == 2 else 1
    pool, head = ((nn.MaxPool2d, nn.Conv2d), (nn.MaxPool3d, nn.Conv3d))[dim - 2]
    body = [layer for _ in range(depth) for layer in _block(channels, channels, norm, dim)]
    return nn.Sequential(*_block(into, channels, norm, dim), *body, pool(2), head(channels, 4, 1))


def _dropping(channels: int = 16) -> nn.Sequential:
    layers = [*_block(3, channels, None, 2), nn.Dropout(0.25), *_block(channels, channels, None, 2), nn.Dropout(0.25)]
    return nn.Sequential(*layers, *_block(channels, channels, None, 2), nn.Conv2d(channels, 4, 1))


def _depthwise(channels: int = 32) -> nn.Sequential:
    deep = [nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.ReLU(), nn.Conv2d(channels, channels, 1)]
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), *deep, nn.ReLU(), *deep[:1], nn.ReLU())


NETS = {
    "2d": Net(lambda: _net(nn.BatchNorm2d, 16), (8, 3, 32, 32)),
    "2d-small": Net(lambda: _net(nn.BatchNorm2d, 16, 1), (2, 3, 16, 16)),
    "2d-instance": Net(lambda: _net(nn.InstanceNorm2d, 16), (8, 3, 32, 32)),
    "2d-plain": Net(lambda: _net(None, 16), (8, 3, 32, 32)),
    "2d-dropout": Net(_dropping, (8, 3, 32, 32)),
    "2d-depthwise": Net(_depthwise, (4, 3, 32, 32)),
    "128": Net(lambda: _net(nn.BatchNorm2d, 128), (4, 3, 16, 16)),
    "3d": Net(lambda: _net(nn.InstanceNorm3d, 8, dim=3), (2, 1, 16, 16, 16)),
    "3d-batch": Net(lambda: _net(nn.BatchNorm3d, 8, dim=3), (2, 1, 16, 16, 16)),
}
