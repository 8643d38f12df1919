"""The networks that the benchmarks train: four of the main job, one whose graph breaks, and six that peers train.

Each is the published architecture from the package that users install it from, made narrow and shallow enough that a
training step takes a fraction of a second on two CPU cores. What is kept from the full size is what the planner has to
deal with: activations are at least ten times the parameters (`python benchmarks/nets.py` prints the ratio), and between
them the networks have batch, instance and no normalisation, in-place activations, 2D and 3D convolutions, pooling,
strided and transposed convolutions, and skip connections that live through half of the step.

`PEER_NETS` is what `benchmarks/peers.py` compares methods on: the same families at sizes where a step of plain Inductor
takes 100 to 300 MB and about a second on one core, nnU-Net's network also in 3D, and ConvNeXt, whose depthwise
convolutions, layer norms and GELUs no other network has.

The packages are installed with the extra `nets` and requirements/nets.txt; none is imported before its network is
built.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Net:
    """A network to train: `build()` makes it from the current random state, `input_shape` includes the batch."""

    name: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    classes: int
    dense: bool

    def batch(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Inputs of `input_shape` and their class indices: one a pixel for a dense network, else one a sample."""
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(self.input_shape, generator=generator, dtype=torch.float64).to(dtype)
        shape = (self.input_shape[0], *self.input_shape[2:]) if self.dense else self.input_shape[:1]
        return inputs, torch.randint(self.classes, shape, generator=generator)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean cross entropy."""
        return F.cross_entropy(output, target)


@dataclass(frozen=True)
class PeerNet(Net):
    """A network with its blocks: the modules that checkpointing recomputes as one, by a pattern of their full names."""

    blocks: str

    def tiny(self) -> PeerNet:
        """With the smallest batch that still trains: for checking that everything runs."""
        channels, space = self.input_shape[1], self.input_shape[2:]
        return replace(self, input_shape=(2, channels, *([64] if len(space) == 2 else [16]) * len(space)))


class Logits(nn.Module):
    """Unwraps the output object of a transformers model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels).logits


def resnet() -> nn.Module:
    """ResNet of basic blocks (arXiv 1512.03385) from transformers: batch norm, residual sums, strided convolutions."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=3, embedding_size=32, hidden_sizes=[32, 64, 128], depths=[2, 2, 2], layer_type="basic"
    )
    config.num_labels = 10
    return Logits(ResNetForImageClassification(config))


def vgg() -> nn.Module:
    """VGG (arXiv 1409.1556) without normalisation: nothing but convolutions, in-place ReLU and max pooling."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (32, 64, 128):
        for _ in range(3):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def plain_unet2d() -> nn.Module:
    """nnU-Net's PlainConvUNet (Nature Methods 18, 2021) in 2D: instance norm and in-place LeakyReLU."""
    return plain_unet(nn.Conv2d, nn.InstanceNorm2d, features=(16, 32, 64, 64), classes=4)


def plain_unet(
    conv: type[nn.Module], norm: type[nn.Module], features: tuple[int, ...], classes: int, channels: int = 1
) -> nn.Module:
    """PlainConvUNet as nnU-Net configures it: two convolutions a stage, each stage at half the size of the last.

    `channels` are the input's, `classes` the output's.
    """
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    return PlainConvUNet(
        input_channels=channels,
        n_stages=len(features),
        features_per_stage=features,
        conv_op=conv,
        kernel_sizes=3,
        strides=(1, *(2 for _ in features[1:])),
        n_conv_per_stage=2,
        num_classes=classes,
        n_conv_per_stage_decoder=2,
        conv_bias=True,
        norm_op=norm,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )


def unet3d() -> nn.Module:
    """MONAI's residual 3D U-Net (Kerfoot et al., STACOM 2018): instance norm, PReLU, transposed convolutions."""
    from monai.networks.nets import UNet

    return UNet(3, in_channels=1, out_channels=3, channels=(16, 32, 64), strides=(2, 2), num_res_units=2)


def basic_unet() -> nn.Module:
    """MONAI's BasicUNet (Falk et al., Nature Methods 16, 2019): its up-sampling block breaks the graph.

    In 3D, because its 2D form does not train under plain Inductor in torch 2.13, to compare with (a layout assertion in
    the backward of `replication_pad2d`); under a budget it does.
    """
    from monai.networks.nets import BasicUNet

    return BasicUNet(spatial_dims=3, in_channels=1, out_channels=2, features=(8, 8, 16, 16, 32, 8))


