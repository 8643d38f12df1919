"""Which layers noise can reach: not only those whose input is a residual."""

from __future__ import annotations

import pytest
import torch
from helpers.tracing import trace
from torch import nn

from xconv_fx.codec_spec import CodecSpec
from xconv_fx.options import Options
from xconv_fx.passes.residuals import find_residuals
from xconv_fx.passes.trained_layers import TrainedLayers
from xconv_fx.planner.dependencies import link
from xconv_fx.planner.problem import build_problem
from xconv_fx.planner.sensitivities import Sensitivities
from xconv_fx.planner.solve import describe

X = torch.randn(4, 3, 16, 16)


def normed(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(8, 4, 1))


def layers_of(model: nn.Module) -> TrainedLayers:
    pair = trace(model, X).pair()
    return TrainedLayers.of(pair, find_residuals(pair))


@pytest.mark.parametrize(
    ("norm", "scales"),
    [
        (nn.BatchNorm2d(8), {"convolution": ("1",)}),
        (nn.BatchNorm2d(8, affine=False), {}),
        (nn.GroupNorm(2, 8), {"convolution": ("1",)}),
        (nn.GroupNorm(2, 8, affine=False), {}),
        (nn.Identity(), {}),
    ],
)
def test_the_first_layer_and_scales_of_normalisations_count(norm, scales):
    found = layers_of(normed(norm))
    assert dict(found.weights) == {"0": 1, "3": 1}
    assert dict(found.scales) == scales


def test_frozen_layers_have_no_gradient():
    model = normed(nn.BatchNorm2d(8))
    model[3].requires_grad_(False)
    assert dict(layers_of(model).weights) == {"0": 1}


def test_a_normalisations_codes_are_noise_of_its_scale_and_of_the_layer_before():
    """A stem in front of a batch norm: its input is the network's, and no residual."""
    pair = trace(normed(nn.BatchNorm2d(8)), X).pair()
    residuals = find_residuals(pair)
    noises = Sensitivities(residuals, None, pair)
    residual = residuals["convolution"]
    added = noises.coded(residual, CodecSpec("quantize", bits=2))
    relative = dict(noises.relative(added))
    assert relative["1"] == pytest.approx(added.noise), "the scale's own gradient is a sum over what is in codes"
    assert relative["0"] == pytest.approx(0.05 * added.noise), "what travels reaches the convolution"
    assert "3" not in relative, "not what runs later"
    assert added.total == pytest.approx(sum(noise for _, noise in added.layers)) and added.total > 0


class Scale(nn.Module):
    """A parameter that is none of a layer's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


class Product(nn.Module):
    """The gradient of what a part makes is multiplied by another value, which is saved."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(self.part(x), 3, 1) * nn.functional.avg_pool2d(x.detach().abs(), 3, 1)


@pytest.mark.parametrize(
    ("part", "asked"),
    [(Scale(), False), (nn.InstanceNorm2d(3, affine=True), False), (nn.PReLU(), False), (nn.Identity(), True)],
    ids=["a parameter", "scales", "slopes", "the input"],
)
def test_noise_that_reaches_no_layers_weights_counts(part, asked):
    pair = trace(Product(part), X.clone().requires_grad_(asked)).pair()
    residuals = find_residuals(pair)
    noises = Sensitivities(residuals, None, pair)
    residual = next(r for r in residuals.values() if r.uses == {"other"})
    added = noises.coded(residual, CodecSpec("quantize", bits=2))
    assert added.noise > 0 and added.total == pytest.approx(added.noise)
    assert dict(noises.relative(added)) == {"other gradients": pytest.approx(added.noise)}


def test_plans_tell_each_layers_noise_without_statistics():
    pair = trace(normed(nn.BatchNorm2d(8)), X).pair()
    planning = link(build_problem(pair, find_residuals(pair), Options.parse({"codecs": "quantize:2,bitmask"})))
    coded = tuple(len(row) - 1 for row in planning.candidates)
    plan = describe(planning, coded, None, 0, 0.0)
    assert dict(plan.layers).keys() == {"0", "1", "3"} and not plan.measured
    assert plan.noisiest == max(plan.layers, key=lambda row: row[1]) and plan.noisiest[0] == "1"
    assert describe(planning, tuple(0 for _ in coded), None, 0, 0.0).noisiest == ("", 0.0)
    for layer, noise in plan.layers:
        taken = [row[place].option for row, place in zip(planning.candidates, coded, strict=True)]
        limited = sum(dict(option.layers).get(layer, 0.0) for option in taken)
        assert limited == pytest.approx(noise), "what the solver limits is what the plan tells"
