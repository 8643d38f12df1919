"""The zoo: networks that nobody tuned xconv for, and how each is checkpointed.

`ZOO` is what `benchmarks/zoo.py` trains: classifiers (zoo_classifiers.py), networks with outputs as large as their
inputs (zoo_dense.py), networks of volumes (zoo_volumes.py), and the six that peers.py compares methods on.

    python benchmarks/zoo_nets.py       # builds and checkpoints all of them without memory, and says what they are
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import zoo_classifiers as classifiers
import zoo_dense as dense
import zoo_volumes as volumes
from nets import PEER_NETS, PeerNet, plain_unet3d
from peers_methods import checkpoint_blocks
from torch import Tensor, nn


@dataclass(frozen=True)
class ZooNet(PeerNet):
    """A network with its blocks, and with what nested checkpointing wraps: a pattern a depth, the innermost first.

    With `classes` of 0 it is trained by the mean squared distance from a target of its input's shape.
    """

    nested: tuple[str, ...]

    def batch(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Inputs, and class indices or values."""
        if self.classes:
            return super().batch(seed, dtype)
        generator = torch.Generator().manual_seed(seed)
        both = torch.randn((2, *self.input_shape), generator=generator, dtype=torch.float64).to(dtype)
        return both[0].clone(), both[1].clone()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean cross entropy, or mean squared error."""
        return super().loss(output, target) if self.classes else F.mse_loss(output, target)


def _classifier(build: Callable[[], nn.Module], *shape: int) -> ZooNet:
    """Of zoo_classifiers.py, where all have a stem, stages and a head."""
    block, stage = r"stages\.\d+\.\d+", r"stages\.\d+"
    parts = (build, shape, classifiers.CLASSES, False)
    return ZooNet(build.__name__, *parts, blocks=f"stem|{block}", nested=(block, f"stem|{stage}"))


def _values(name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], blocks: str, *nested: str) -> ZooNet:
    """Trained towards values of the input's shape."""
    return ZooNet(name, build, shape, 0, True, blocks, nested)


def _dense(name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], blocks: str, *nested: str) -> ZooNet:
    """Trained towards one of three classes at every place."""
    return ZooNet(name, build, shape, volumes.CLASSES, True, blocks, nested)


def _peer(name: str, *nested: str) -> ZooNet:
    net = PEER_NETS[name]
    return ZooNet(net.name, net.build, net.input_shape, net.classes, net.dense, net.blocks, nested)


NNUNET = r"(en|de)coder\.stages\.\d+"
NNUNET_NESTED = (rf"{NNUNET}(\.0)?\.convs\.\d+", NNUNET)
DIFFUSION_LEVEL = r"down\.\d+|middle|up\.\d+"
ATTENTION_UNET = r"model\.0|model\.1(\.submodule\.1)?\.(upconv|merge)|model\.1\.submodule\.(0|1\.submodule)"
VNET = r"(down|up)_tr\d+|(in|out)_tr"
RRDB_BLOCK = r"body\.\d+\.dense\.\d+"
HIGHRESNET = r"blocks\.\d+\.\d+"
LSTM_CELL = r"layers\.\d+\.cell"
MONAI_UNET = PEER_NETS["unet3d"].blocks

