"""Random draws in joint graphs: made once whatever torch's partitioner is asked to save, and never taken for equal."""

from __future__ import annotations

import pytest
import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from helpers.tracing import Traced, run_pair, trace
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from xconv_fx import hooks
from xconv_fx.hooks import aot
from xconv_fx.hooks.inductor_prims import prims
from xconv_fx.passes.partition import Pair


class Draws(nn.Module):
    """Draws of several operators, each multiplied with an activation that asks for a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(7))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third, fourth, fifth, sixth, last = self.convolutions
        x = first(x)
        y = F.rrelu(x, training=True) + F.rrelu(x, training=True)
        y = second(y) * torch.empty(len(x), 1, 1, 1).bernoulli_(0.7)
        y = third(y) * torch.normal(torch.zeros(len(x), 1, 1, 1), 1.0)
        y = F.dropout2d(fourth(y)) * torch.poisson(x.detach().abs())
        y = fifth(y) * (torch.rand(y.shape) > 0.5)
        y = sixth(y)[:, torch.randperm(4)]
        return last(y * torch.randn_like(y))


@pytest.fixture(scope="module")
def traced():
    return trace(Draws(), torch.randn(3, 4, 8, 8))


def names(graph: fx.Graph) -> list[str]:
    return sorted(str(node.target) for node in graph.nodes if aot.draws(node))


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25, 0.0])
def test_draws_stay_in_the_forward(traced, share):
    joint = traced.joint()
    every = names(joint.graph)
    # torch 2.14 draws what is uniform or normal as `torch.rand` does: Inductor's kernels, from seeds drawn at once.
    (seeds,) = joint.graph.find_nodes(op="call_function", target=prims.inductor_seeds.default)
    from_seeds = {"aten.uniform.default", "prims.normal.default"} - set(every)
    assert len(seeds.users) == 2 + ("aten.uniform.default" in from_seeds) * 2 + ("prims.normal.default" in from_seeds)
    assert every == sorted(
        name
        for name in ["aten.uniform.default"] * 2 + ["aten.bernoulli.p"] * 2
        + ["aten.poisson.default", "aten.randperm.default", "prims.inductor_seeds.default", "prims.normal.default"]
        if name not in from_seeds
    )  # fmt: skip
    with functorch_config.patch(activation_memory_budget=share):
        aot.deduplicate(joint)
        forward, backward = aot.partition(joint, traced.joint_inputs, dict(traced.arguments), 1.0)
    assert names(forward.graph) == every
    assert names(backward.graph) == []


class DrawsWithResults(nn.Module):
    """Operators that give a result and what they drew for it, as they are where Inductor draws as ATen does."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.convolutions
        y = F.rrelu(F.gelu(first(x)), training=True)
        return third(F.dropout(F.silu(second(y)), 0.3)).square()


@pytest.mark.parametrize("share", [1.0, 0.75, 0.5, 0.25, 0.0])
def test_draws_with_several_results_stay_in_the_forward(share):
    with torch._inductor.config.patch(fallback_random=True):
        traced = trace(DrawsWithResults(), torch.randn(3, 4, 8, 8))
        joint = traced.joint()
        every = names(joint.graph)
        # torch 2.12 decomposes this one nevertheless.
        whole = torch.ops.aten.rrelu_with_noise_functional.default
        drawn = "aten.uniform.default" if whole in hooks.decompositions() else str(whole)
        assert every == ["aten.native_dropout.default", drawn]
        aot.deduplicate(joint)
        forward, backward = aot.partition(joint, traced.joint_inputs, dict(traced.arguments), share)
    assert names(forward.graph) == every
    assert names(backward.graph) == []


def test_equal_calls_are_draws_of_their_own():
    graph = fx.Graph()
    x = graph.placeholder("x")
    draws = [graph.call_function(torch.ops.aten.exponential.default, (x,)) for _ in range(2)]
    graph.output(graph.call_function(torch.ops.aten.sub.Tensor, tuple(draws)))
    gm = fx.GraphModule({}, graph)
    aot.deduplicate(gm)
    assert names(gm.graph) == ["aten.exponential.default"] * 2


def test_attention_without_dropout_draws_nothing():
    graph = fx.Graph()
    q = graph.placeholder("q")
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    assert [aot.draws(graph.call_function(attention, (q, q, q, p))) for p in (0.0, 0.1)] == [False, True]


def test_what_the_user_checkpoints_is_drawn_again_from_the_same_state():
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    model = Checkpointed(nn.Conv2d(4, 4, 3), nn.Dropout2d(), nn.Conv2d(4, 4, 3), nn.SiLU())
    traced = trace(model, torch.randn(2, 4, 8, 8))
    joint = traced.joint()
    aot.deduplicate(joint)
    mode = torch._guards.detect_fake_mode(list(traced.joint_inputs))
    with torch._guards.tracing(torch._guards.TracingContext(mode)):
        forward, backward = aot.partition(joint, traced.joint_inputs, dict(traced.arguments), 1.0)
    assert any("run_and_save_rng_state" in str(node.target) for node in forward.graph.nodes)
    assert any("run_with_rng_state" in str(node.target) for node in backward.graph.nodes)


class Counter(nn.Module):
    """A counter and an average of weights, both read before and after they are changed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.register_buffer("steps", torch.zeros(1))
        self.register_buffer("average", torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        y = F.silu(self.first(x) * (self.average * 1.5)) / (1 + 0.1 * self.steps)
        self.average.mul_(0.9).add_(0.1 * self.first.weight.detach().mean((1, 2, 3))[:, None, None])
        return self.second(y * (self.average * 2))


class Normalises(nn.Module):
    """The input, which is changed in place, is read before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        before = self.first(x * 2)
        x.sub_(0.45).div_(0.225)
        x[:, 0].mul_(0.5)
        return self.second(F.silu(self.first(x).exp() + before))


class ReadsACopy(nn.Module):
    """The backward reads what a buffer was before it changed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("scale", torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) * self.scale.clone()
        self.scale.mul_(3)
        return y


@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize("model", [Counter, Normalises, ReadsACopy])
def test_the_backward_reads_what_the_forward_found(model, share):
    traced: Traced = trace(model(), torch.randn(2, 3, 8, 8))
    joint = traced.joint()
    aot.deduplicate(joint)
    halves = aot.partition(joint, traced.joint_inputs, dict(traced.arguments), share)
    # The parameters ask for gradients; of what is changed everyone gets a copy.
    asked = [value.requires_grad for value in traced.example_inputs]
    mine = [value.clone() for value in traced.primals]
    theirs = [value.clone().requires_grad_(asks) for value, asks in zip(traced.primals, asked, strict=True)]
    results, gradients = run_pair(Pair(*halves, traced.arguments["num_fwd_outputs"]), mine, traced.tangents())
    (wanted,) = traced.dynamo(*theirs)
    wanted.backward(traced.tangents()[0])
    torch.testing.assert_close(results[0], wanted.detach())
    for gradient, leaf in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-4, atol=1e-5)
    for value, changed in zip(mine, theirs, strict=True):
        torch.testing.assert_close(value, changed.detach())
