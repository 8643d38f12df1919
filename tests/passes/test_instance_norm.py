"""Instance normalisation in the activation's own shape: torch's numbers, and which calls are rewritten."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from xconv_fx.passes.instance_norm import instance_norm, reshape_free_instance_norm


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 11), (2, 3, 5, 7), (2, 3, 4, 5, 3), (1, 1, 2, 2)], ids=str)
def test_values_and_gradients_are_torchs(shape, affine):
    def run(function):
        x = values.clone().requires_grad_()
        weight, bias = (p.clone().requires_grad_() for p in parameters) if affine else (None, None)
        y = function(x, weight=weight, bias=bias, eps=1e-3)
        y.backward(upstream)
        return [y, x.grad, *((weight.grad, bias.grad) if affine else ())]

    values, upstream = torch.randn(shape, dtype=torch.float64) * 3 + 2, torch.randn(shape, dtype=torch.float64)
    parameters = torch.randn(2, shape[1], dtype=torch.float64)
    for ours, theirs in zip(run(instance_norm), run(F.instance_norm), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_short_types_are_taken_in_float32(dtype):
    x = (torch.randn(2, 4, 16, 16) + 30).to(dtype)
    ours = instance_norm(x)
    assert ours.dtype == dtype
    # Exactly rounded from float32, except where two ways of summing differ by an ulp of float32 at a tie.
    reference = F.instance_norm(x.float())
    torch.testing.assert_close(ours.float(), reference, rtol=torch.finfo(dtype).eps, atol=1e-5)


def dynamo_graph(model, *inputs):
    """The graph that Dynamo hands to a backend, and what it is called with."""
    found = []

    def backend(gm, example_inputs):
        def run(*arguments):
            found.extend((gm, arguments))
            return gm(*arguments)

        return run

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    return found


def calls(gm):
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


X = (2, 3, 6, 6)


@pytest.mark.parametrize(
    "model",
    [
        nn.InstanceNorm2d(3),
        nn.InstanceNorm2d(3, affine=True).eval(),
        lambda x: F.instance_norm(x, eps=0.1),
        lambda x: F.instance_norm(input=x, weight=torch.ones(3), bias=torch.zeros(3)),
        lambda x: torch.instance_norm(x, None, None, None, None, True, 0.1, 1e-5, False),
    ],
    ids=["module", "affine, eval", "function", "keywords", "positional"],
)
def test_calls_without_statistics_are_rewritten(model):
    x = torch.randn(X)
    gm, arguments = dynamo_graph(model, x)
    before = gm(*arguments)
    reshape_free_instance_norm(gm)
    gm.graph.lint()
    assert instance_norm in calls(gm)
    assert not any("instance_norm" in str(target) for target in calls(gm) if target is not instance_norm)
    torch.testing.assert_close(gm(*arguments), before)


@pytest.mark.parametrize(
    "model",
    [nn.InstanceNorm2d(3, track_running_stats=True), nn.BatchNorm2d(3), nn.ReLU()],
    ids=["running statistics", "batch norm", "no norm"],
)
def test_nothing_to_do(model):
    gm, _ = dynamo_graph(model, torch.randn(X))
    before = gm.code
    reshape_free_instance_norm(gm)
    assert gm.code == before
