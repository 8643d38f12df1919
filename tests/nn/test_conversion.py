"""Models whose layers are given other classes: the same parameters, the same results, and a report that is true."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from torch import nn

import xconv_fx
from xconv_fx import nn as xnn
from xconv_fx.errors import OptionError, UnsupportedModelError


class Block(nn.Module):
    """A ReLU that is used twice, and a layer of a class of its own."""

    def __init__(self, channels):
        super().__init__()
        self.act, self.conv = nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 3, padding=1)
        self.own = Scaled(channels, channels, 1)

    def forward(self, x):
        return self.act(self.own(self.act(self.conv(x))))


class Scaled(nn.Conv2d):
    def forward(self, x):
        return super().forward(2 * x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding="same")
        self.encoder = nn.Sequential(nn.BatchNorm2d(4), Block(4))
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.up(self.encoder(self.stem(x))).mean((2, 3)))


LEFT = "a class of its own, derived from Conv2d"


def shown(report, width=100):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(report)
        return console.export_text()


def test_a_converted_model_computes_the_same_with_the_same_parameters():
    model, x = Net(), torch.randn(2, 3, 6, 6)
    converted, report = xconv_fx.convert(model, probes=4)
    assert type(model.stem) is nn.Conv2d and type(converted.stem) is xnn.XConv2d
    mine, other = ([*net.parameters(), *net.buffers()] for net in (converted, model))
    assert all(first is second for first, second in zip(mine, other, strict=True))
    assert torch.equal(converted(x), model(x))
    assert report.converted == {
        "stem": "4 probes", "encoder.1.act": "1 bit an element", "encoder.1.conv": "4 probes", "up": "4 probes",
        "head": "4 probes",
    }  # fmt: skip
    assert report.left == {"encoder.1.own": LEFT}


def test_only_weight_gradients_of_converted_layers_change():
    model, x = Net().eval(), torch.randn(2, 3, 6, 6)
    converted, _ = xconv_fx.convert(model, probes={"up": 1})
    for layer in (converted, model):  # batch norm takes part as it is
        layer.train()
    grads = [torch.autograd.grad(net(x).square().sum(), list(net.parameters())) for net in (model, converted)]
    changed = {
        name for (name, _), first, second in zip(model.named_parameters(), *grads, strict=True)
        if not torch.allclose(first, second, rtol=1e-4, atol=1e-6)
    }  # fmt: skip
    assert changed == {"up.weight"}


def test_layers_stay_the_objects_that_they_are_in_place():
    model = Net().double()
    model.up.eval()
    calls = []
    model.stem.register_forward_hook(lambda *_: calls.append("after"))
    stem, state, optimizer = model.stem, model.state_dict(), torch.optim.SGD(model.parameters(), 0.1)
    converted, _ = xconv_fx.convert(model, probes=4, inplace=True)
    assert converted is model and model.stem is stem and type(stem) is xnn.XConv2d
    assert model.state_dict().keys() == state.keys() and not model.up.training and stem.training
    before = stem.weight.detach().clone()
    model(torch.randn(2, 3, 6, 6, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert calls == ["after"] and not torch.equal(stem.weight, before)


def test_hooks_and_tied_layers_survive_in_a_copy():
    model, calls = Net(), []
    model.again = model.up
    model.up.register_forward_pre_hook(lambda *_: calls.append("before"))
    converted, report = xconv_fx.convert(model, probes={"again": 4})
    assert converted.again is converted.up and type(converted.up) is xnn.XConvTranspose2d
    assert set(report.converted) == {"up", "encoder.1.act"}
    converted(torch.randn(2, 3, 6, 6))
    assert calls == ["before"]


def test_a_layer_alone_and_once_more():
    layer = nn.Linear(3, 4)
    converted, report = xconv_fx.convert(layer, probes=2, inplace=True)
    assert converted is layer and report.converted == {"": "2 probes"}
    again, report = xconv_fx.convert(layer, bits=4)
    assert (again.probes, again.bits, layer.probes) == (None, 4, 2)
    assert report.converted == {"": "4 bits an element"}
    assert "(the model)" in shown(report)


def test_normalised_weights():
    """The older weight norm computes the weight in a hook."""
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = torch.nn.utils.weight_norm(nn.Conv2d(2, 3, 3))
    x = torch.randn(2, 2, 5, 5)
    expected = torch.autograd.grad(layer(x).square().sum(), [layer.weight_g, layer.weight_v])
    converted, report = xconv_fx.convert(layer, probes=10**6)
    assert report.converted
    ours = torch.autograd.grad(converted(x).square().sum(), [layer.weight_g, layer.weight_v])
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("make", [lambda: nn.LazyConv2d(4, 3), lambda: nn.Sequential(nn.LazyLinear(2))])
def test_lazy_layers_are_left_alone_until_they_have_sizes(make):
    model = make()
    converted, report = xconv_fx.convert(model, probes=4)
    assert list(report.left.values()) == ["its sizes are not known yet: call the model once before"]
    converted(torch.randn(2, 3, 5, 5))
    assert xconv_fx.convert(converted, probes=4)[1].converted


def test_patterns():
    converted, report = xconv_fx.convert(Net(), probes={"encoder.*": 7, "head": 3}, bits=4, kind="rademacher")
    assert (converted.encoder[1].conv.probes, converted.head.probes, converted.head.bits) == (7, 3, 4)
    assert type(converted.stem) is nn.Conv2d
    assert report.left["stem"] == report.left["up"] == "no name or pattern in `probes` matches"
    assert report.converted["head"] == "3 rademacher probes in 4 bits"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing would be saved; write a positive int"),
        ({"probes": {"haed": 3}}, "probes='haed': no layer matches; did you mean 'head'?"),
        ({"probes": {"encoder.0": 3}}, "no layer matches"),
        ({"probes": -1}, "-1 is not a positive int"),
        ({"probes": {"head": "4"}}, "'4' is not a positive int"),
        ({"probes": 4, "bits": 5}, "bits=5"),
        ({"probes": 4, "kind": "dense"}, "kind='dense'"),
        ({"bits": 4, "means": "yes"}, "means='yes'"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    model = Net()
    with pytest.raises(OptionError) as caught:
        xconv_fx.convert(model, **settings, inplace=True)
    assert message in str(caught.value)
    assert not any(isinstance(layer, xnn.Sketching) for layer in model.modules())


def test_a_model_that_cannot_be_copied():
    model = Net()
    model.generator = (number for number in range(3))
    with pytest.raises(UnsupportedModelError, match="inplace=True"):
        xconv_fx.convert(model, probes=4)
    assert xconv_fx.convert(model, probes=4, inplace=True)[1].converted


def test_the_report_as_it_is_printed():
    _, report = xconv_fx.convert(Net(), probes={"encoder.*": 7})
    text = shown(report)
    assert "encoder.1.conv  Conv2d" in text and "7 probes" in text
    assert f"as before: {LEFT}" in " ".join(text.split())
    assert "2 converted, 4 left as they were" in text
    assert copy.deepcopy(report) == report


def test_imports_wait():
    """`import xconv_fx` costs nothing until something of it is used, and is told apart from what is not there."""
    program = (
        "import sys, xconv_fx; assert 'torch' not in sys.modules and 'convert' in dir(xconv_fx); "
        "xconv_fx.nn.XLinear, xconv_fx.convert, xconv_fx.plan_and_convert, xconv_fx.substitute; "
        "assert 'torch' in sys.modules and 'torch._inductor' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(AttributeError, match="no attribute 'covert'"):
        _ = xconv_fx.covert
