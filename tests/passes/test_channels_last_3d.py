"""3D convolutions run channels-last, and nobody outside the graph can tell."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn

from xconv_fx.measure import physical_peak
from xconv_fx.passes.channels_last_3d import volumes_channels_last


def dynamo_graph(model, *inputs, draws_as_aten=False):
    """The graph that Dynamo traces, rewritten, and the values that it is called with."""
    found = {}

    def capture(gm, example_inputs):
        found["gm"] = copy.deepcopy(gm)
        volumes_channels_last(found["gm"], draws_as_aten)

        def run(*values):
            found["values"] = values
            return gm(*values)

        return run

    torch._dynamo.reset()
    torch.compile(model, backend=capture, fullgraph=True)(*inputs)
    return found["gm"], found["values"]


class Convolved(fx.Interpreter):
    """Remembers what convolutions are called with."""

    def call_function(self, target, args, kwargs):
        if target in (torch.conv3d, torch.conv_transpose3d, torch.conv2d):
            self.seen = [*getattr(self, "seen", []), (args[0], args[1])]
        return super().call_function(target, args, kwargs)


def unet():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(2, 8, 3, padding=1, stride=2),
        nn.PReLU(),
        nn.Conv3d(8, 8, 3, padding=1),
        nn.ConvTranspose3d(8, 4, 2, stride=2),
    )


class Changes(nn.Module):
    """Changes its input in place, itself or through a view."""

    def __init__(self, change):
        super().__init__()
        self.change, self.conv = change, nn.Conv3d(2, 4, 3, padding=1)

    def forward(self, x):
        self.change(x)
        return self.conv(x)


@pytest.mark.parametrize(
    "change", [lambda x: nn.functional.leaky_relu_(x, 0.1), lambda x: x.sub_(0.5), lambda x: x[:, 0].mul_(2)]
)
def test_the_caller_sees_inputs_change(change):
    model, x = Changes(change), torch.randn(2, 2, 6, 6, 6)
    gm, values = dynamo_graph(model, x.clone())
    given = [x.clone() if value.shape == x.shape else value for value in values]
    (result,) = gm(*given)
    wanted = x.clone()
    torch.testing.assert_close(result, model(wanted))
    (changed,) = (value for value in given if value.shape == x.shape)
    assert torch.equal(changed, wanted) and not torch.equal(changed, x)


def test_volumes_and_weights_are_channels_last_inside():
    model, x = unet(), torch.randn(2, 2, 8, 8, 8)
    gm, values = dynamo_graph(model, x)
    interpreter = Convolved(gm)
    (result,) = interpreter.run(*values)
    assert len(interpreter.seen) == 3
    for volume, weight in interpreter.seen:
        assert volume.is_contiguous(memory_format=torch.channels_last_3d)
        assert weight.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(result, model(x), rtol=1e-4, atol=1e-5)
    assert result.stride() == model(x).stride()


def test_gradients_reach_the_original_weights():
    model, x = unet(), torch.randn(2, 2, 8, 8, 8)
    gm, values = dynamo_graph(model, x)
    gm(*values)[0].square().mean().backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(x).square().mean().backward()
    for mine, parameter in zip(found, model.parameters(), strict=True):
        assert (mine - parameter.grad).norm() < 1e-4 * parameter.grad.norm()


def test_a_convolution_needs_no_copies():
    x, weight = torch.randn(2, 16, 24, 24, 24), torch.randn(16, 16, 3, 3, 3)
    last = [value.contiguous(memory_format=torch.channels_last_3d) for value in (x, weight)]
    torch.conv3d(*last, padding=1)

    def transient(*operands):
        return physical_peak(lambda: torch.conv3d(*operands, padding=1)).transient

    assert transient(*last) < 1.1 * x.nbytes < 1.5 * x.nbytes < transient(x, weight)


def test_operands_may_be_named():
    def named(x, weight):
        return torch.nn.functional.conv3d(input=x, weight=weight, padding=1)

    x, weight = torch.randn(2, 3, 6, 6, 6), torch.randn(4, 3, 3, 3, 3, requires_grad=True)
    gm, values = dynamo_graph(named, x, weight)
    torch.testing.assert_close(gm(*values)[0], named(x, weight), rtol=1e-4, atol=1e-5)


def test_images_are_left_alone():
    model, x = nn.Conv2d(2, 4, 3), torch.randn(2, 2, 8, 8)
    gm, values = dynamo_graph(model, x)
    interpreter = Convolved(gm)
    interpreter.run(*values)
    ((image, _),) = interpreter.seen
    assert image.is_contiguous()


def test_the_gradient_that_comes_in_is_laid_out_once():
    """Both halves of the last convolution's backward read it; each would copy it for itself."""
    from torch.fx.experimental.proxy_tensor import make_fx

    model, x = unet(), torch.randn(2, 2, 8, 8, 8)
    gm, values = dynamo_graph(model, x)
    values = [value.detach().requires_grad_() for value in values]

    def gradients(*operands):
        (result,) = gm(*operands)
        return torch.autograd.grad(result, operands, torch.ones_like(result))

    joint = make_fx(gradients)(*values)
    backward = [node for node in joint.graph.nodes if node.target is torch.ops.aten.convolution_backward.default]
    for node in backward:
        grad = node.args[0].meta["tensor_meta"]
        assert grad.memory_format == torch.channels_last_3d, node
    found = {value.data_ptr(): grad for value, grad in zip(values, joint(*values), strict=True)}
    exact = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    for parameter, grad in zip(model.parameters(), exact, strict=True):
        torch.testing.assert_close(found[parameter.data_ptr()], grad, rtol=1e-4, atol=1e-4)


