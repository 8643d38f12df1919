"""Small networks for end-to-end tests: steps of milliseconds and few layers, so that compiling them stays short.

`zoo` packs the variants of convolution that a rewrite can get wrong into one network; the others are miniatures of
those in benchmarks/nets.py. `OPTIONAL` need packages that are not test dependencies; `build` skips the test without
them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Net:
    """A network and the shape of its input, batch included. `package` is what building it imports besides torch."""

    name: str
    make: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    package: str | None = None

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The network with initial weights drawn from `seed`; skips the test if its package is missing."""
        if self.package is not None:
            pytest.importorskip(self.package)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make().to(dtype)

    def inputs(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers of `input_shape`; the same ones in every dtype up to rounding."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.input_shape, generator=generator, dtype=torch.float64).to(dtype)


def loss(output: Tensor) -> Tensor:
    """A scalar to differentiate whose gradient depends on the output in every element."""
    return output.square().mean()


def gradients(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """The gradient of `loss` for every parameter, by name; `model` may be compiled. Leaves gradients None."""
    model.zero_grad(set_to_none=True)
    loss(model(inputs)).backward()
    parameters = {name.removeprefix("_orig_mod."): parameter for name, parameter in model.named_parameters()}
    found = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


class Zoo(nn.Module):
    """Strides, dilation, groups, even and pointwise kernels, both paddings, transposed, with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding="same"),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, dilation=2, padding=0),
            nn.LeakyReLU(0.1),
            nn.Conv2d(8, 8, 3, padding=1, groups=4),
            nn.SiLU(),
            nn.Conv2d(8, 8, 2),
            nn.InstanceNorm2d(8, affine=True),
            nn.Sigmoid(),
            nn.Conv2d(8, 12, 1),
            nn.GroupNorm(3, 12),
            nn.ReLU(),
            nn.ConvTranspose2d(12, 6, 2, stride=2),
            nn.MaxPool2d(2),
        )
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Residual(nn.Module):
    """Two basic blocks with batch norm, the second strided, as in transformers' ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in (8, 8, 16, 16))
        self.convs = nn.ModuleList(
            [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)]
        )
        self.shortcut = nn.Conv2d(8, 16, 1, stride=2, bias=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norms[0](self.stem(x)))
        x = F.relu(x + self.norms[1](self.convs[0](x)))
        x = F.relu(self.norms[2](self.convs[1](x)) + self.norms[3](self.shortcut(x)))
        return self.head(x.mean((2, 3)))


def vgg() -> nn.Module:
    """Convolutions, in-place ReLU and pooling; no normalisation."""
    layers: list[nn.Module] = []
    for before, after in ((3, 8), (8, 16)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


class UNet(nn.Module):
    """One level of a U-Net with instance norm and in-place LeakyReLU, as nnU-Net builds them, in 2D or 3D."""

    def __init__(self, dimensions: int, width: int = 8) -> None:
        super().__init__()
        conv = nn.Conv2d if dimensions == 2 else nn.Conv3d
        transposed = nn.ConvTranspose2d if dimensions == 2 else nn.ConvTranspose3d
        norm = nn.InstanceNorm2d if dimensions == 2 else nn.InstanceNorm3d

        def block(before: int, after: int, stride: int = 1) -> nn.Sequential:
            convolution = conv(before, after, 3, stride=stride, padding=1)
            return nn.Sequential(convolution, norm(after, affine=True), nn.LeakyReLU(inplace=True))

        self.high = block(1, width)
        self.low = block(width, 2 * width, stride=2)
        self.up = transposed(2 * width, width, 2, stride=2)
        self.merge = block(2 * width, width)
        self.head = conv(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.high(x)
        return self.head(self.merge(torch.cat((skip, self.up(self.low(skip))), dim=1)))


def _transformers_resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetModel

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
            self.model = ResNetModel(config)

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x).pooler_output

    return Pooled()


def _plain_unet() -> nn.Module:
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    options = {"norm_op_kwargs": {"affine": True}, "nonlin": nn.LeakyReLU, "nonlin_kwargs": {"inplace": True}}
    return PlainConvUNet(
        1, 2, (8, 16), nn.Conv2d, 3, (1, 2), 1, 3, 1, conv_bias=True, norm_op=nn.InstanceNorm2d, **options
    )


def _monai_unet() -> nn.Module:
    from monai.networks.nets import UNet as MonaiUNet

    return MonaiUNet(3, in_channels=1, out_channels=2, channels=(4, 8), strides=(2,), num_res_units=1)


NETS: dict[str, Net] = {
    net.name: net
    for net in (
        Net("zoo", Zoo, (4, 3, 24, 24)),
        Net("vgg", vgg, (4, 3, 32, 32)),
        Net("resnet", Residual, (4, 3, 32, 32)),
        Net("unet2d", lambda: UNet(2), (2, 1, 32, 32)),
        Net("unet3d", lambda: UNet(3, width=4), (1, 1, 16, 16, 16)),
    )
}
OPTIONAL: dict[str, Net] = {
    net.name: net
    for net in (
        Net("transformers_resnet", _transformers_resnet, (2, 3, 64, 64), package="transformers"),
        Net("plain_unet", _plain_unet, (2, 1, 32, 32), package="dynamic_network_architectures"),
        Net("monai_unet", _monai_unet, (1, 1, 16, 16, 16), package="monai"),
    )
}
