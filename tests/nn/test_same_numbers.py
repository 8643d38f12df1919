"""Drop-in layers and the compiler hold the same sketches: one seed, one set of weight gradients.

A drop-in layer draws a seed in every forward. The compiled step draws those of all its sketches at once, in the order
of the forward: after the same `torch.manual_seed` they are the same seeds.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import xconv_fx

# Raised by torch 2.13 itself, while it imports Inductor.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


PROBES = {"2": 40, "4": 30}


def weight_gradients(model, x):
    model(x)  # whatever compiling draws is not part of the comparison
    torch.manual_seed(11)
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    return torch.autograd.grad(model(x).square().mean(), weights)


@pytest.mark.parametrize("kind", ["fold", "gaussian"])
def test_one_seed_gives_one_gradient(kind):
    torch._dynamo.reset()
    stages = [layer for _ in range(2) for layer in (nn.ReLU(), nn.Conv2d(8, 8, 3))]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *stages)
    # In the layout of compiled code: folds sum values in the order in which they lie in memory.
    model, x = model.to(memory_format=torch.channels_last), torch.randn(4, 3, 16, 16)
    x = x.to(memory_format=torch.channels_last)
    exact = weight_gradients(model, x)
    eager, _ = xconv_fx.convert(model, probes=PROBES, kind=kind)
    ours = weight_gradients(eager, x)

    options = {"probes": PROBES, "codecs": f"probe:{kind}"}
    compiled = torch.compile(copy.deepcopy(model), backend="xconv", options=options)
    theirs = weight_gradients(compiled, x)
    torch._dynamo.reset()

    torch.testing.assert_close(ours[0], exact[0])
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-5)
    for sketched, true in zip(ours[1:], exact[1:], strict=True):
        assert (sketched - true).norm() > 0.1 * true.norm()
