"""Channels-last copies of contiguous inputs: counted where Inductor makes them, and made late by the pass."""

from __future__ import annotations

import contextlib

import pytest
import torch
from helpers.tracing import trace
from torch import nn

from xconv_fx import hooks
from xconv_fx.compiler import pipeline
from xconv_fx.passes.graph import output_node
from xconv_fx.passes.late_layout import late_layout, layout_copies, relaid_operands

WEIGHTS = (3 * 8 + 8 * 8) * 9 * 4
IMAGE = 2 * 3 * 16 * 16 * 4


def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))


def pair_of(x, late, model=None):
    with contextlib.nullcontext() if late else pipeline.without("late_layout"):
        return trace(model or net(), x).pair()


def clones(graph):
    """The copies of the images."""
    found = [node for node in graph.nodes if node.target is torch.ops.aten.clone.default]
    return [node for node in found if node.meta["val"].shape[:2] == (2, 3)]


def test_inductor_copies_weights_and_contiguous_images():
    assert layout_copies(pair_of(torch.randn(2, 3, 16, 16), late=False).forward) == WEIGHTS + IMAGE
    images = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    assert layout_copies(pair_of(images, late=False).forward) == WEIGHTS
    volume = pair_of(torch.randn(1, 3, 8, 8, 8), late=False, model=nn.Conv3d(3, 8, 3))
    assert layout_copies(volume.forward) == 0


def test_images_are_copied_where_they_are_read_and_saved_as_a_view():
    pair = pair_of(torch.randn(2, 3, 16, 16), late=True)
    assert layout_copies(pair.forward) == WEIGHTS
    for half in (pair.forward, pair.backward):
        (copy,) = clones(half.graph)
        assert copy.meta["val"].is_contiguous(memory_format=torch.channels_last)
        (reader,) = copy.users
        assert copy.next is reader
    saved = {name: node for name, (node, _) in pair.saved().items()}
    (matrix,) = (node for node in saved.values() if node.meta["val"].shape == (2, 3 * 16 * 16))
    assert matrix.all_input_nodes[0].op == "placeholder"
    assert not any(node.op == "placeholder" and len(node.meta["val"].shape) == 4 and node.meta["val"].shape[0] == 2
                   for node in output_node(pair.forward.graph).all_input_nodes)  # fmt: skip
    assert all(name not in pair.residuals() for name in saved if "matrix" in name)


@pytest.mark.parametrize("size", [(2, 1, 16, 16), (2, 3, 1, 1)])
def test_images_that_lie_both_ways_are_left(size):
    pair = pair_of(torch.randn(size), late=True, model=nn.Conv2d(size[1], 8, 3, padding=1))
    assert not clones(pair.forward.graph) and relaid_operands(pair.forward, 0) == []


def test_a_view_of_a_larger_image_is_left_to_inductor():
    pair = pair_of(torch.randn(2, 3, 16, 32)[..., ::2], late=False)
    before = layout_copies(pair.forward)
    late_layout(pair)
    assert layout_copies(pair.forward) == before


def test_images_of_one_channel_are_seen_channels_last():
    """Without a copy; ATen, which goes by strides, would lay out the result contiguous, and copy its gradient."""
    pair = pair_of(torch.randn(2, 1, 16, 12), late=True, model=nn.Conv2d(1, 8, 3, padding=1))
    for half, place, target in (
        (pair.forward, 0, torch.ops.aten.convolution.default),
        (pair.backward, 1, torch.ops.aten.convolution_backward.default),
    ):
        for node in half.graph.find_nodes(op="call_function", target=target):
            view = node.args[place]
            assert view.target is torch.ops.aten.as_strided.default and view.meta["val"].stride() == (192, 1, 12, 1)
            assert view.all_input_nodes[0].op == "placeholder"


def test_results_lie_as_they_were_traced():
    """Whoever takes a view of a result, AOTAutograd for one that the model returns as well, counts on it."""

    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.body(x)
            return y, y.view(y.size(0), -1)

    pair = pair_of(torch.randn(2, 3, 16, 16), late=True, model=Viewed())
    result = output_node(pair.forward.graph).args[0][0]
    assert result.target is torch.ops.aten.clone.default and result.meta["val"].is_contiguous()
    model, x = Viewed(), torch.randn(4, 3, 24, 24)
    expected = model(x)
    torch._dynamo.reset()
    step = torch.compile(model, backend="xconv", options={"mem_budget": "95%", "codecs": "exact", "verify": "off"})
    found = step(x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
        assert one.is_contiguous()
    (found[0].sum() + found[1].square().mean()).backward()


RESULTS = {
    "view": lambda y: (y, y.view(y.size(0), -1)),
    "tokens": lambda y: y.flatten(2),
    "computed tokens": lambda y: (lambda z: (z, z.view(z.size(0), 2, -1)))(y.flatten(2) + 1),
    "permuted": lambda y: (y.permute(0, 2, 3, 1), y.flatten(2).transpose(1, 2) * 2),
    "chunks": lambda y: y.chunk(2, 1),
    "slice": lambda y: y[:, :2],
    "kept": lambda y: (y, y.relu()),
}


class Returning(nn.Module):
    def __init__(self, channels: int, results: str) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1)
        )
        self.results = RESULTS[results]

    def forward(self, x: torch.Tensor):
        found = self.results(self.body(x).tanh())
        return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("results", RESULTS)
@pytest.mark.parametrize("channels", [1, 3])
def test_results_of_any_form_lie_as_they_were_traced(channels, results):
    """By what Inductor finds when it runs the rewritten graph on fakes."""
    pair = pair_of(torch.randn(2, channels, 16, 16), late=False, model=Returning(channels, results))
    expected = [node.meta["val"].stride() for node in output_node(pair.forward.graph).args[0][: pair.results]]
    late_layout(pair)
    found = strides_on_fakes(pair.forward)[: pair.results]
    assert found == expected


def strides_on_fakes(gm):
    inputs = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    with hooks.trying_fake(inputs):
        return [value.stride() for value in torch.fx.Interpreter(gm).run(*inputs) if isinstance(value, torch.Tensor)]


def test_a_caller_who_overwrites_an_image_before_the_backward_is_told():
    """The saved matrix is the image to autograd; Inductor alone saves a copy."""
    torch._dynamo.reset()
    x = torch.randn(2, 3, 16, 16)
    options = {"mem_budget": "1GB", "slices": 1, "probes": 8, "verify": "off"}
    result = torch.compile(net(), backend="xconv", options=options)(x)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()
