"""How the backward uses each residual, where residuals come from, and which are linear."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tracing import trace
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from xconv_fx.passes.provenance import layer_of
from xconv_fx.passes.residuals import find_residuals, is_linear, physical_order, small, uncompressible

aten = torch.ops.aten


def conv(before, after):
    return nn.Conv2d(before, after, 3, padding=1)


def residuals(*layers, shape=(2, 3, 16, 16)):
    """The residuals of a chain of layers that are not small, by layer."""
    found = find_residuals(trace(nn.Sequential(*layers), torch.randn(shape)).pair())
    total = sum(residual.bytes for residual in found.values())
    return {residual.layer: residual for residual in found.values() if not small(residual, total)}


def uses(*layers, shape=(2, 3, 16, 16)):
    return {layer: set(residual.uses) for layer, residual in residuals(*layers, shape=shape).items()}


def test_nothing_crosses_from_one_convolution():
    assert residuals(conv(3, 8)) == {}


def test_convolution_relu_convolution():
    found = residuals(conv(3, 8), nn.ReLU(), conv(8, 8))
    (relu,) = found.values()
    assert relu.uses == {"mask", "weight_grad"}
    assert [mask.target for mask in relu.masks] == [aten.le.Scalar]
    assert (relu.layer, relu.reader) == ("1", "2")
    assert (relu.shape, relu.bytes, relu.order) == ((2, 8, 16, 16), 16384, (0, 2, 3, 1))


def test_every_half_of_a_split_convolution_names_its_layer():
    found = residuals(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), nn.Conv2d(8, 8, 1))
    assert {layer: residual.reader for layer, residual in found.items()} == {"1": "2", "3": "4"}


def test_batch_norm_reads_its_input():
    found = uses(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8))
    assert found == {"0": {"norm"}, "2": {"mask", "weight_grad"}}


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)], ids=["group", "instance"])
def test_other_normalisations_are_linear_in_their_input(norm):
    assert uses(conv(3, 8), norm, conv(8, 8))["0"] <= {"norm", "other"}


def test_linear_layers():
    found = residuals(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8), shape=(64, 32))
    assert found["1"].uses == {"mask", "weight_grad"}
    assert (found["1"].reader, found["1"].order) == ("2", (0, 1))


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU(), nn.Softplus()], ids=["silu", "gelu", "softplus"])
def test_nonlinear_backwards_are_nonlinear(activation):
    found = uses(conv(3, 8), activation, conv(8, 8))
    assert "nonlinear" in found["0"]
    assert found["1"] == {"weight_grad"}


class Scaled(nn.Module):
    """Multiplies with a tensor of ones, which Inductor takes out in every version of torch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * torch.ones_like(x)).exp()


def test_what_an_operation_that_does_nothing_reads_stays_in_its_layer():
    net = nn.Sequential(conv(3, 8), Scaled(), conv(8, 8))
    (first, second) = (
        trace(net, torch.randn(2, 3, 16, 16))
        .joint()
        .graph.find_nodes(op="call_function", target=aten.convolution.default)
    )
    assert (layer_of(first), layer_of(second)) == ("0", "2")
    assert first.meta["seq_nr"] < second.meta["seq_nr"]
    assert first.meta["partitioner_tag"] == "is_forward"


def test_sigmoid_reads_its_output_nonlinearly():
    found = uses(conv(3, 8), nn.Sigmoid(), conv(8, 8))
    assert found["1"] >= {"nonlinear", "weight_grad"}


@pytest.mark.parametrize("layer", [nn.LeakyReLU(), nn.Dropout()], ids=["leaky relu", "dropout"])
def test_booleans_are_masks(layer):
    found = find_residuals(trace(nn.Sequential(conv(3, 8), layer, conv(8, 8)), torch.randn(2, 3, 16, 16)).pair())
    masks = [residual for residual in found.values() if residual.value.dtype == torch.bool]
    assert [residual.uses for residual in masks] == [{"mask"}]
    assert masks[0].bytes == 2 * 8 * 16 * 16
    assert [r.uses for r in found.values() if r not in masks] == [{"weight_grad"}]


def test_sources_are_lines_of_the_user():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = conv(3, 8), conv(8, 8)

        def forward(self, x):
            held = torch.relu(self.first(x))
            return self.second(held)

    (found,) = find_residuals(trace(Net(), torch.randn(2, 3, 16, 16)).pair()).values()
    path, line = found.source.rsplit(":", 1)
    assert Path(path) == Path(__file__)
    assert "held = " in Path(path).read_text().splitlines()[int(line) - 1]
    assert (found.layer, found.reader) == ("", "second")


def test_what_is_uncompressible_is_said():
    found = residuals(conv(3, 8), nn.SiLU(), conv(8, 8))
    (note,) = uncompressible({residual.name: residual for residual in found.values()})
    assert note.startswith("0: convolution is read nonlinearly")


def test_order_in_memory():
    x = torch.empty(2, 3, 4, 5)
    assert physical_order(x, channels_last=False) == (0, 1, 2, 3)
    assert physical_order(x, channels_last=True) == (0, 2, 3, 1)
    assert physical_order(torch.empty(2, 3, 4, 5, 6), channels_last=True) == (0, 1, 2, 3, 4)
    assert physical_order(x.permute(3, 0, 2, 1), channels_last=False) == (1, 3, 2, 0)


X, G = torch.randn(2, 32, 32)
LINEAR = {
    "product with a gradient": lambda x, g: g * x,
    "affine": lambda x, g: g * (2 * x - 1),
    "weight gradient": lambda x, g: g.t() @ x,
    "selected": lambda x, g: torch.where(g > 0, x, g),
    "divided": lambda x, g: x / g,
    "added product": lambda x, g: torch.addcmul(g, x, g, value=2),
    "what a product is added to": lambda x, g: torch.addcmul(x, g, g),
    "scaled by a mean": lambda x, g: g * (x - x.mean()) * (g * x).mean(),
    "unread": lambda x, g: (g, torch.exp(x))[0],
}
NONLINEAR = {
    "square": lambda x, g: g * x * x,
    "added square": lambda x, g: torch.addcmul(g, x, x),
    "exponential": lambda x, g: g * torch.exp(x),
    "comparison": lambda x, g: g * (x > 0),
    "condition and value": lambda x, g: torch.where(x > 0, x, g),
    "divisor": lambda x, g: g / x,
    "product with a short sum": lambda x, g: g * x * x.sum(0),
    "gram": lambda x, g: g @ (x.t() @ x),
}


@pytest.mark.parametrize("case", [*LINEAR, *NONLINEAR])
def test_linearity(case):
    gm = make_fx({**LINEAR, **NONLINEAR}[case], tracing_mode="fake")(X, G)
    x = gm.graph.find_nodes(op="placeholder")[0]
    assert is_linear(x) == (case in LINEAR)


def test_a_known_mask_makes_the_rest_linear():
    gm = make_fx(lambda x, g: torch.where(x > 0, x, g), tracing_mode="fake")(X, G)
    x = gm.graph.find_nodes(op="placeholder")[0]
    (mask,) = gm.graph.find_nodes(op="call_function", target=aten.gt.Scalar)
    assert not is_linear(x)
    assert is_linear(x, {mask})
