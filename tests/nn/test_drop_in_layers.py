"""Layers in the place of torch's: the same results and state, exact gradients where they must be, little held."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from xconv_fx import nn as xnn
from xconv_fx.errors import OptionError
from xconv_fx.measure import training_peak
from xconv_fx.step.explain import explain

# Torch says this of its own layers.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

# Every value has a sum of its own: the gradient is exact.
ALL = 10**6

# name: class, torch's class, arguments, input size
LAYERS = {
    "1d": (xnn.XConv1d, nn.Conv1d, {"args": (2, 4, 3), "stride": 2, "padding": 1}, (3, 2, 9)),
    "2d": (xnn.XConv2d, nn.Conv2d, {"args": (4, 4, 3), "padding": (1, 0), "groups": 2, "bias": False}, (3, 4, 6, 5)),
    "3d": (xnn.XConv3d, nn.Conv3d, {"args": (2, 3, (1, 2, 3)), "dilation": (1, 2, 1)}, (2, 2, 3, 4, 4)),
    "same, even": (xnn.XConv2d, nn.Conv2d, {"args": (2, 3, (2, 3)), "padding": "same"}, (2, 2, 5, 6)),
    "same, dilated": (xnn.XConv1d, nn.Conv1d, {"args": (2, 3, 4), "padding": "same", "dilation": 3}, (2, 2, 12)),
    "valid": (xnn.XConv2d, nn.Conv2d, {"args": (2, 3, 3), "padding": "valid", "stride": 2}, (2, 2, 7, 6)),
    "reflect": (xnn.XConv2d, nn.Conv2d, {"args": (2, 3, 3), "padding": 2, "padding_mode": "reflect"}, (2, 2, 5, 5)),
    "circular, same": (
        xnn.XConv1d, nn.Conv1d, {"args": (2, 3, 4), "padding": "same", "padding_mode": "circular"}, (2, 2, 9),
    ),
    "one volume": (
        xnn.XConv3d, nn.Conv3d, {"args": (2, 3, 2), "padding_mode": "replicate", "padding": 1}, (2, 3, 3, 3),
    ),
    "transposed 1d": (xnn.XConvTranspose1d, nn.ConvTranspose1d, {"args": (2, 3, 4), "stride": 3}, (2, 2, 5)),
    "transposed 2d": (
        xnn.XConvTranspose2d, nn.ConvTranspose2d, {"args": (4, 4, 3), "stride": 2, "output_padding": 1, "groups": 2},
        (2, 4, 3, 4),
    ),
    "transposed 3d": (xnn.XConvTranspose3d, nn.ConvTranspose3d, {"args": (2, 3, 2), "padding": 1}, (2, 2, 3, 3, 3)),
    "linear": (xnn.XLinear, nn.Linear, {"args": (6, 4)}, (3, 6)),
    "tokens": (xnn.XLinear, nn.Linear, {"args": (6, 4), "bias": False}, (3, 5, 6)),
}  # fmt: skip
SETTINGS = {"probes": 8, "kind": "gaussian", "bits": 4, "means": True}


def pair(name, **settings):
    """The drop-in layer, torch's layer with the same parameters, both in float64, and an input."""
    ours, theirs, keywords, size = LAYERS[name]
    arguments = {key: value for key, value in keywords.items() if key != "args"}
    mine = ours(*keywords["args"], **arguments, **settings, dtype=torch.float64)
    other = theirs(*keywords["args"], **arguments, dtype=torch.float64)
    other.load_state_dict(mine.state_dict())
    return mine, other, torch.randn(size, dtype=torch.float64, requires_grad=True)


def gradients(forward, parameters, seed=5):
    torch.manual_seed(seed)
    return torch.autograd.grad(forward().square().sum(), list(parameters))


