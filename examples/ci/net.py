"""A small U-Net whose training memory is under version control: `xconv check` compares it with xconv.lock."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class UNet(nn.Module):
    """Two levels with one skip connection. Input (N, 3, H, W), output (N, classes, H, W)."""

    def __init__(self, width: int = 16, classes: int = 2) -> None:
        super().__init__()
        self.encoder = block(3, width)
        self.pool = nn.MaxPool2d(2)
        self.middle = block(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.decoder = block(2 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.encoder(x)
        x = self.up(self.middle(self.pool(skip)))
        return self.head(self.decoder(torch.cat((skip, x), dim=1)))


def block(inputs: int, outputs: int) -> nn.Sequential:
    """A convolution with normalisation and activation; keeps the image's size."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )
