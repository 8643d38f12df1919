"""Fixed point in pairs: which normalisations are found, what one payload stands for, and the gradients, by the paper.

The reference is plain autograd with the paper's backward (Chakrabarti & Moseley 2019): forward and ReLU's mask are
exact, the normalisation and the weight gradient of the next convolution read an approximation of the normalised value.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.tracing import run_joint, run_pair, targets, trace
from torch import nn

from xconv_fx.ops.fixed import SPAN
from xconv_fx.passes.find_norms import find_norms
from xconv_fx.passes.residuals import find_residuals
from xconv_fx.planner.requirement import StorageKind

BITS = 4
# Dims over which a norm of (2, 8, 18, 18) reduces once it is seen as (2, 8 / group, group, 324).
NORMS = {
    "batch": (lambda: nn.BatchNorm2d(8), 1, (0, 2, 3)),
    "group": (lambda: nn.GroupNorm(2, 8), 4, (2, 3)),
    "instance": (lambda: nn.InstanceNorm2d(8, affine=True), 1, (2, 3)),
}
SHAPE = (2, 4, 18, 18)


def net(norm, activation=nn.ReLU):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), norm(), activation(), nn.Conv2d(8, 8, 3, padding=1), norm(), activation(),
        nn.Conv2d(8, 4, 3),
    ).double()  # fmt: skip
    for number in (1, 4):
        nn.init.normal_(model[number].weight)
        nn.init.normal_(model[number].bias)
    return model


def traced(norm, activation=nn.ReLU):
    return trace(net(norm, activation), torch.randn(*SHAPE, dtype=torch.float64))


def is_fixed(candidate):
    """Whether the residual is in fixed point, or is made again from that."""
    return candidate.choice.codec == "fixed" or candidate.kind is StorageKind.RECOMPUTED_FROM_SIGNED_CODES


def forced(traced, codecs):
    """The job in which everything is held in fixed point, or made again from that, that may be."""
    job = traced.planning(mem_budget="100%", codecs=codecs)
    rows = job.planning.candidates
    return job.chosen(tuple(max(place for place, c in enumerate(row) if place == 0 or is_fixed(c)) for row in rows))


def held(job):
    return {choice.residual: (choice.codec, choice.bits) for choice in job.plan.choices if len(choice.shape) > 3}


@pytest.fixture(scope="module", params=NORMS)
def fixed(request):
    """A traced network of a kind of norm, and its job in fixed point."""
    example = traced(NORMS[request.param][0])
    return request.param, example, forced(example, f"fixed:{BITS}")


def test_one_payload_for_a_normalisation_its_activation_and_the_next_convolution(fixed):
    _, _, job = fixed
    codes, nothing = ("fixed", BITS), ("recompute", None)
    assert held(job) == {"convolution": codes, "relu": nothing, "convolution_1": codes, "relu_1": nothing}
    assert targets(job.pair.forward.graph).count("xconv.fix.default") == 2
    assert "xconv.pack_mask.default" not in targets(job.pair.forward.graph)
    assert job.plan.saved_after <= 0.16 / 2 * job.plan.saved_before  # Of doubles; 0.16 of floats.


def test_the_plan_counts_the_bytes_that_cross(fixed):
    _, _, job = fixed
    crossing = job.pair.backward.graph.find_nodes(op="placeholder")
    held = sum(node.meta["val"].nbytes for node in crossing if node.name.endswith(("fixed", "scales")))
    said = sum(choice.bytes_after for choice in job.plan.choices if choice.codec == "fixed")
    assert held == said


class PaperNorm(torch.autograd.Function):
    """Exact forward; a backward that reads the approximate normalised value. Returns what is rectified next as well."""

    @staticmethod
    def forward(ctx, x, gamma, beta, name):
        _, group, dims = NORMS[name]
        ctx.shape, ctx.dims, ctx.name = (x.shape[0], x.shape[1] // group, group, -1), dims, name
        if group == 1:
            ctx.shape, ctx.dims = x.shape, dims
        grouped = x.reshape(ctx.shape)
        variance, mean = torch.var_mean(grouped, ctx.dims, correction=0, keepdim=True)
        ctx.scale = (variance + 1e-5).rsqrt()
        exact = ((grouped - mean) * ctx.scale).reshape(x.shape)
        gamma, beta = gamma.view(1, -1, 1, 1), beta.view(1, -1, 1, 1)
        close = approximate(exact, gamma, beta)
        ctx.save_for_backward(close, gamma)
        return exact * gamma + beta, close * gamma + beta

    @staticmethod
    def backward(ctx, dy, _):
        close, gamma = ctx.saved_tensors
        grouped, flow = close.reshape(ctx.shape), (dy * gamma).reshape(ctx.shape)
        mean = flow.mean(ctx.dims, keepdim=True)
        # Instance norm, as we write it, takes the deviation from the mean of the value that it reads.
        centred = grouped - grouped.mean(ctx.dims, keepdim=True) if ctx.name == "instance" else grouped
        dx = ctx.scale * (flow - mean - centred * (flow * grouped).mean(ctx.dims, keepdim=True))
        return dx.reshape(dy.shape), (dy * close).sum((0, 2, 3)), dy.sum((0, 2, 3)), None


def approximate(exact, gamma, beta):
    """The paper's quantisation of a normalised value: bins of equal width, an edge where gamma * value + beta is 0."""
    step, half = SPAN[BITS] / 2**BITS, 2 ** (BITS - 1)
    place = -beta / gamma / step
    border = place.round()
    inside = (border > -half) & (border < half)
    origin = torch.where(inside, place - border, 0.0)
    bins = (exact / step - origin).floor()
    positive = (gamma * exact + beta > 0) == (gamma > 0)
    lowest, highest = torch.full_like(border, -half), torch.full_like(border, half - 1)
    # Out of reach, one bin is set aside for the other side of the border.
    lowest = torch.where(border <= -half, 1.0 - half, lowest)
    highest = torch.where(border >= half, half - 2.0, highest)
    assert (positive == (exact / step > place)).all() and ((exact / step > place) | inside | (border >= half)).all()
    return (torch.minimum(torch.maximum(bins, lowest), highest) + 0.5 + origin) * step