class Drawn(nn.Module):
    """Draws for a volume that a convolution then reads."""

    def __init__(self, draw):
        super().__init__()
        self.draw, self.conv = draw, nn.Conv3d(2, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(self.draw(x))


@pytest.mark.parametrize(
    "draw",
    [nn.Dropout(0.4), nn.RReLU(), lambda x: x * torch.rand_like(x), lambda x: x + torch.empty_like(x).normal_()],
    ids=["dropout", "rrelu", "rand_like", "normal_"],
)
def test_draws_as_of_aten_are_for_the_same_elements(draw):
    """ATen draws in the order in which the elements lie in memory."""
    model, x = Drawn(draw), torch.randn(2, 2, 6, 6, 6)
    torch.manual_seed(3)
    wanted = model(x)
    gm, values = dynamo_graph(model, x, draws_as_aten=True)
    torch.manual_seed(3)
    assert torch.equal(gm(*values)[0], wanted)


class Flattened(nn.Module):
    """Counts on contiguous volumes: `view` is not possible of others."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2))
        self.head = nn.Linear(8 * 4**3, 5)

    def forward(self, x):
        y = self.body(x)
        return self.head(y.view(y.size(0), -1))


@pytest.mark.parametrize("budget", ["100%", "98%"])
def test_a_model_that_views_volumes_trains(budget):
    torch.manual_seed(0)
    model, x = Flattened(), torch.randn(2, 1, 8, 8, 8)
    expected = copy.deepcopy(model)
    expected(x).square().mean().backward()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="xconv", options={"mem_budget": budget, "codecs": "exact"})
    compiled(x).square().mean().backward()
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "results",
    [lambda y: y.flatten(2), lambda y: y.permute(0, 2, 3, 4, 1), lambda y: (y, y + 1)],
    ids=["tokens", "permuted", "two"],
)
def test_results_of_any_form_lie_as_in_eager(results):
    class Returning(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = unet()

        def forward(self, x):
            return results(self.body(x))

    model, x = Returning(), torch.randn(2, 2, 8, 8, 8)
    gm, values = dynamo_graph(model, x)
    expected = model(x)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for one, other in zip(fx.Interpreter(gm).run(*values), expected, strict=True):
        assert one.stride() == other.stride()
        torch.testing.assert_close(one, other)
        one.sum().backward(retain_graph=True)
