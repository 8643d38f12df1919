"""Families of codecs: what is added to the table of codecs, and offered by a family, is planned and written in."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.tracing import run_joint, run_pair, trace
from torch import nn

from xconv_fx.codec_spec import CodecSpec
from xconv_fx.ops import codec as table
from xconv_fx.ops.codec import Codec, register
from xconv_fx.planner import storage
from xconv_fx.planner.storage import Family, families

# The example of CONTRIBUTING.md: a lossless codec for values that are whole numbers of 16 bits.


def int16() -> Codec:
    return Codec(
        name="int16",
        lossless=True,
        encode=lambda x, seed, held: (x.to(torch.int16),),
        decode=lambda payload, seed, held: payload[0].to(held.dtype),
        payload_bytes=lambda held: 2 * math.prod(held.size),
        noise=lambda held: 0.0,
        traffic=lambda held: 12 * math.prod(held.size),
    )


def offer(residual, context):
    if residual.name.startswith("round"):
        yield context.coded(residual, CodecSpec("int16"))


@pytest.fixture
def added(monkeypatch):
    monkeypatch.setattr(table, "_CODECS", dict(table._CODECS))
    register(int16())
    every = (*families(), Family(offer, rank=9))
    monkeypatch.setattr(storage, "families", lambda: every)


class Rounded(nn.Module):
    """A convolution reads whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (100 * self.first(x)).round()
        return self.last(y)


def test_ranks_are_those_of_a_row():
    ranks = [family.rank for family in families()]
    assert ranks == sorted(set(ranks))


def test_a_codec_is_added_without_an_edit_of_the_planner(added):
    traced = trace(Rounded(), torch.randn(4, 3, 32, 32))
    job = traced.planning(mem_budget="100%", codecs="keep")
    names = [[candidate.option.name for candidate in row] for row in job.planning.candidates]
    assert ["keep", "int16"] in names
    made = job.chosen(tuple(row.index("int16") if "int16" in row else 0 for row in names))
    (choice,) = (choice for choice in made.plan.choices if choice.codec == "int16")
    assert choice.bytes_after == choice.bytes_before // 2 and made.plan.noise == 0
    expected = run_joint(traced.gm, traced.primals, traced.tangents())
    results, gradients = run_pair(made.pair, traced.primals, traced.tangents())
    for one, other in zip([*results, *gradients], expected, strict=True):
        assert one is other is None or torch.equal(one, other)
    crossing = {node.meta["val"].dtype for _, node in made.pair.saved().values()}
    assert torch.int16 in crossing