class PaperConv(torch.autograd.Function):
    """A convolution of an exact input whose weight gradient reads an approximate one."""

    @staticmethod
    def forward(ctx, x, close, weight, bias, padding):
        ctx.padding = padding
        ctx.save_for_backward(close, weight)
        return F.conv2d(x, weight, bias, padding=padding)

    @staticmethod
    def backward(ctx, dy):
        close, weight = ctx.saved_tensors
        dx = torch.nn.grad.conv2d_input(close.shape, weight, dy, padding=ctx.padding)
        dw = torch.nn.grad.conv2d_weight(close, weight.shape, dy, padding=ctx.padding)
        return dx, None, dw, dy.sum((0, 2, 3)), None


def paper_gradients(model, name, x, upstream):
    close = x
    for number, padding in ((0, 1), (3, 1), (6, 0)):
        x = PaperConv.apply(x, close, model[number].weight, model[number].bias, padding)
        if number < 6:
            x, close = PaperNorm.apply(x, model[number + 1].weight, model[number + 1].bias, name)
            close = torch.where(x > 0, close, 0.0).detach()
            x = x.relu()
    return torch.autograd.grad(x, list(model.parameters()), upstream)


def parameter_gradients(example, model, gradients):
    """The gradients of a graph's primals that are parameters, in the order of the model's."""
    found = []
    for parameter in model.parameters():
        (place,) = [
            i for i, p in enumerate(example.primals) if p.shape == parameter.shape and torch.equal(p, parameter)
        ]
        found.append(gradients[place])
    return found


