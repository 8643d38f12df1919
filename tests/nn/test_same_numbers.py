"""Drop-in layers and the compiler hold the same sketches: one seed, one set of weight gradients.

A drop-in layer draws a seed in every forward. The compiled step draws those of all its layers at once, in the order
of the forward: after the same `torch.manual_seed` they are the same seeds. Layers that read one tensor share a sketch
in both, of the seed of the first.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import xconv_fx

# Raised by torch 2.13 itself, while it imports Inductor.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


def weight_gradients(model, x):
    model(x)  # whatever compiling draws is not part of the comparison
    torch.manual_seed(11)
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    return torch.autograd.grad(model(x).square().mean(), weights)


def check_same_gradients(model, probes, kind="fold"):
    """Of the converted and of the compiled model; layers without probes have exact ones, the others have not."""
    torch._dynamo.reset()
    # In the layout of compiled code: folds sum values in the order in which they lie in memory.
    model, x = model.to(memory_format=torch.channels_last), torch.randn(4, 3, 16, 16)
    x = x.to(memory_format=torch.channels_last)
    exact = weight_gradients(model, x)
    eager, _ = xconv_fx.convert(model, probes=probes, kind=kind)
    ours = weight_gradients(eager, x)

    compiled = torch.compile(
        copy.deepcopy(model), backend="xconv", options={"probes": probes, "codecs": f"probe:{kind}"}
    )
    theirs = weight_gradients(compiled, x)
    torch._dynamo.reset()

    names = [name.removesuffix(".weight") for name, parameter in model.named_parameters() if parameter.dim() > 1]
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-5)
    for name, sketched, true in zip(names, ours, exact, strict=True):
        far = (sketched - true).norm() > 0.1 * true.norm()
        assert far == (name in probes), name


@pytest.mark.parametrize("kind", ["fold", "gaussian"])
def test_one_seed_gives_one_gradient(kind):
    stages = [layer for _ in range(2) for layer in (nn.ReLU(), nn.Conv2d(8, 8, 3))]
    check_same_gradients(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *stages), {"2": 40, "4": 30}, kind)


class Residual(nn.Module):
    """A block whose shortcut has a layer, which runs last or first."""

    def __init__(self, late):
        super().__init__()
        self.late = late
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.relu, self.shortcut = nn.ReLU(), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        short = None if self.late else self.shortcut(x)
        out = self.conv2(self.relu(self.conv1(x)))
        return out + (self.shortcut(x) if short is None else short)


def test_layers_that_read_one_input():
    """Two blocks, and what comes behind has the seeds that it should."""
    stages = [nn.ReLU(), Residual(True), nn.ReLU(), Residual(False), nn.ReLU(), nn.Conv2d(8, 4, 3)]
    probes = {f"{block}.{name}": 40 for block in (2, 4) for name in ("conv1", "conv2", "shortcut")} | {"6": 30}
    check_same_gradients(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *stages), probes)


class Crossed(nn.Module):
    """Reads two values in another order than it makes them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        x = self.stem(x)
        one, other = x.relu(), x.neg().relu()
        out = self.second(other)
        return out + self.first(one)


def test_seeds_follow_the_order_of_layers():
    check_same_gradients(Crossed(), {"first": 40, "second": 30})
