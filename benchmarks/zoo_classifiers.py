"""Classifiers of the zoo, written anew from their papers: ResNets, DenseNets and networks of inverted residuals.

Each is `stem`, `stages` and `head`; a stage is a sequence of blocks. Inputs are (N, 3, H, W), outputs (N, 10).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution that keeps the size but for its stride, and batch normalisation."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


def classifier(stem: Iterable[nn.Module], stages: Iterable[nn.Module], head: Iterable[nn.Module]) -> nn.Sequential:
    parts = {"stem": nn.Sequential(*stem), "stages": nn.Sequential(*stages), "head": nn.Sequential(*head)}
    return nn.Sequential(OrderedDict(parts))


def pooled_linear(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]


class Residual(nn.Module):
    """ReLU of a branch and what it goes around, which is projected where the shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int, branch: Iterable[nn.Module]) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)
        same = inputs == outputs and stride == 1
        self.around = nn.Identity() if same else nn.Sequential(*conv_norm(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.branch(x) + self.around(x))


def basic(inputs: int, width: int, stride: int) -> Residual:
    branch = [*conv_norm(inputs, width, 3, stride), nn.ReLU(inplace=True), *conv_norm(width, width, 3)]
    return Residual(inputs, width, stride, branch)


def bottleneck(inputs: int, width: int, stride: int) -> Residual:
    """Four times as wide outside as inside."""
    inner = [*conv_norm(inputs, width, 1), nn.ReLU(inplace=True), *conv_norm(width, width, 3, stride)]
    return Residual(inputs, 4 * width, stride, [*inner, nn.ReLU(inplace=True), *conv_norm(width, 4 * width, 1)])


def _resnet(block: Callable[[int, int, int], Residual], depths: tuple[int, ...], expansion: int) -> nn.Module:
    """ResNet (arXiv 1512.03385) of half its own width: 32 in the stem and the first stage."""
    stages, channels = [], 32
    for place, depth in enumerate(depths):
        width, blocks = 32 << place, []
        for at in range(depth):
            blocks.append(block(channels, width, 2 if at == 0 and place else 1))
            channels = expansion * width
        stages.append(nn.Sequential(*blocks))
    stem = [*conv_norm(3, 32, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    return classifier(stem, stages, pooled_linear(channels))


def resnet18() -> nn.Module:
    return _resnet(basic, (2, 2, 2, 2), expansion=1)


def resnet50() -> nn.Module:
    return _resnet(bottleneck, (3, 4, 6, 3), expansion=4)


class DenseLayer(nn.Module):
    """Appends `growth` channels to its input: BN-ReLU-1x1-BN-ReLU-3x3."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        squeeze = [nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), nn.Conv2d(inputs, 4 * growth, 1, bias=False)]
        grow = [nn.BatchNorm2d(4 * growth), nn.ReLU(inplace=True)]
        self.branch = nn.Sequential(*squeeze, *grow, nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.branch(x)), 1)


def _transition(inputs: int) -> nn.Sequential:
    """Half the channels at half the size."""
    conv = nn.Conv2d(inputs, inputs // 2, 1, bias=False)
    return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), conv, nn.AvgPool2d(2))


def _densenet(stem: list[nn.Module], channels: int, growth: int, depths: tuple[int, ...]) -> nn.Module:
    """DenseNet-BC (arXiv 1608.06993). The last module of each stage but the last is a transition."""
    stages = []
    for place, depth in enumerate(depths):
        blocks: list[nn.Module] = [DenseLayer(channels + growth * at, growth) for at in range(depth)]
        channels += growth * depth
        if place + 1 < len(depths):
            blocks.append(_transition(channels))
            channels //= 2
        stages.append(nn.Sequential(*blocks))
    return classifier(stem, stages, [nn.BatchNorm2d(channels), nn.ReLU(inplace=True), *pooled_linear(channels)])


def densenet_bc() -> nn.Module:
    """For small images: three stages of six layers."""
    return _densenet([nn.Conv2d(3, 24, 3, padding=1, bias=False)], 24, growth=12, depths=(6, 6, 6))


def densenet121() -> nn.Module:
    """As deep as DenseNet-121, three eighths as wide."""
    stem = [*conv_norm(3, 24, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    return _densenet(stem, 24, growth=12, depths=(6, 12, 24, 16))


class SqueezeExcite(nn.Module):
    """Scales channels by what their means say."""

    def __init__(self, channels: int, squeezed: int, act: type[nn.Module], gate: type[nn.Module]) -> None:
        super().__init__()
        squeeze, excite = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.scale = nn.Sequential(nn.AdaptiveAvgPool2d(1), squeeze, act(), excite, gate())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale(x)


@dataclass(frozen=True)
class Inverted:
    """A row of the papers' tables: channels between and after the convolutions, of the depthwise one kernel and stride.

    `excite` are the channels in the middle of squeeze and excitation, 0 without.
    """

    expanded: int
    outputs: int
    kernel: int
    stride: int
    act: type[nn.Module]
    gate: type[nn.Module] = nn.Sigmoid
    excite: int = 0


class InvertedResidual(nn.Module):
    """Expands, convolves channel by channel, scales, projects; added to the input where the shapes allow."""

    def __init__(self, inputs: int, row: Inverted) -> None:
        super().__init__()
        wide, narrow = row.expanded, row.outputs
        layers = [*conv_norm(inputs, wide, 1), row.act()] if wide != inputs else []
        layers += [*conv_norm(wide, wide, row.kernel, row.stride, wide), row.act()]
        layers += [SqueezeExcite(wide, row.excite, row.act, row.gate)] if row.excite else []
        self.branch = nn.Sequential(*layers, *conv_norm(wide, narrow, 1))
        self.added = inputs == narrow and row.stride == 1

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        return x + out if self.added else out


def _inverted(stages: list[list[Inverted]], channels: int, wide: int, act: type[nn.Module]) -> nn.Module:
    """Of stages of inverted residuals after a stem of `channels`; the head is `wide`."""
    stem, built = [*conv_norm(3, channels, 3, 2), act()], []
    for rows in stages:
        blocks = []
        for row in rows:
            blocks.append(InvertedResidual(channels, row))
            channels = row.outputs
        built.append(nn.Sequential(*blocks))
    return classifier(stem, built, [*conv_norm(channels, wide, 1), act(), *pooled_linear(wide)])


def efficientnet() -> nn.Module:
    """The first five stages of EfficientNet-B0 (arXiv 1905.11946): MobileNetV2's blocks, excitation, SiLU."""
    table = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5))
    stages, channels = [], 32
    for expansion, outputs, repeats, stride, kernel in table:
        rows = []
        for at in range(repeats):
            wide, excite = expansion * channels, max(1, channels // 4)
            rows.append(Inverted(wide, outputs, kernel, stride if at == 0 else 1, nn.SiLU, excite=excite))
            channels = outputs
        stages.append(rows)
    return _inverted(stages, 32, 320, nn.SiLU)


def mobilenet_v3() -> nn.Module:
    """MobileNetV3-small (arXiv 1905.02244): ReLU, then hard swish; hard sigmoids as gates."""
    table = (
        ((16, 16, 3, 2, True),),
        ((72, 24, 3, 2, False), (88, 24, 3, 1, False)),
        ((96, 40, 5, 2, True), (240, 40, 5, 1, True), (240, 40, 5, 1, True), (120, 48, 5, 1, True)),
        ((288, 96, 5, 2, True), (576, 96, 5, 1, True), (576, 96, 5, 1, True)),
    )
    stages = []
    for place, rows in enumerate(table):
        act = nn.ReLU if place < 2 else nn.Hardswish
        stages.append(
            [
                Inverted(wide, outputs, kernel, stride, act, nn.Hardsigmoid, wide // 4 if excite else 0)
                for wide, outputs, kernel, stride, excite in rows
            ]
        )
    return _inverted(stages, 16, 576, nn.Hardswish)
