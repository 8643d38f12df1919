"""Networks of the zoo that segment volumes, (N, 1, D, H, W) to (N, 3, D, H, W): MONAI's, and UNETR written anew."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 3


def segresnet() -> nn.Module:
    """SegResNet (arXiv 1810.11654): group norm, residual blocks, trilinear upsampling."""
    from monai.networks.nets import SegResNet

    return SegResNet(spatial_dims=3, init_filters=8, in_channels=1, out_channels=CLASSES)


def attention_unet() -> nn.Module:
    """Attention U-Net (arXiv 1804.03999): gates on the skip connections, batch norm."""
    from monai.networks.nets import AttentionUnet

    return AttentionUnet(3, 1, CLASSES, channels=(16, 32, 64), strides=(2, 2))


def vnet() -> nn.Module:
    """V-Net (arXiv 1606.04797) without its dropout, so that gradients can be compared."""
    from monai.networks.nets import VNet

    return _without_dropout(VNet(3, 1, CLASSES))


def _without_dropout(model: nn.Module) -> nn.Module:
    for name, child in model.named_children():
        setattr(model, name, nn.Identity() if isinstance(child, nn.Dropout3d) else _without_dropout(child))
    return model


def highresnet() -> nn.Module:
    """HighResNet (arXiv 1707.01992): full resolution throughout, dilated; its blocks in stages of one dilation."""
    from monai.networks.nets import HighResNet

    layers = [{"name": "conv_0", "n_features": 8, "kernel_size": 3}]
    layers += [{"name": f"res_{at}", "n_features": 8 * at, "kernels": (3, 3), "repeat": 2} for at in (1, 2, 3)]
    layers += [{"name": "conv_1", "n_features": 32, "kernel_size": 1}, {"name": "conv_2", "kernel_size": 1}]
    model = HighResNet(3, 1, CLASSES, layer_params=layers)
    blocks = list(model.blocks)
    groups = (blocks[:1], blocks[1:3], blocks[3:5], blocks[5:7], blocks[7:])
    model.blocks = nn.Sequential(*(nn.Sequential(*group) for group in groups))
    return model


class TokenBlock(nn.Module):
    """A transformer's block on tokens (N, L, C): layer norms first, attention in four heads, GELU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(channels), nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        wide, narrow = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        self.mlp = nn.Sequential(nn.LayerNorm(channels), wide, nn.GELU(), narrow)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(tokens)).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        tokens = tokens + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return tokens + self.mlp(tokens)


def _unit(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(inputs, outputs, 3, padding=1), nn.InstanceNorm3d(outputs), nn.LeakyReLU(0.01))


def _enlarging(inputs: int, outputs: int, times: int) -> nn.Sequential:
    """Twice the size, so many times."""
    grow = [nn.ConvTranspose3d(inputs if at == 0 else outputs, outputs, 2, 2) for at in range(times)]
    return nn.Sequential(*grow, _unit(outputs, outputs))


class UNETR(nn.Module):
    """UNETR (arXiv 2103.10504): a transformer on patches of 8 voxels a side, and a convolutional decoder.

    `side` is the inputs'. MONAI's own needs einops.
    """

    def __init__(self, side: int, channels: int = 96, width: int = 8) -> None:
        super().__init__()
        self.grid = side // 8
        self.patches = nn.Conv3d(1, channels, 8, 8)
        self.places = nn.Parameter(torch.randn(1, self.grid**3, channels) / 50)
        self.tokens = nn.ModuleList(nn.Sequential(TokenBlock(channels), TokenBlock(channels)) for _ in range(3))
        self.whole = _unit(1, width)
        self.skips = nn.ModuleList((_enlarging(channels, 2 * width, 2), _enlarging(channels, 4 * width, 1)))
        widths = (width, 2 * width, 4 * width, channels)
        self.grow = nn.ModuleList(nn.ConvTranspose3d(widths[at + 1], widths[at], 2, 2) for at in range(3))
        self.decode = nn.ModuleList(
            nn.Sequential(_unit(2 * widths[at], widths[at]), _unit(widths[at], widths[at])) for at in range(3)
        )
        self.last = nn.Conv3d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        skips = [self.whole(x)]
        for place, blocks in enumerate(self.tokens):
            tokens = blocks(tokens)
            volume = tokens.transpose(1, 2).unflatten(2, (self.grid,) * 3)
            skips.append(self.skips[place](volume) if place < 2 else volume)
        out = skips.pop()
        for place in reversed(range(3)):
            out = self.decode[place](torch.cat((skips.pop(), self.grow[place](out)), 1))
        return self.last(out)


def unetr() -> nn.Module:
    return UNETR(side=48)
