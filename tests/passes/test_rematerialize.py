"""Chains that replay a residual: what they consist of, what they refuse, and when they are affine."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.tracing import trace
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from xconv_fx.device.workspace import node_workspace
from xconv_fx.passes.graph import nbytes
from xconv_fx.passes.rematerialize import (
    LONGEST,
    MOST_RERUN,
    MOST_RERUN_IN_BLOCK,
    find_block,
    find_recompute_subgraph,
)
from xconv_fx.passes.step_time import node_flops

aten = torch.ops.aten
SHAPE = (2, 8, 16, 16)


def forward(function, *shapes):
    """Nodes of a traced forward by name; its inputs are named as primals are, and "saved" as a value that crosses."""
    gm = make_fx(function, tracing_mode="fake")(*(torch.randn(shape) for shape in shapes))
    return {node.name: node for node in gm.graph.nodes}


def last(nodes):
    return nodes["output"].args[0]


def test_an_affine_chain_to_a_saved_value():
    nodes = forward(lambda saved, primals_1: torch.relu(saved.sin() * primals_1 + 1), SHAPE, (8, 1, 1))
    # The placeholders get numbers: what is saved is named here.
    chain = find_recompute_subgraph(last(nodes), {"sin"})
    assert chain is not None
    assert [node.target for node in chain.nodes] == [aten.mul.Tensor, aten.add.Tensor, aten.relu.default]
    assert chain.sources == ("sin",)
    assert [node.name for node in chain.extras] == ["primals_1_1"]
    assert chain.masks == (chain.nodes[-1],)
    assert chain.extra_bytes == 0, "parameters are alive anyway"
    assert chain.traffic == (2 * 4096 + 8) * 4
    assert [node.name for node in chain.inputs] == ["sin", "primals_1_1"]


def test_statistics_are_saved_and_large_values_are_not():
    def normalise(x):
        y = x.sin()
        return (y - y.mean((0, 2, 3), keepdim=True)) * y.cos()

    nodes = forward(normalise, SHAPE)
    chain = find_recompute_subgraph(last(nodes), {"sin"})
    assert chain is not None
    assert {node.name for node in chain.extras} == {"mean"}
    assert chain.extra_bytes == 8 * 4
    assert {"cos", "sub", "mul"} == {node.name for node in chain.nodes}


def many_convolutions(x, weight, count):
    for _ in range(count):
        x = F.conv2d(x, weight) + 1
    return x


CONVOLUTION = aten.convolution.default
RERUN = {
    "convolution": (lambda x, primals_1: F.conv2d(x.sin(), primals_1) + 1, (8, 8, 1, 1), [CONVOLUTION]),
    "matrix product": (lambda x, primals_1: x[0, 0].sin() @ primals_1 + 1, (16, 16), [aten.mm.default]),
    "joined": (lambda x, primals_1: torch.cat((F.conv2d(s := x.sin(), primals_1), s), 1), (8, 8, 1, 1), [CONVOLUTION]),
    "a few": (lambda x, primals_1: many_convolutions(x.sin(), primals_1, 3), (8, 8, 1, 1), [CONVOLUTION] * 3),
}


@pytest.mark.parametrize("case", RERUN)
def test_kernels_of_libraries_are_run_again(case):
    function, weight, expected = RERUN[case]
    chain = find_recompute_subgraph(last(forward(function, SHAPE, weight)), {"sin"})
    assert chain is not None and chain.reruns and chain.sources == ("sin",)
    assert [node.target for node in chain.rerun] == expected
    assert chain.flops == sum(map(node_flops, chain.rerun)) > 0
    # What is on the way to the result passes through memory.
    assert chain.between == sum(nbytes(node) for node in chain.rerun)
    assert chain.scratch == max(map(node_workspace, chain.rerun))


def test_at_most_a_few_of_them():
    nodes = forward(lambda x, primals_1: many_convolutions(x.sin(), primals_1, MOST_RERUN + 1), SHAPE, (8, 8, 1, 1))
    assert find_recompute_subgraph(last(nodes), {"sin"}) is None


REFUSED = {
    "random": lambda x: F.dropout(x.sin(), 0.5) + 1,
    "large reduction": lambda x: x.sin().cumsum(0) + 1,
    "an input of the forward": lambda x: x + 1,
    "too long": lambda x: [x := x.sin() + 1 for _ in range(LONGEST)][-1],
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    nodes = forward(REFUSED[case], SHAPE)
    saved = {"sin"} if case != "too long" else set()
    assert find_recompute_subgraph(last(nodes), saved) is None


MASKS = {
    "affine": (lambda y: 2 * y - 1, []),
    "relu": (lambda y: torch.relu(y), ["relu"]),
    "leaky relu": (lambda y: torch.where(y > 0, y, 0.1 * y), ["gt"]),
    "upsampled and joined": (lambda y: torch.cat((y, y), 1), []),
    "ratio": (lambda y: y / 3, []),
}
NOT_AFFINE = {
    "square": lambda y: y * y,
    "sigmoid": lambda y: torch.sigmoid(y),
    "divisor": lambda y: 1 / y,
    "clamp": lambda y: y.clamp(0, 6),
}


@pytest.mark.parametrize("case", MASKS)
def test_masks_that_make_a_chain_affine(case):
    function, expected = MASKS[case]
    chain = find_recompute_subgraph(last(forward(lambda x: function(x.sin()), SHAPE)), {"sin"})
    assert chain is not None and chain.masks is not None
    assert [node.name for node in chain.masks] == expected


@pytest.mark.parametrize("case", NOT_AFFINE)
def test_other_chains_replay_only_exact_sources(case):
    chain = find_recompute_subgraph(last(forward(lambda x: NOT_AFFINE[case](x.sin()), SHAPE)), {"sin"})
    assert chain is not None and chain.masks is None


def values_of(traced, pair):
    """Every value of the pair's forward, by node."""
    values: dict[fx.Node, torch.Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n):
            values[n] = super().run_node(n)
            return values[n]

    with torch.no_grad():
        Recorder(pair.forward, garbage_collect_values=False).run(*traced.primals)
    return values