def test_gradients_are_those_of_the_paper(fixed):
    name, example, job = fixed
    model, upstream = net(NORMS[name][0]), example.tangents()
    _, gradients = run_pair(job.pair, example.primals, upstream)
    (x,) = [p for p in example.primals if p.shape == SHAPE]
    ours = parameter_gradients(example, model, gradients)
    for found, expected in zip(ours, paper_gradients(model, name, x, upstream[0]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_what_does_not_pass_the_variance_is_exact(fixed):
    name, example, job = fixed
    model, upstream = net(NORMS[name][0]), example.tangents()
    results, gradients = run_pair(job.pair, example.primals, upstream)
    expected = run_joint(example.gm, example.primals, upstream)
    torch.testing.assert_close(results, expected[: len(results)], rtol=1e-12, atol=1e-12)
    ours, exact = (parameter_gradients(example, model, found) for found in (gradients, expected[len(results) :]))
    # The last convolution's bias, and through its input gradient and the mask the last norm's: nothing read the codes.
    for number in (7, 9):
        torch.testing.assert_close(ours[number], exact[number], rtol=1e-12, atol=1e-12)
    errors = [(a - e).norm() / e.norm() for a, e in zip(ours, exact, strict=True)]
    assert all(0.001 < errors[number] < 0.3 for number in (0, 2, 4, 6, 8))


def test_running_statistics_have_no_variance_term():
    example_net = net(lambda: nn.BatchNorm2d(8), lambda: nn.LeakyReLU(0.1))
    with torch.no_grad():
        example_net(torch.randn(8, 4, 18, 18, dtype=torch.float64))
    example = trace(example_net.eval(), torch.randn(*SHAPE, dtype=torch.float64))
    job = forced(example, "fixed:2")
    assert sum(codec == "fixed" for codec, _ in held(job).values()) == 2
    upstream = example.tangents()
    results, gradients = run_pair(job.pair, example.primals, upstream)
    expected = run_joint(example.gm, example.primals, upstream)[len(results) :]
    ours, exact = (parameter_gradients(example, example_net, found) for found in (gradients, expected))
    for number, (name, _) in enumerate(example_net.named_parameters()):
        close = number not in (2, 4, 6, 8)  # Weights of norms, and of convolutions behind them.
        assert torch.allclose(ours[number], exact[number], rtol=1e-11, atol=1e-11) == close, name


class Mixed(nn.Module):
    """The network in bfloat16, its activation in place: autograd then asks for the sign of the result."""

    def __init__(self, norm):
        super().__init__()
        self.net = net(norm, lambda: nn.LeakyReLU(0.1, inplace=True)).float()

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x)


@pytest.mark.parametrize("name", ["batch", "group"])
def test_conversions_of_mixed_precision_are_looked_through(name):
    job = forced(trace(Mixed(NORMS[name][0]), torch.randn(SHAPE)), "fixed:4")
    # The cast of the input is no part of a triple.
    assert [codec for codec, _ in held(job).values()] == ["keep", "fixed", "recompute", "fixed", "recompute"]


class Residual(nn.Module):
    """An addition between the norm and the activation, a norm that nothing rectifies, one that SiLU reads."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))

    def forward(self, x):
        first = F.relu(self.norms[0](self.convs[0](x)))
        second = F.relu(self.norms[1](self.convs[1](first)) + first)
        third = self.norms[2](self.convs[2](second))
        return F.silu(self.norms[3](self.convs[3](third)))


def test_what_is_found_and_what_is_legal():
    example = trace(Residual(), torch.randn(4, 4, 16, 16))
    pair = example.pair()
    residuals = find_residuals(pair)
    norms = find_norms(residuals.values())
    assert set(norms) == {"convolution", "convolution_1", "convolution_2", "convolution_3"}
    signed = {name: norm.activation is not None for name, norm in norms.items()}
    assert signed == {"convolution": True, "convolution_1": False, "convolution_2": False, "convolution_3": False}
    job = forced(example, "fixed:4,bitmask")
    codecs = {name: codec for name, (codec, _) in held(job).items()}
    assert codecs["convolution"] == codecs["convolution_1"] == codecs["convolution_2"] == "fixed"
    assert codecs["convolution_3"] == "keep"  # SiLU's derivative is not linear in it.


def test_nothing_is_offered_unless_it_is_named():
    job = traced(NORMS["batch"][0]).planning(mem_budget="100%")
    assert not any(is_fixed(candidate) for row in job.planning.candidates for candidate in row)
