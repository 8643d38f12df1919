"""Concatenations in memory of their own: which parts are copied. What it saves: tests/end_to_end/test_segments.py."""

from __future__ import annotations

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from xconv_fx.passes.own_concatenations import own_concatenations

aten, xconv = torch.ops.aten, torch.ops.xconv


def rewritten(function, *shapes):
    gm = make_fx(function)(*(torch.randn(shape) for shape in shapes))
    own_concatenations(gm.graph)
    gm.recompile()
    return gm


def copied(gm):
    return [node.args[0].target for node in gm.graph.find_nodes(op="call_function", target=xconv.apart.default)]


def test_what_others_read_is_copied_and_the_rest_is_made_in_its_place():
    gm = rewritten(lambda x, y: (torch.cat((x.sin(), s := y.cos()), 1), s.exp()), (2, 3), (2, 4))
    assert copied(gm) == [aten.cos.default]
    x, y = torch.randn(2, 3), torch.randn(2, 4)
    assert torch.equal(gm(x, y)[0], torch.cat((x.sin(), y.cos()), 1))


def test_a_result_is_read_by_the_caller():
    assert copied(rewritten(lambda x: ((s := x.sin()), torch.cat((s, x.cos()), 1)), (2, 3))) == [aten.sin.default]


def test_what_stands_twice_is_copied_twice():
    assert copied(rewritten(lambda x: torch.cat((s := x.sin(), s), 1), (2, 3))) == [aten.sin.default] * 2
