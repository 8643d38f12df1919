"""Drop-in layers and the compiler hold the same sketches: one seed, one weight gradient.

The compiled step draws one seed and tells its residuals apart by their number; a drop-in layer draws one in every
forward and counts as number one. So where a step has one sketch, `torch.manual_seed` makes both the same draw.
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


@pytest.mark.parametrize("kind", ["fold", "gaussian"])
def test_one_seed_gives_one_gradient(kind):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3))
    # In the layout of compiled code: folds sum values in the order in which they lie in memory.
    model, x = model.to(memory_format=torch.channels_last), torch.randn(4, 3, 16, 16)
    x = x.to(memory_format=torch.channels_last)
    exact = weight_gradients(model, x)
    eager, _ = xconv_fx.convert(model, probes={"2": 40}, kind=kind)
    ours = weight_gradients(eager, x)

    options = {"probes": {"2": 40}, "codecs": f"probe:{kind}"}
    compiled = torch.compile(copy.deepcopy(model), backend="xconv", options=options)
    theirs = weight_gradients(compiled, x)
    torch._dynamo.reset()

    torch.testing.assert_close(ours[0], exact[0])
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-5)
    assert (ours[1] - exact[1]).norm() > 0.1 * exact[1].norm()
