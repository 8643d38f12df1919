"""Layers that read one tensor hold one sketch of it, for as long as one forward, and nothing after it."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from xconv_fx import nn as xnn
from xconv_fx import substitute
from xconv_fx.measure import training_peak
from xconv_fx.ops import sketch_sharing

PROBES = 16


def layer(kernel=3, **settings):
    return xnn.XConv2d(4, 4, kernel, padding=kernel // 2, bias=False, **({"probes": PROBES} | settings))


@pytest.fixture
def x():
    return torch.randn(3, 4, 8, 8)


class Net(nn.Module):
    """A residual block with dropout behind each of its layers."""

    def __init__(self, conv=layer):
        super().__init__()
        self.stem, self.conv, self.shortcut, self.last = conv(1), conv(3), conv(1), conv(1)
        self.dropout = nn.Dropout(0.5)

    def block(self, x):
        return self.dropout(self.conv(x)) + self.dropout(self.shortcut(x))

    def forward(self, x, reentrant=None):
        x = self.stem(x)
        x = self.block(x) if reentrant is None else checkpoint(self.block, x, use_reentrant=reentrant)
        return self.last(self.dropout(x))


def gradients(forward, parameters, seed=5):
    torch.manual_seed(seed)
    forward().square().sum().backward()
    return [parameter.grad for parameter in parameters]


def estimate(out, reader):
    """What a 1x1 layer held of the first sample's first pixel, as its weight gradient says."""
    grad = torch.zeros_like(out)
    grad[0, 0, 0, 0] = 1
    return torch.autograd.grad(out, reader.weight, grad, retain_graph=True)[0][0].flatten()


def alike(first, second, x, between=lambda: None):
    """Whether two 1x1 layers that read x, one after the other, held the same."""
    out = first(x)
    between()
    other = second(x)
    return torch.equal(estimate(out, first), estimate(other, second))


SETTINGS = [{}, {"bits": 4}, {"kind": "gaussian"}, {"probes": None, "bits": 2}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_one_sketch_is_held(x, saved_by, settings):
    layers = [layer(3, **settings), layer(1, **settings), layer(5, **settings)]
    alone, _ = saved_by(lambda: layers[0](x))
    held, outs = saved_by(lambda: [layer(x) for layer in layers])
    weights = {layer.weight.data_ptr() for layer in layers}
    assert len([t for t in held if t.data_ptr() not in weights]) == len(alone)
    # Results are exact, and the estimate does not depend on who made the sketch.
    for layer_, out in zip(layers, outs, strict=True):
        assert torch.equal(out, nn.functional.conv2d(x, layer_.weight, None, 1, layer_.padding))


def test_the_peak_of_a_step_is_lower():
    """Four bits an element are held once for four branches, instead of four times."""

    class Branches(nn.Module):
        def __init__(self, apart):
            super().__init__()
            self.stem, self.apart = nn.Conv2d(8, 64, 1), apart
            self.branches = nn.ModuleList(xnn.XConv2d(64, 1, 1, bits=16) for _ in range(4))

        def forward(self, x):
            x = self.stem(x)
            return sum(branch(x.view_as(x) if self.apart else x) for branch in self.branches)

    peaks = [training_peak(Branches(apart), torch.randn(4, 8, 32, 32), torch.sum).bytes for apart in (False, True)]
    assert peaks[1] - peaks[0] > 2 * 2 * 4 * 64 * 32 * 32  # Of three payloads of two bytes an element.


def test_what_is_another_sketch(x):
    one, other = layer(1), layer(1)
    assert alike(one, other, x)
    assert not alike(one, one, x)  # Of another forward.
    assert not alike(one, layer(1, means=False), x)
    assert not alike(one, layer(1, probes=8), x)
    assert not alike(one, layer(1, bits=8), x)
    assert not alike(one, lambda_of(other), x)
    assert alike(one, layer(1, means=True, probes=PROBES), x)  # In other words the same.


def lambda_of(reader):
    """The layer, reading a view."""

    class Viewing:
        weight = reader.weight

        def __call__(self, x):
            return reader(x.view_as(x))

    return Viewing()


@pytest.mark.parametrize("write", [lambda x: x.add_(1), lambda x: x.view(-1)[3:].zero_(), lambda x: x.detach().mul_(2)])
def test_a_write_makes_another_input(x, write):
    """Whose sketch is of the values after it: with a sum for every value, the estimate is exact."""
    one, other = layer(1, probes=10**6), layer(1, probes=10**6)
    out = one(x)
    before = x[0, :, 0, 0].clone()
    write(x)
    torch.testing.assert_close(estimate(out, one), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(estimate(other(x), other), x[0, :, 0, 0], rtol=1e-4, atol=1e-4)
    assert alike(one, other, x) and not alike(layer(1), layer(1), x, lambda: write(x))


def test_a_backward_ends_the_forward(x):
    """So that no two steps on one batch have the same draws, in whatever order their layers run."""
    one, other = layer(1), layer(1)
    assert not alike(one, other, x, lambda: layer(1)(torch.randn(2, 4, 2, 2)).sum().backward())
    first = gradients(lambda: one(x) + other(x), [one.weight])[0].clone()
    one.weight.grad = None
    torch.autograd.backward((one(x) + other(x)).square().sum())
    assert not torch.allclose(one.weight.grad, first)


def test_layers_that_hold_nothing_have_no_part_in_it(x):
    one, other = layer(1), layer(1)
    with torch.no_grad():
        one(x)
    layer(1).requires_grad_(False)(x)
    layer(1).eval()(x)
    assert x not in sketch_sharing._sketches
    assert alike(one, other, x, lambda: layer(1).eval()(x))


def test_nothing_is_kept(x):
    one, other = layer(), layer(1)
    out = one(x) + other(x)
    payload = list(sketch_sharing._sketches[x].payload)
    assert all(part() is not None for part in payload)
    out.sum().backward()
    assert all(part() is None for part in payload)

    out = one(x) + other(x)
    payload = list(sketch_sharing._sketches[x].payload)
    del out  # Without a backward.
    assert all(part() is None for part in payload)
    del x
    gc.collect()


def test_inputs_are_not_kept():
    before = len(sketch_sharing._sketches)
    x = torch.randn(2, 4, 4, 4)
    out = layer()(x)
    assert len(sketch_sharing._sketches) == before + 1
    del x
    assert len(sketch_sharing._sketches) == before and out.requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_make_the_same_draws(x, reentrant):
    """Dropout between and behind the layers that share: a mask that differed would show."""
    net = Net()
    expected = gradients(lambda: net(x), net.parameters())
    net = copy.deepcopy(net)
    net.zero_grad()
    assert all(map(torch.equal, gradients(lambda: net(x, reentrant), net.parameters()), expected))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_checkpoints_of_a_layer_that_takes_a_sketch(x, reentrant, autocast):
    """The segment run again has no sketch to take, and still the same dropout behind."""
    one, other, dropout = layer(1, probes=10**6), layer(1, probes=10**6), nn.Dropout(0.5)
    x.requires_grad_()

    def segment(x):
        return dropout(other(x))

    def run(second):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = one(x) + second(x)
        leaves = [x, one.weight, other.weight]
        for leaf in leaves:
            leaf.grad = None
        out.float().square().sum().backward()
        return [leaf.grad for leaf in leaves]

    again = run(lambda x: checkpoint(segment, x, use_reentrant=reentrant))
    tolerance = 0.1 if autocast else 1e-4
    torch.testing.assert_close(again, run(segment), rtol=tolerance, atol=tolerance)


def test_hooks_that_drop_what_is_saved(x):
    """The payload is made again from the seed."""
    net = Net()
    expected = [grad.clone() for grad in gradients(lambda: net(x), net.parameters())]
    net.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True), lambda t: torch.from_numpy(t)):
        assert all(map(torch.equal, gradients(lambda: net(x), net.parameters()), expected))


