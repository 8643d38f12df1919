"""`gradient_check`: exact and noisy options of one small network, and what it leaves as it was."""

from __future__ import annotations

import copy
from io import StringIO

import pytest
import torch
from rich.console import Console
from torch import nn

import xconv_fx
from xconv_fx.errors import OptionError, UnsupportedModelError
from xconv_fx.noise.gradient_check import LayerError

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

X, Y = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 0])


def build() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def test_probes_are_noisy_as_predicted_and_unbiased():
    model = build()
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    stats = xconv_fx.calibrate(model, nn.functional.cross_entropy, [(X, Y)])
    options = {"mem_budget": "100%", "probes": {"3": 64}, "seed": 0, "stats": stats}
    found = xconv_fx.gradient_check(model, nn.functional.cross_entropy, (X, Y), options, draws=24)
    assert torch.equal(torch.get_rng_state(), generator) and model.training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())

    errors = {error.layer: error for error in found.layers}
    assert list(errors) == ["0", "1", "3", "7"] and found.biased == () and found.draws == 24
    assert errors["3"].variance > 0.01 and errors["3"].cosine < 0.999
    # The estimator has one noisy layer: input gradients do not read what is held as probes.
    assert max(errors[name].variance for name in ("0", "1", "7")) < 1e-9 < found.total.variance
    assert errors["7"].cosine == pytest.approx(1, abs=1e-6)
    share = (errors["3"].norm / found.total.norm) ** 2
    assert found.total.variance == pytest.approx(errors["3"].variance * share, rel=1e-3)


def test_the_table_marks_biases_beyond_chance():
    quiet, loud = LayerError("conv", 1.0, 0.1, 0.09, 0.2, 0.98), LayerError("block.norm", 1.0, 0.5, 0.09, 0.2, 0.9)
    assert not quiet.biased and loud.biased
    file = StringIO()
    check = xconv_fx.noise.gradient_check.GradientCheck((quiet, loud), quiet, 16)
    Console(file=file, width=80).print(check)
    assert "block.norm" in file.getvalue() and "more than by chance in block.norm, over 16 draws" in file.getvalue()


def test_mistakes_are_told_before_anything_is_compiled():
    with pytest.raises(OptionError, match="draws=1: write a number from 2"):
        xconv_fx.gradient_check(build(), nn.functional.cross_entropy, (X, Y), draws=1)
    with pytest.raises(UnsupportedModelError, match="its gradient is zero"):
        xconv_fx.gradient_check(build(), lambda out, _: 0 * out.sum(), (X, Y))
    with pytest.raises(UnsupportedModelError, match="not a pair"):
        xconv_fx.gradient_check(build(), nn.functional.cross_entropy, X)
