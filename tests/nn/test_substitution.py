"""XConv's operations in graphs: one for each convolution, the same results, and exact gradients with every probe."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import xconv_fx.nn  # registers the ops
from xconv_fx.codec_spec import CodecSpec
from xconv_fx.errors import OptionError
from xconv_fx.plan import Choice, Plan

# Torch says these of its own: of layers, and of copies of its graphs.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]

aten = torch.ops.aten
OURS = (torch.ops.xconv.convolution, torch.ops.xconv.linear)
ALL = 10**6


class Net(nn.Module):
    """Layers and functions of every kind, with paddings of every kind, and ReLUs in every spelling."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, (2, 3), padding="same")
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU(inplace=True))
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2, output_padding=1)
        self.kernel, self.bias = nn.Parameter(torch.randn(4, 2, 2, 3)), nn.Parameter(torch.randn(4))
        self.grow = nn.Parameter(torch.randn(4, 4, 2, 2))
        self.head = nn.Linear(4, 3)
        self.tail = nn.Parameter(torch.randn(2, 3))

    def forward(self, x):
        x = F.relu(self.body(self.stem(x)))
        x = F.conv2d(self.up(x), self.kernel, self.bias, padding="same", groups=2).relu_()
        x = F.conv_transpose2d(x, self.grow, stride=2, padding=1, dilation=1)
        return F.linear(torch.relu(self.head(x.mean((2, 3)))), weight=self.tail)


LAYERS = {"stem", "body.0", "up", "kernel", "grow", "head", "tail"}


def exported(net, x):
    return torch.export.export(net, (x,)).module()


GRAPHS = {"symbolic_trace": lambda net, x: fx.symbolic_trace(net), "export": exported}


@pytest.fixture(params=GRAPHS)
def graph(request):
    net, x = Net(), torch.randn(2, 3, 6, 6, requires_grad=True)
    return GRAPHS[request.param](net, x.detach()), net, x


def count(module, targets=OURS):
    return sum(node.target in targets for node in module.graph.nodes)


def gradients(module, net, x):
    torch.manual_seed(3)
    return torch.autograd.grad(module(x).square().sum(), [x, *net.parameters()])


def test_one_operation_for_each_layer(graph):
    module, net, x = graph
    operations = count(module, {node.target for node in module.graph.nodes})
    substituted, report = xconv_fx.substitute(module, ALL)
    assert count(substituted) == 7 and count(substituted, {torch.ops.xconv.relu}) == 4
    assert count(module) == 0 and count(module, {node.target for node in module.graph.nodes}) == operations
    assert {name for name, holds in report.converted.items() if "probes" in holds} == LAYERS and not report.left
    assert torch.equal(substituted(x), net(x))
    torch.testing.assert_close(gradients(substituted, net, x), gradients(net, net, x), rtol=1e-4, atol=1e-4)


def test_few_probes_hold_less(graph, saved_by):
    module, net, x = graph
    x = torch.randn(2, 3, 24, 24)
    module = fx.symbolic_trace(net)
    substituted, _ = xconv_fx.substitute(module, 8, bits=4, kind="fold", means=False)
    held = [sum(tensor.nbytes for tensor in saved_by(lambda m=m: m(x))[0]) for m in (module, substituted)]
    assert held[1] < 0.1 * held[0]


def test_patterns_name_layers(graph):
    module, _, _ = graph
    substituted, report = xconv_fx.substitute(module, {"body.*": 5, "kernel": 6}, inplace=True)
    assert substituted is module and count(module) == 2
    assert {name: holds for name, holds in report.converted.items() if "probes" in holds} == {
        "body.0": "5 probes", "kernel": "6 probes",
    }  # fmt: skip
    assert set(report.left) == LAYERS - {"body.0", "kernel"}
    probes = {node.args[9] for node in module.graph.nodes if node.target is torch.ops.xconv.convolution}
    assert probes == {5, 6}


def test_a_plan(graph):
    module, _, _ = graph

    def choice(layer, codec, reader, **more):
        spec = CodecSpec(codec, **more)
        return Choice("r", layer, "relu", (2, 4), "float32", (), spec, 100, 10, readers=(reader,))

    plan = Plan("cpu", None, 10, 5, "mm", 0, (
        choice("body.1", "probe", "up", probes=9, kind="fold", bits=4), choice("stem", "keep", "body.0"),
        choice("", "quantize", "head", bits=2),
    ))  # fmt: skip
    substituted, report = xconv_fx.substitute(module, plan)
    assert (report.converted["up"], report.converted["head"]) == ("9 probes in 4 bits", "2 bits an element")
    assert report.left["body.0"] == "the plan keeps its input" and "none of the plan" in report.left["stem"]
    assert count(substituted) == 2 and report.plans == (plan,)
    assert xconv_fx.substitute(module, [plan])[1] == report


class Hooked(nn.Conv2d):
    pass


def test_what_is_left_alone_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.hooked, self.up = Hooked(3, 3, 1), nn.Conv2d(3, 3, 1), nn.ConvTranspose2d(3, 3, 2, stride=2)
            self.hooked.register_forward_hook(lambda *_: None)
            self.weight = nn.Parameter(torch.randn(3, 3, 2, 2))

        def forward(self, x):
            x = self.up(self.hooked(self.own(x)), output_size=[13, 13])
            return F.conv2d(x, self.weight * 2, padding="same")

    class Leaves(fx.Tracer):
        def is_leaf_module(self, module, name):
            return not isinstance(module, Odd)

    odd = Odd()
    module = fx.GraphModule(odd, Leaves().trace(odd))
    substituted, report = xconv_fx.substitute(module, 4)
    assert report.left == {
        "own": "a class of its own",
        "hooked": "it has hooks, which an operation would not run",
        "up": "the size of its output is an argument",
        "conv2d": "the size of its kernel is not known in the graph",
    }
    assert substituted.code == module.code


@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_of_aten(transposed):
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3, 2))

        def forward(self, x):
            return aten.convolution.default(x, self.weight, None, [2], [0], [1], transposed, [0], 1)

    net, x = Raw(), torch.randn(2, 3, 8, requires_grad=True)
    substituted, _ = xconv_fx.substitute(fx.symbolic_trace(net), ALL)
    assert count(substituted) == 1
    torch.testing.assert_close(gradients(substituted, net, x), gradients(net, net, x))


def test_a_graph_with_nothing_in_it_stays_as_it_is():
    module = fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)))
    substituted, report = xconv_fx.substitute(module, 4)
    assert substituted.code == module.code and not report.rows


@pytest.mark.parametrize(
    ("plan", "settings", "message"),
    [
        (0, {}, "0 is not a positive int"),
        (None, {}, "plan=None: write the plan of"),
        ("60%", {}, "plan='60%'"),
        ((), {}, "plan=()"),
        ({"haed": 4}, {}, "did you mean 'head'?"),
        (4, {"kind": "folds"}, "did you mean 'fold'?"),
        (Plan("cpu", None, 10, 5, "mm", 0, ()), {"bits": 4}, "a plan says this itself"),
    ],
)
def test_settings_that_make_no_sense(plan, settings, message):
    module = fx.symbolic_trace(Net())
    with pytest.raises(OptionError) as caught:
        xconv_fx.substitute(module, plan, **settings, inplace=True)
    assert message in str(caught.value) and count(module) == 0