def test_under_autocast_the_tensor_before_the_cast_counts(x):
    one, other = layer(1), layer(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert alike(one, other, x)


def test_a_graph_shares(x):
    """A `torch.fx` graph runs one operation a layer, which find each other as layers do."""
    plain = Net(lambda kernel: nn.Conv2d(4, 4, kernel, padding=kernel // 2, bias=False))
    graph, _ = substitute(torch.fx.symbolic_trace(plain, {"reentrant": None}), PROBES)
    net = Net()
    net.load_state_dict(plain.state_dict())
    expected = gradients(lambda: net(x), net.parameters())
    assert all(map(torch.equal, gradients(lambda: graph(x), plain.parameters()), expected))


def test_nothing_that_is_traced_is_shared_with_eager_code(x):
    one, other = layer(1), layer(1)
    out = one(x)
    traced = make_fx(lambda x: other(x))(x)
    draws = [node for node in traced.graph.nodes if "draw_seed" in str(node.target)]
    assert len(draws) == 1 and draws[0].users
    assert out.requires_grad and not [node for node in traced.graph.nodes if "_tensor_constant" in str(node.target)][2:]


def test_transforms_leave_no_tensors_of_theirs_behind(x):
    """They wrap what enters and leaves an operation, for as long as they run."""
    one, other, last = layer(1), layer(1), layer(1)

    def called(weight):
        return torch.func.functional_call(one, {"weight": weight}, (x,)).sum()

    with pytest.raises(RuntimeError, match="functorch transforms"):  # Known: they cannot differentiate an operator.
        torch.func.grad(called)(one.weight.detach())
    torch.func.functionalize(called)(one.weight)
    assert alike(other, last, x)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(sketch_sharing._sketches[x].seed)


def test_inference_tensors_have_no_version():
    with torch.inference_mode():
        x = torch.randn(2, 4, 4, 4)
    assert not alike(layer(1), layer(1), x)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor", "xconv"])
@pytest.mark.parametrize("write", [False, True])
def test_compilers_share(x, backend, write):
    """Also the seeds of what comes after are the same: a draw that is not used is made in compiled code as well."""

    class Writing(Net):
        def forward(self, x):
            x = self.stem(x)
            out = self.conv(x)
            if write:
                x.mul_(2)
            return self.last((out + self.shortcut(x)).relu())

    net = Writing()
    expected = [grad.clone() for grad in gradients(lambda: net(x), net.parameters())]
    net.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    for ours, theirs in zip(gradients(lambda: compiled(x), net.parameters()), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