def vgg_stages() -> nn.Module:
    """`vgg`, grouped: its three stages and its head are the children, so that a stage can be checkpointed."""
    layers = list(cast(nn.Sequential, vgg()))
    bounds = [0, *(place + 1 for place, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)), len(layers)]
    return nn.Sequential(*(nn.Sequential(*layers[a:b]) for a, b in itertools.pairwise(bounds)))


def plain_unet3d() -> nn.Module:
    """nnU-Net's PlainConvUNet in 3D, at half its own first width."""
    return plain_unet(nn.Conv3d, nn.InstanceNorm3d, features=(16, 32, 64), classes=3)


def convnext() -> nn.Module:
    """ConvNeXt (arXiv 2201.03545) from transformers: depthwise 7x7 convolutions, layer norm, GELU, linear layers."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(num_channels=3, hidden_sizes=[32, 64, 128], depths=[2, 2, 2], num_stages=3)
    config.num_labels = 10
    return Logits(ConvNextForImageClassification(config))


MAIN_JOB: dict[str, Net] = {
    net.name: net
    for net in (
        Net("resnet", resnet, (16, 3, 128, 128), classes=10, dense=False),
        Net("vgg", vgg, (16, 3, 64, 64), classes=10, dense=False),
        Net("plain_unet2d", plain_unet2d, (8, 1, 128, 128), classes=4, dense=True),
        Net("unet3d", unet3d, (2, 1, 48, 48, 48), classes=3, dense=True),
    )
}
NETS: dict[str, Net] = {
    **MAIN_JOB,
    "basic_unet": Net("basic_unet", basic_unet, (1, 1, 32, 32, 32), classes=2, dense=True),
}
# Batches as these networks are trained: 8 to 16 images, two volumes (nnU-Net's default).
PEER_NETS: dict[str, PeerNet] = {
    net.name: net
    for net in (
        PeerNet("resnet", resnet, (16, 3, 192, 192), 10, False, r"model\.resnet\.encoder\.stages\.\d+\.layers\.\d+"),
        PeerNet("vgg", vgg_stages, (16, 3, 96, 96), 10, False, r"[012]"),
        PeerNet("plain_unet2d", plain_unet2d, (8, 1, 128, 128), 4, True, r"(en|de)coder\.stages\.\d+"),
        PeerNet("plain_unet3d", plain_unet3d, (2, 1, 40, 40, 40), 3, True, r"(en|de)coder\.stages\.\d+"),
        PeerNet("unet3d", unet3d, (2, 1, 64, 64, 64), 3, True, r"model(\.1\.submodule)?\.[02]|.*(\.1\.submodule){2}"),
        PeerNet("convnext", convnext, (8, 3, 192, 192), 10, False, r".*\.layers\.\d+"),
    )
}


def _describe(net: Net) -> tuple[str, ...]:
    """A row of the table: what the network is and how it trains under plain Inductor."""
    from xconv_fx.measure import interleaved_times, storage_bytes, training_peak

    torch.manual_seed(0)
    model = net.build()
    inputs, target = net.batch()
    compiled = cast(nn.Module, torch.compile(model))

    def loss(output: Tensor) -> Tensor:
        return net.loss(output, target)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss(compiled(inputs)).backward()

    start = time.perf_counter()
    step()
    compiling = time.perf_counter() - start
    peak = training_peak(compiled, inputs, loss, resident=[target])
    parameters = storage_bytes(model.parameters())
    seconds = interleaved_times({"step": step}, repeats=5, warmup=1)["step"]
    # What is allocated besides the gradients, which are as large as the parameters.
    ratio = (peak.transient - parameters) / parameters
    shape = "x".join(map(str, net.input_shape))
    columns = (f"{parameters / 1e6:.2f}", f"{peak.bytes / 1e6:.1f}", f"{ratio:.1f}", f"{seconds * 1e3:.0f}")
    return (net.name, shape, *columns, f"{compiling:.0f}")


if __name__ == "__main__":
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Plain Inductor, float32")
    table.add_column("network")
    for heading in ("input", "parameters (MB)", "peak (MB)", "activations / parameters", "step (ms)", "compile (s)"):
        table.add_column(heading, justify="right")
    for each in NETS.values():
        torch.compiler.reset()
        table.add_row(*_describe(each))
    Console().print(table)