ZOO: dict[str, ZooNet] = {
    net.name: net
    for net in (
        _values("rrdb", dense.RRDB, (1, 3, 128, 128), RRDB_BLOCK, RRDB_BLOCK, r"body\.\d+"),
        _dense(
            "segresnet", volumes.segresnet, (1, 1, 80, 80, 80), r"(down|up)_layers\.\d+\.\d+|conv_final",
            r"(down|up)_layers\.\d+\.\d+", r"(down|up)_layers\.\d+|conv_final",
        ),
        _classifier(classifiers.resnet50, 8, 3, 192, 192),
        _values(
            "diffusion_unet", dense.DiffusionUNet, (4, 3, 64, 64),
            rf"({DIFFUSION_LEVEL})\.(blocks|attention)\.\d+|last",
            rf"({DIFFUSION_LEVEL})\.(blocks|attention)\.\d+", f"{DIFFUSION_LEVEL}|last",
        ),
        _dense("unet2d", dense.UNet2d, (2, 1, 256, 256), r"(down|up)\.\d+", r"(down|up)\.\d+\.\d+", r"(down|up)\.\d+"),
        _classifier(classifiers.densenet_bc, 8, 3, 64, 64),
        _dense("plain_unet3d_56", plain_unet3d, (1, 1, 56, 56, 56), NNUNET, *NNUNET_NESTED),
        _classifier(classifiers.resnet18, 1, 3, 512, 512),
        _classifier(classifiers.efficientnet, 16, 3, 96, 96),
        _dense(
            "attention_unet", volumes.attention_unet, (1, 1, 48, 48, 48), rf"{ATTENTION_UNET}|model\.2",
            ATTENTION_UNET, r"model\.1\.submodule|model\.2",
        ),
        _values(
            "wave_unet", dense.WaveUNet, (4, 1, 16384), r"first|level(\.inner)*\.(down|up)",
            r"level(\.inner)*\.(down|up)", r"level(\.inner){3}", r"level\.inner",
        ),
        _dense("vnet", volumes.vnet, (1, 1, 32, 32, 32), VNET, r"(down|up)_tr\d+\.ops\.\d+", VNET),
        _dense("highresnet", volumes.highresnet, (1, 1, 32, 32, 32), HIGHRESNET, HIGHRESNET, r"blocks\.\d+"),
        _dense(
            "unetr", volumes.unetr, (1, 1, 48, 48, 48), r"tokens\.\d+\.\d+|skips\.\d+|decode\.\d+|whole",
            r"tokens\.\d+\.\d+|skips\.\d+\.\d+|decode\.\d+\.\d+", r"tokens\.\d+|skips\.\d+|decode\.\d+|whole",
        ),
        _classifier(classifiers.densenet121, 4, 3, 128, 128),
        _classifier(classifiers.mobilenet_v3, 16, 3, 128, 128),
        _values("conv_lstm", dense.ConvLSTM, (2, 8, 3, 48, 48), LSTM_CELL, LSTM_CELL, r"layers\.\d+"),
        _peer("resnet", PEER_NETS["resnet"].blocks, r"model\.resnet\.encoder\.stages\.\d+"),
        _peer("vgg", r"[012]\.[024]", PEER_NETS["vgg"].blocks),
        _peer("plain_unet2d", *NNUNET_NESTED),
        _peer("plain_unet3d", *NNUNET_NESTED),
        _peer("unet3d", MONAI_UNET, r"model\.1\.submodule"),
        _peer("convnext", PEER_NETS["convnext"].blocks, r"model\.convnext\.encoder\.stages\.\d+"),
    )
}  # fmt: skip


def checkpoint_nested(model: nn.Module, patterns: tuple[str, ...]) -> None:
    """Wrap what matches, from the innermost pattern to the outermost."""
    for pattern in patterns:
        checkpoint_blocks(model, pattern)


def matching(model: nn.Module, pattern: str) -> int:
    """How many modules of the model the pattern names."""
    return sum(re.fullmatch(pattern, name) is not None for name, _ in model.named_modules())


def described(net: ZooNet) -> tuple[Any, ...]:
    """Name, input, parameters in MB, blocks, and modules of each depth of nesting; found on torch's meta device.

    Raises `ValueError` if a pattern names nothing, or if the output does not fit the loss.
    """
    with torch.device("meta"):
        model, inputs = net.build(), torch.empty(net.input_shape)
    counts = [matching(model, pattern) for pattern in (net.blocks, *net.nested)]
    if not all(counts):
        raise ValueError(f"{net.name}: of its patterns one names no module: {counts}")
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    checkpoint_nested(model, net.nested)
    shape = tuple(model(inputs).shape)
    expected = (net.input_shape[0], net.classes, *(net.input_shape[2:] if net.dense else ()))
    if shape != (expected if net.classes else net.input_shape):
        raise ValueError(f"{net.name}: an output of {shape}")
    return net.name, "x".join(map(str, net.input_shape)), f"{size:.2f}", *(str(counts[:1]), str(counts[1:]))


if __name__ == "__main__":
    for each in ZOO.values():
        print(*described(each))