def same_gradients(first, second, **tolerances):
    torch.testing.assert_close(first, second, **(tolerances or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("name", LAYERS)
def test_results_and_exact_gradients(name):
    mine, other, x = pair(name, probes=ALL)
    assert torch.equal(mine(x), other(x))
    ours = gradients(lambda: mine(x), [x, *mine.parameters()])
    same_gradients(ours, gradients(lambda: other(x), [x, *other.parameters()]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_few_probes_are_used_in_training_only(name):
    mine, other, x = pair(name, probes=2)
    exact = gradients(lambda: other(x), other.parameters())
    estimate = gradients(lambda: mine(x), mine.parameters())
    assert torch.equal(mine(x), other(x)) and not torch.allclose(estimate[0], exact[0])
    if len(exact) > 1:
        torch.testing.assert_close(estimate[1], exact[1])
    mine.eval()
    same_gradients(gradients(lambda: mine(x), mine.parameters()), exact)
    with torch.no_grad():
        assert torch.equal(mine(x), other(x)) and torch.equal(mine.train()(x), other(x))


def test_the_size_of_a_transposed_result_may_be_asked_for():
    mine, other, x = pair("transposed 1d", probes=ALL)
    sizes = [mine(x, output_size=[size]).shape for size in (16, 17, 18)]
    assert sizes == [other(x, output_size=[size]).shape for size in (16, 17, 18)]
    with pytest.raises(ValueError, match="requested an output size"):
        mine(x, output_size=[40])


@pytest.mark.parametrize("name", ["same, even", "transposed 2d", "tokens"])
def test_copies_and_state(name):
    mine, other, x = pair(name, **SETTINGS)
    assert mine.state_dict().keys() == other.state_dict().keys()
    expected = gradients(lambda: mine(x), mine.parameters())
    for twin in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert type(twin) is type(mine) and repr(twin) == repr(mine)
        same_gradients(gradients(lambda twin=twin: twin(x), twin.parameters()), expected)
    assert repr(mine).endswith("probes=8, kind='gaussian', bits=4, means=True)")
    assert repr(mine).startswith(type(mine).__name__ + repr(other).partition("(")[1])


def test_settings_may_change_between_steps():
    mine, other, x = pair("2d")
    exact = gradients(lambda: other(x), other.parameters())
    same_gradients(gradients(lambda: mine(x), mine.parameters()), exact)
    mine.probes = 2
    assert not torch.allclose(gradients(lambda: mine(x), mine.parameters())[0], exact[0])


@pytest.mark.parametrize(("bits", "sums"), [(32, 4 * 16 * 4), (4, 4 * 8 + 2 * 4)])
def test_what_is_held(saved_by, bits, sums):
    """16 sums a sample, or their 4-bit codes with one range, the seed and the weight; nothing of the input's size."""
    layer = xnn.XConv2d(8, 4, 3, padding=1, probes=16, bits=bits, means=False)
    held, _ = saved_by(lambda: layer(torch.randn(4, 8, 16, 16, requires_grad=True)))
    assert sum(tensor.nbytes for tensor in held) == sums + 8 + layer.weight.nbytes


def test_what_a_network_holds(saved_by):
    """Two bits an element of the first layer's result: its mask, and the second layer's codes and ranges."""
    net = nn.Sequential(xnn.XConv2d(3, 8, 3, padding=1, bits=1), xnn.BitReLU(), xnn.XConv2d(8, 8, 3, padding=1, bits=1))
    x, elements = torch.randn(4, 3, 32, 32), 4 * 8 * 32 * 32
    held, _ = saved_by(lambda: net(x))
    ours = sum(tensor.nbytes for tensor in held if tensor.dim() and not isinstance(tensor, nn.Parameter))
    # Groups of 256 values have two extremes of 4 bytes: a quarter of a bit a value.
    assert ours <= (elements * 2.25 + x.numel() * 1.25) / 8 + 3 * 8
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    assert sum(tensor.nbytes for tensor in saved_by(lambda: plain(x))[0]) > 12 * ours


@pytest.mark.parametrize("settings", [{"probes": 64}, {"bits": 4}], ids=str)
def test_the_physical_peak_of_a_step_is_lower(settings):
    """What encoding and decoding allocate in passing included."""

    def peak(convolution, rectifier, **settings):
        layers = [layer for _ in range(4) for layer in (convolution(16, 16, 3, padding=1, **settings), rectifier())]
        return training_peak(nn.Sequential(*layers), torch.randn(8, 16, 64, 64), lambda out: out.square().mean()).bytes

    assert peak(xnn.XConv2d, xnn.BitReLU, **settings) < 0.8 * peak(nn.Conv2d, nn.ReLU)


class Net(nn.Module):
    """All that meets a drop-in layer in a network, random layers among them."""

    def __init__(self):
        super().__init__()
        self.first = xnn.XConv2d(2, 4, 3, padding="same", probes=8, bits=4)
        self.relu, self.dropout = xnn.BitReLU(inplace=True), nn.Dropout(0.5)
        self.second = xnn.XConvTranspose2d(4, 4, 2, stride=2, bits=4)
        self.head = xnn.XLinear(4, 3, probes=2, kind="rademacher")

    def forward(self, x):
        x = self.dropout(self.relu(self.first(x)))
        return self.head(self.second(x).mean((2, 3)))


@pytest.fixture
def net():
    return Net(), torch.randn(4, 2, 6, 6, requires_grad=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_repeat_all_draws(net, reentrant):
    """Also the dropout between sketching layers, of which the first run of a reentrant checkpoint holds nothing."""
    net, x = net
    expected = gradients(lambda: net(x), [x, *net.parameters()])

    torch.manual_seed(5)
    checkpoint(net, x, use_reentrant=reentrant).square().sum().backward()
    same_gradients([x.grad, *(parameter.grad for parameter in net.parameters())], list(expected))


def test_checkpoints_of_several_segments_are_exact_where_layers_are():
    """Dropout before and behind: a mask that differed between two runs of a segment would show."""

    def layers(probes):
        torch.manual_seed(0)
        first, second = (
            nn.Sequential(nn.Dropout(0.5), xnn.XLinear(8, 8, probes=probes), nn.Dropout(0.5), xnn.BitReLU())
            for _ in range(2)
        )
        return first, second

    x = torch.randn(5, 8, requires_grad=True)
    for reentrant in (False, True):
        first, second = layers(ALL)
        out = checkpoint(second, checkpoint(first, x, use_reentrant=reentrant), use_reentrant=reentrant)
        out.square().sum().backward()
        # The result fixes the masks; the weight gradient of the last layer follows from them alone.
        hidden = out.detach()
        grad = 2 * hidden * 2 * (hidden > 0)
        assert torch.allclose(second[1].bias.grad, grad.sum(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(net, saved_by, dtype):
    net, x = net
    with torch.autocast("cpu", dtype=dtype):
        held, out = saved_by(lambda: net(x))
    assert out.dtype == dtype and dtype in {tensor.dtype for tensor in held}
    out.float().sum().backward()
    assert {parameter.grad.dtype for parameter in net.parameters()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor", "xconv"])
def test_compilers_give_the_same_numbers(backend):
    """The same seeds, and the same sketches of them."""
    net = nn.Sequential(xnn.XConv2d(2, 3, 3, probes=8), xnn.BitReLU(), nn.Flatten(), xnn.XLinear(48, 3, bits=4))
    x = torch.randn(4, 2, 6, 6)
    expected = gradients(lambda: net(x), net.parameters())
    torch._dynamo.reset()
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    same_gradients(gradients(lambda: compiled(x), net.parameters()), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x))
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_plans_leave_sketches_alone(net):
    """They are neither drawn again nor approximated once more, and their steps are not sliced."""
    net, x = net
    torch._dynamo.reset()
    (plan,) = explain(net, x, mem_budget="100%").plans
    torch._dynamo.reset()
    assert plan.slices == 1 and not plan.noise
    assert {choice.codec for choice in plan.choices} <= {"keep", "bitmask"}


def test_another_batch_size_under_a_compiler(net):
    net, _ = net
    net.dropout.p = 0.0
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager")
    for samples in (4, 6, 7):
        x = torch.randn(samples, 2, 6, 6)
        expected = gradients(lambda x=x: net(x), net.parameters())
        same_gradients(gradients(lambda x=x: compiled(x), net.parameters()), expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_a_trace_has_one_operation_a_layer(net):
    net, x = net
    graph = torch.fx.symbolic_trace(net)
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.xconv.convolution) == 2 and targets.count(torch.ops.xconv.linear) == 1
    same_gradients(gradients(lambda: graph(x), graph.parameters()), gradients(lambda: net(x), net.parameters()))


def test_relu_in_place():
    x = torch.randn(4, 9, requires_grad=True)
    before = x * 2
    after = xnn.BitReLU(inplace=True)(before)
    assert after is before and torch.equal(after, (x * 2).relu())
    after.square().sum().backward()
    assert torch.equal(x.grad, torch.autograd.grad((x * 2).relu().square().sum(), x)[0])
    with pytest.raises(RuntimeError, match="leaf"):
        xnn.BitReLU(inplace=True)(x)
    with torch.no_grad():
        assert torch.equal(xnn.BitReLU(inplace=True)(x), x.relu())
    assert repr(xnn.BitReLU(True)) == "BitReLU(inplace=True)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probes": 0}, "probes=0: 0 is not a positive int"),
        ({"probes": 2.5}, "probes=2.5"),
        ({"probes": {"a": 3}}, "patterns are for a model"),
        ({"probes": 3, "kind": "gausian"}, "kind='gausian': did you mean 'gaussian'"),
        ({"bits": 3}, "bits=3: write one of 32, 16, 8, 4, 2, 1"),
        ({"bits": True}, "bits=True"),
        ({"bits": [4]}, "bits="),
        ({"means": 1}, "means=1: write True, False"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(OptionError) as caught:
        xnn.XConv2d(2, 2, 3, **settings)
    assert message in str(caught.value)


def test_noise_is_as_predicted():
    """Mean squared error of the held input of 64 draws, read through an identity layer: D / r - 1 of its energy.

    The relative error of a mean of 64 x 256 squares is 0.02; 0.1 is five of them.
    """
    layer = xnn.XLinear(256, 256, bias=False, probes=32)
    x = torch.randn(1, 256)
    grad = torch.zeros(1, 256)
    grad[0, 0] = 1
    errors = []
    for _ in range(64):
        (estimate,) = torch.autograd.grad(layer(x), layer.weight, grad)
        errors.append((estimate[0] - x[0]).square().sum() / x.square().sum())
    assert math.isclose(sum(errors) / 64, 256 / 32 - 1, rel_tol=0.1)
