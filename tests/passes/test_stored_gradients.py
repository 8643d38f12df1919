"""Sums of gradients in memory of their own."""

from __future__ import annotations

import torch
from helpers.tracing import run_pair, trace
from torch import Tensor, nn

import xconv_fx
from xconv_fx.compiler.pipeline import without
from xconv_fx.errors import BudgetInfeasibleError
from xconv_fx.measure import training_peak
from xconv_fx.passes.graph import output_node
from xconv_fx.passes.liveness import timeline
from xconv_fx.passes.stored_gradients import store_gradients, sums

# Doubles: a ReLU whose argument rounds to the other side of zero is another network.
X = torch.randn(4, 8, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
BLOCKS = 6


class Block(nn.Module):
    """A residual block: a normalisation reads the gradient of its result in reductions and in a loop."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(*sizes, 1, bias=False) for sizes in ((8, 4), (4, 8))]
        self.body = nn.Sequential(convolutions[0], nn.BatchNorm2d(4), nn.ReLU(), convolutions[1])
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.body(x)))


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(8, 8, 1), *(Block() for _ in range(BLOCKS)), nn.Conv2d(8, 2, 1)).double()


def stored(graph: torch.fx.Graph) -> int:
    return len(graph.find_nodes(op="call_function", target=torch.ops.xconv.stored.default))


def gradients(model: nn.Module, call: nn.Module) -> list[Tensor]:
    model.zero_grad()
    call(X).square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_of_a_stage_one_gradient_stays():
    traced = trace(net(), X)
    pair, plain = traced.pair(), traced.pair()
    assert list(sums(pair.backward.graph))
    store_gradients(pair.backward.graph)
    pair.backward.graph.lint()
    pair.backward.recompile()
    # A sum at the end of every block but the last, whose gradient comes from one convolution alone.
    assert stored(pair.backward.graph) == BLOCKS - 1
    before, after = (max(timeline(one.backward.graph).profile()) for one in (plain, pair))
    assert after <= before - X.nbytes
    for tangents in (traced.tangents(0), traced.tangents(1)):
        results = [run_pair(one, traced.primals, tangents)[1] for one in (plain, pair)]
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True) if mine is not None)


def test_nothing_is_stored_that_frees_no_more_than_it_takes():
    """A chain has no sums; and where a term is read again later, it stays anyway."""
    torch.manual_seed(1)
    layers = (nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    chain = nn.Sequential(*layers).double()
    pair = trace(chain, X).pair()
    assert not list(sums(pair.backward.graph))
    before = [node.name for node in pair.backward.graph.nodes]
    store_gradients(pair.backward.graph)
    assert [node.name for node in pair.backward.graph.nodes] == before

    def returned(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        # The gradients of x and of its sine are terms of no sum that dies: x's is returned, as is y's.
        return x.sin() * y, x.cos() + y

    pair = trace(returned, X.clone().requires_grad_(), X.clone().requires_grad_()).pair()
    store_gradients(pair.backward.graph)
    assert all(
        node.target is not torch.ops.xconv.stored.default for node in output_node(pair.backward.graph).all_input_nodes
    )


def lowest(model: nn.Module) -> int:
    torch._dynamo.reset()
    try:
        torch.compile(model, backend="xconv", options={"mem_budget": 1, "codecs": "exact", "slices": 1})(X)
    except BudgetInfeasibleError as error:
        return error.smallest
    raise AssertionError("one byte is enough")


def test_the_lowest_budget_has_them_and_its_gradients_are_right(tmp_path):
    model = net()
    expected = gradients(model, model)
    with without("stored_gradients"):
        inlined = lowest(model)
    smallest = lowest(model)
    assert smallest < inlined
    torch._dynamo.reset()
    report = tmp_path / "plan.json"
    options = {"mem_budget": smallest, "codecs": "exact", "slices": 1, "report": report}
    call = torch.compile(model, backend="xconv", options=options)
    for _ in range(2):
        for mine, theirs in zip(gradients(model, call), expected, strict=True):
            assert (mine - theirs).norm() <= 1e-10 * max(theirs.norm(), 1e-3)
    (plan,) = xconv_fx.plans(call)
    assert plan.store_gradients and plan.audited_peak <= smallest
    model.zero_grad(set_to_none=True)
    assert training_peak(call, X, lambda out: out.square().mean()).bytes <= smallest
    # The same plan from its file.
    torch._dynamo.reset()
    again = torch.compile(model, backend="xconv", options={"plan": report, "codecs": "exact"})
    gradients(model, again)
    (second,) = xconv_fx.plans(again)
    assert second.store_gradients and second.audited_peak == plan.audited_peak
