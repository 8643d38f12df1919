"""Interpolation's backward is one gather for each call, its forward torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import tracing
from helpers.tracing import run_joint, targets, trace
from torch import fx, nn
from torch.nn import functional as F

from xconv_fx.passes.graph import is_tangent, layer_of
from xconv_fx.passes.liveness import timeline
from xconv_fx.passes.sample_dims import SampleDims, Shared
from xconv_fx.passes.shared_values import shared_value

GATHER, SCATTERS = "xconv.interpolate_backward.default", ("index_put", "scatter")


class Resized(nn.Module):
    """A convolution, an interpolation (dims, arguments) and another convolution."""

    def __init__(self, dims=2, **arguments):
        super().__init__()
        layer = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.first, self.last = layer(2, 3, 3, padding=1), layer(3, 2, 3, padding=1)
        self.resize = nn.Upsample(**arguments)

    def forward(self, x):
        return self.last(self.resize(self.first(x).relu()))


CASES = {
    "nearest": (1, {"scale_factor": 2}),
    "nearest-exact": (2, {"scale_factor": 1.5, "mode": "nearest-exact"}),
    "size": (3, {"size": (7, 5, 8)}),
    "linear": (1, {"scale_factor": 2, "mode": "linear"}),
    "bilinear, aligned": (2, {"scale_factor": 2.0, "mode": "bilinear", "align_corners": True}),
    "recomputed": (2, {"scale_factor": 1.7, "mode": "bilinear", "recompute_scale_factor": True}),
    "as given": (2, {"scale_factor": 1.7, "mode": "bilinear"}),
    "trilinear": (3, {"scale_factor": 2, "mode": "trilinear"}),
    "bicubic": (2, {"scale_factor": 2, "mode": "bicubic"}),
}


def model_of(case):
    dims, arguments = CASES[case]
    return Resized(dims, **arguments).double(), torch.randn(2, 2, *(6, 5, 4)[:dims], dtype=torch.float64)


@pytest.fixture
def without(monkeypatch):
    """Traces without the pass."""

    def traced(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(tracing, "gather_interpolation", lambda gm: None)
            return trace(*arguments)

    return traced


def forward_of(graph):
    """Operations before the first incoming gradient, in order; the values that are returned besides."""
    nodes = [node for node in graph.nodes if node.meta.get("partitioner_tag") == "is_forward"]
    return [(str(node.target), str(node.args)) for node in nodes if not is_tangent(node)]


@pytest.mark.parametrize("case", CASES)
def test_gathered_gradients_are_autograds_and_the_forward_is_torchs(case, without):
    model, x = model_of(case)
    traced, plain = trace(model, x), without(model, x)
    assert targets(traced.gm.graph).count(GATHER) == 1 and GATHER not in targets(plain.gm.graph)
    assert not any(word in name for name in targets(traced.gm.graph) for word in SCATTERS)
    assert forward_of(traced.gm.graph) == forward_of(plain.gm.graph)
    expected = run_joint(plain.gm, plain.primals, plain.tangents())
    for one, other in zip(run_joint(traced.gm, traced.primals, traced.tangents()), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_gather_belongs_to_its_layer():
    graph = trace(*model_of("trilinear")).gm.graph
    (gather,) = (node for node in graph.nodes if str(node.target) == GATHER)
    assert layer_of(gather) == "resize" and gather.meta["partitioner_tag"] == "is_backward"
    reads = [node for node in graph.nodes if "_unsafe_index" in str(node.target)]
    assert {node.meta["seq_nr"] for node in reads} == {gather.meta["seq_nr"]}


def resized_twice(x):
    return F.interpolate(F.interpolate(x.tanh(), None, 2.0), size=9, mode="bilinear")


def test_functions_are_found_whatever_their_arguments():
    graph = trace(resized_twice, torch.randn(2, 3, 4, 5, requires_grad=True)).gm.graph
    assert targets(graph).count(GATHER) == 2


KEPT = {
    "area": lambda x: F.interpolate(x.tanh(), scale_factor=2, mode="area").tanh(),
    "antialias": lambda x: F.interpolate(x.tanh(), scale_factor=0.5, mode="bilinear", antialias=True).tanh(),
    "no gradient": lambda x: F.interpolate(x.detach(), scale_factor=2) * x.sum(),
    "per sample": lambda x: torch.func.vmap(lambda y: F.interpolate(y[None], scale_factor=2)[0])(x.tanh()),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_stays_as_it_is(case):
    assert GATHER not in targets(trace(KEPT[case], torch.randn(2, 3, 8, 8, requires_grad=True)).gm.graph)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("options", [{"mem_budget": "90%", "codecs": "exact"}, {"slices": 2}], ids=str)
@pytest.mark.parametrize("case", ["bilinear, aligned", "trilinear", "nearest-exact"])
def test_compiled_networks_train_as_eager_ones(case, options, last):
    torch.manual_seed(0)
    dims, arguments = CASES[case]
    net, x = Resized(dims, **arguments), torch.randn(4, 2, *(8, 10, 6)[:dims])
    if last:
        x = x.contiguous(memory_format={2: torch.channels_last, 3: torch.channels_last_3d}[dims])
    mine = copy.deepcopy(net)
    net(x).square().mean().backward()
    torch.compile(mine, backend="xconv", options=options)(x).square().mean().backward()
    for expected, found in zip(net.parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("fresh_dynamo")
def test_autocast_gradients_have_the_inputs_dtype():
    net, x = Resized(scale_factor=2, mode="bilinear"), torch.randn(2, 2, 8, 8)
    mine = copy.deepcopy(net)
    for model in (net, torch.compile(mine, backend="xconv", options={"mem_budget": "100%", "codecs": "exact"})):
        with torch.autocast("cpu", torch.bfloat16):
            model(x).square().mean().backward()
    for expected, found in zip(net.parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=0.05, atol=0.01)


def test_the_backward_is_smaller(without):
    """Eight scatters of a volume, and what is added up of them, or its gradient and that of what is interpolated."""
    net, x = Resized(3, scale_factor=2, mode="trilinear"), torch.randn(1, 2, 16, 16, 16)

    def buffers(traced):
        line = timeline(traced.pair().backward.graph)
        return max(total - work for total, work in zip(line.profile(), line.workspace, strict=True))

    volume = 4 * 3 * 32**3
    gathered, scattered = (buffers(tracer(net, x)) for tracer in (trace, without))
    assert gathered < 1.3 * volume and scattered > 8 * volume


def test_positions_are_read_inside_a_kernel():
    """What a trilinear interpolation reads of its input is stored nowhere."""
    net, x = Resized(3, scale_factor=2, mode="trilinear"), torch.randn(1, 2, 16, 16, 16)
    stored = [buffer.node for buffer in timeline(trace(net, x).pair().forward.graph).buffers]
    assert not [node for node in stored if "_unsafe_index" in str(node.target)]


def test_what_is_read_at_positions_is_not_taken_for_constant():
    """Rows of a table, each read by another number: nothing is the same for all samples, though no dim lines up."""
    graph = fx.Graph()
    table, numbers = graph.placeholder("table"), graph.placeholder("numbers")
    rows = graph.call_function(torch.ops.aten._unsafe_index.Tensor, (table, [numbers]))
    table.meta["val"], numbers.meta["val"] = torch.zeros(4, 3), torch.zeros(5, 2, dtype=torch.int64)
    rows.meta["val"] = torch.zeros(5, 2, 3)
    dims = SampleDims({}, 5)
    dims.found.update({table: Shared(), numbers: Shared()})
    assert shared_value(dims, rows) == Shared()
