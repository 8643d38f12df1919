"""The grammar and the cases: drawn alike everywhere, written so that they run, simpler when shrunk."""

from __future__ import annotations

import random

import pytest
import torch

from . import networks
from .cases import Case, draw_case
from .programs import Program
from .shrink import shrink, simpler
from .writer import Misfit, Writer


def program(case):
    try:
        return Program(case)
    except Misfit:
        return None


def test_a_case_is_the_same_every_time_and_survives_json():
    for number in range(20):
        case = draw_case(3, number)
        assert draw_case(3, number) == case
        assert Case.from_json(case.to_json()) == case


def test_programs_run_on_what_they_say():
    written = [p for p in (program(draw_case(0, number)) for number in range(12)) if p]
    assert len(written) > 6
    for found in written:
        names = found.namespace()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=found.case.precision == "autocast"):
            result = names["Model"]()(*names["inputs"](0))
        assert torch.isfinite(names["loss"](result, 0))


@pytest.mark.parametrize("kind", networks.KINDS)
def test_every_kind_fits_somewhere(kind):
    rng = random.Random(kind)
    for _ in range(60):
        dims = rng.choice([1, 2, 3])
        writer = Writer(dims, {"x": torch.randn(2, rng.choice([4, 8]), *[8] * dims)}, helpers())
        piece = {"kind": kind, **networks.KINDS[kind].draw(rng)}
        if kind in networks.NESTED:
            piece["body"] = [{"kind": "activation", "layer": "nn.SiLU()"}]
        if networks.write_if_fits(writer, piece):
            assert writer.lines
            return
    pytest.fail(f"{kind} fits nowhere")


def helpers():
    names = {}
    for source in networks.HELPERS.values():
        exec(source, {"torch": torch, "nn": torch.nn, "F": torch.nn.functional}, names)
    return names


def test_a_piece_that_does_not_fit_leaves_nothing_behind():
    writer = Writer(2, {"x": torch.randn(2, 3, 4, 4)}, {})
    conv = {
        "kind": "conv",
        "out": 4,
        "kernel": 7,
        "stride": 1,
        "dilation": 1,
        "padding": "none",
        "groups": "one",
        "bias": True,
    }
    assert not networks.write_if_fits(writer, conv)
    assert not writer.init and not writer.lines
    assert not networks.write_if_fits(writer, {"kind": "residual", "scale": "", "body": [conv]})
    assert not writer.lines


def test_shrinking_keeps_what_fails_and_nothing_else():
    """What fails is a dropout anywhere, under slices."""

    def fails(case):
        return "dropout" in str(case.pieces) and "slices" in case.options

    case = next(c for c in (draw_case(0, n) for n in range(400)) if fails(c) and len(c.pieces) > 3)
    small = shrink(case, fails, tries=300)
    assert fails(small) and len(small.pieces) == 1 and list(small.options) == ["slices"]
    assert small.loss == "square" and small.calls == 1 and small.precision == "float32"
    assert not any(fails(candidate) for candidate in simpler(small) if not candidate.pieces)
