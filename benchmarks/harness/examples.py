"""The networks and the data of examples/ that benchmarks train on."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import nn

sys.path.append(str(Path(__file__).parents[2] / "examples"))
from _data import packaged_file
from brain_unet3d import CLASSES as TISSUES
from brain_unet3d import Brain
from mnist_resnet import BATCH, DIGITS, Block, Digits, build

GROUPS = 8


def in_groups(model: nn.Module) -> nn.Module:
    """The network with group in the place of batch normalisation."""
    for name, child in model.named_children():
        norm = nn.GroupNorm(GROUPS, child.num_features) if isinstance(child, nn.BatchNorm2d) else child
        setattr(model, name, in_groups(norm))
    return model


# The network that reads digits, by its normalisation.
DIGIT_RESNETS = {"batch": build, "group": lambda: in_groups(build())}

__all__ = ["BATCH", "DIGITS", "DIGIT_RESNETS", "TISSUES", "Block", "Brain", "Digits", "packaged_file"]
