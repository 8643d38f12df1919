"""What is measured of a layer, against Jacobians by plain autograd and against the gradients of many draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from xconv_fx.codec_spec import CodecSpec
from xconv_fx.noise.expected import measured_noise
from xconv_fx.noise.layer import Measurement, Source, measure_normalisation, measure_weighted
from xconv_fx.noise.moments import Bilinear, deviation, sample_noise
from xconv_fx.ops import SavedAs, codec_of, fitting_probes

LAYERS = {
    "1d": (nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
    "2d": (nn.Conv2d(2, 3, 3, padding=1), (2, 2, 5, 4)),
    "strided, dilated": (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), dilation=2, padding=2), (2, 2, 6, 5)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "same": (nn.Conv2d(2, 3, 4, padding="same"), (1, 2, 5, 5)),
    "3d": (nn.Conv3d(2, 2, 2), (2, 2, 3, 4, 3)),
    "transposed": (nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 2, 4, 3)),
    "transposed, grouped": (nn.ConvTranspose1d(4, 2, 3, stride=2, groups=2), (2, 4, 5)),
    "linear": (nn.Linear(5, 3), (3, 5)),
    "linear, tokens": (nn.Linear(4, 3), (2, 6, 4)),
}


def weight_gradient(module: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(module(x), module.weight, dy, create_graph=True)[0]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kind", LAYERS)
def test_reach_is_the_squared_jacobian_of_the_weight_gradient(kind):
    module, size = LAYERS[kind]
    module = module.double()
    x = torch.randn(size, dtype=torch.float64)
    dy = torch.randn_like(module(x))
    layer = Bilinear.of(module, x, dy)
    torch.testing.assert_close(layer.gradient(x, dy), weight_gradient(module, x, dy).detach())
    jacobian = torch.autograd.functional.jacobian(lambda x: weight_gradient(module, x, dy).flatten(), x)
    torch.testing.assert_close(layer.reach(x, dy), jacobian.square().sum(0))
    single = [weight_gradient(module, x[n : n + 1], dy[n : n + 1]).square().sum() for n in range(len(x))]
    torch.testing.assert_close(layer.energies(x, dy), torch.stack(single).detach())
    # What dense projections of all samples need: the energy of dy with each element counted as often as it is read.
    weighted = (layer.terms(x) * dy.square()).flatten(1).sum(1)
    torch.testing.assert_close(weighted, layer.reach(x, dy).flatten(1).sum(1))


@pytest.fixture(scope="module")
def layer():
    """A convolution that reads what a rectifier leaves of smooth images; gradients arrive at some places, from some
    samples more than from others."""
    torch.manual_seed(0)
    smooth = nn.functional.interpolate(torch.randn(4, 8, 10, 10), scale_factor=2, mode="bilinear")
    x = (smooth + 0.3 * torch.randn_like(smooth)).relu()
    dy = torch.randn(4, 8, 20, 20) * x.mean(1, keepdim=True) * torch.tensor([0.2, 1.0, 0.5, 2.0]).view(-1, 1, 1, 1)
    module = nn.Conv2d(8, 8, 3, padding=1)
    measurement = Measurement(tuple(module.weight.shape))
    measurement.add_gradient(measure_weighted(measurement, module, x, dy + 0.1, rows=True))
    return module, x, dy + 0.1, measurement.statistics("conv")


LAST, FIRST = (0, 2, 3, 1), (0, 1, 2, 3)
FOLDED = {"codec": "probe", "kind": "fold", "order": LAST}
HELD = [
    *({"codec": "quantize", "bits": bits, "order": LAST} for bits in (8, 4, 2, 1)),
    {"codec": "quantize", "bits": 2, "order": FIRST},
    *({**FOLDED, "terms": terms} for terms in (5, 30)),
    *({**FOLDED, "terms": 12, "bits": bits} for bits in (4, 2, 1)),
    {**FOLDED, "terms": 12, "means": True},
    {**FOLDED, "terms": 12, "means": True, "bits": 2},
    {**FOLDED, "terms": 12, "order": FIRST},
    *({**FOLDED, "kind": kind, "probes": 24} for kind in ("gaussian", "rademacher", "orthogonal")),
    {**FOLDED, "kind": "gaussian", "probes": 24, "means": True, "bits": 4},
]


@pytest.mark.parametrize("way", HELD, ids=lambda way: " ".join(map(str, way.values())))
def test_predicted_variance_is_that_of_draws(layer, way):
    module, x, dy, known = layer
    way = dict(way)
    held = SavedAs(CodecSpec(way.pop("codec")), tuple(x.shape), x.dtype, way.pop("order"))
    if terms := way.pop("terms", None):
        held = held.varied(probes=fitting_probes(x.shape, held.order, math.prod(x.shape[1:]) // terms))
    held = held.varied(**way)
    exact, losses = weight_gradient(module, x, dy).detach(), []
    for seed in torch.randint(2**62, (24, 1)):
        estimate = codec_of(held.spec.codec).decode(codec_of(held.spec.codec).encode(x, seed, held), seed, held)
        losses.append(float((weight_gradient(module, estimate, dy).detach() - exact).square().sum()) / known.energy)
    measured, error = torch.tensor(losses).mean().item(), torch.tensor(losses).std().item() / len(losses) ** 0.5
    assert error < 0.15 * measured, "too few draws to tell"
    assert measured_noise(held, known) == pytest.approx(measured, abs=0.2 * measured + 2 * error)


def test_how_errors_spread_matters(layer):
    """The layer above is one for which the simplest predictor, of errors as large everywhere, is off."""
    known = layer[-1]
    assert known.flat < 0.85 * known.energy
    assert known.plain is not None and known.deviation is not None
    assert known.deviation.own < known.plain.own


def test_sgd_noise_is_the_variance_over_batches():
    """Told by the samples of each batch, as a mean over batches: what the gradients of many batches vary by."""
    module, samples, mean = nn.Linear(6, 4), 8, torch.randn(6)
    within, gradients = [], []
    for _ in range(400):
        x, dy = torch.randn(samples, 6) + mean, (torch.randn(samples, 4) + 0.5) / samples
        layer = Bilinear.of(module, x, dy)
        gradients.append(layer.gradient(x, dy))
        within.append(sample_noise(layer.energies(x, dy), gradients[-1]))
    variance = torch.stack(gradients).var(0).sum()
    assert sum(within) / len(within) == pytest.approx(float(variance), rel=0.1)


def test_deviations_are_from_the_means_of_channels():
    x = torch.randn(2, 3, 4, 5)
    without = deviation(x)
    assert without is not None and float(without.mean((2, 3)).abs().max()) < 1e-6
    assert deviation(torch.randn(2, 3)) is None


class OneDevice(TorchDispatchMode):
    """Lets no operation mix tensors of two devices, as a GPU does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        devices = {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()}
        assert len(devices) < 2, f"{function} of {devices}"
        return function(*args, **(kwargs or {}))


def test_everything_is_on_the_device_of_the_tensors(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: 1.0)
    x, dy = (torch.empty(4, 8, 8, 8, device="meta") for _ in range(2))
    conv, norm = nn.Conv2d(8, 8, 3, padding=1, device="meta"), nn.BatchNorm2d(8, device="meta")
    weighted, normalised = Measurement((8, 8, 3, 3)), Measurement((8,))
    with OneDevice():
        measure_weighted(weighted, conv, x, dy, True, [Source("norm", norm, x, signed=True)])
        measure_normalisation(normalised, norm, x, dy, lambda change: {"conv": change})
    assert weighted.runs and normalised.runs