def replayed(chain, values):
    """What the chain computes from these values of its inputs."""
    found = {node: values[node] for node in chain.inputs}
    for node in chain.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: found[arg])
        found[node] = node.target(*args, **kwargs)
    return found[chain.nodes[-1]]


def test_a_chain_computes_its_residual():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)).double()
    traced = trace(model, torch.randn(2, 3, 16, 16, dtype=torch.float64))
    pair = traced.pair()
    relu = pair.residuals()["relu"][0]
    chain = find_recompute_subgraph(relu, set(pair.saved()) - {"relu"})
    assert chain is not None and chain.sources == ("convolution",)

    values = values_of(traced, pair)
    assert torch.equal(replayed(chain, values), values[relu])


class Residual(nn.Module):
    """A sum behind some convolutions and a dropout in training."""

    def __init__(self, convolutions, dropout=0.0):
        super().__init__()
        pairs = ((nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(convolutions))
        self.body, self.dropout = nn.Sequential(*(layer for pair in pairs for layer in pair)), dropout

    def forward(self, x):
        return torch.relu(x + F.dropout(self.body(x), self.dropout, self.dropout > 0))


def blocks_of(*layers):
    """The pair of a net, and its blocks by the residual that ends one."""
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), *layers, nn.Conv2d(8, 2, 1)).double()
    traced = trace(net, torch.randn(2, 3, 16, 16, dtype=torch.float64))
    pair = traced.pair()
    saved = {name: forward for name, (forward, _) in pair.saved().items()}
    residuals = {name: forward for name, (forward, _) in pair.residuals().items()}
    chains = {name: find_recompute_subgraph(node, set(saved) - {name}) for name, node in residuals.items()}
    found = {name: find_block(chain, saved) for name, chain in chains.items() if chain is not None}
    return traced, pair, {name: block for name, block in found.items() if block is not None}


def test_a_block_is_made_of_its_input():
    traced, pair, blocks = blocks_of(Residual(2), Residual(2))
    # The sum of one block is what the next begins with.
    assert {name: block.sources for name, block in blocks.items()} == {"relu_3": ("relu",), "relu_6": ("relu_3",)}
    values = values_of(traced, pair)
    for block in blocks.values():
        assert len(block.rerun) == 2
        torch.testing.assert_close(replayed(block, values), values[block.nodes[-1]])


def test_what_is_no_block():
    """A chain has the nearest residual alone as its source; draws, and too many convolutions, are not run again."""
    chain = (nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    for layers in (chain, (Residual(2, 0.5),), (Residual(MOST_RERUN_IN_BLOCK + 1),)):
        assert not blocks_of(*layers)[2]
    assert blocks_of(Residual(MOST_RERUN_IN_BLOCK))[2]
