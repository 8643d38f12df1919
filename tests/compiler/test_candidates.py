"""Which way of running a step is preferred, from made-up predictions and from a traced net."""

from __future__ import annotations

import pytest

from xconv_fx.compiler.candidates import Candidate, Variant, select
from xconv_fx.errors import OptionError
from xconv_fx.options import Options

EXACT = Candidate(Variant(), 0.0, 0.3)
SLIGHT = Candidate(Variant(), 1e-3, 0.02)
NOISY = Candidate(Variant(), 0.05, 0.0)
WAYS = [NOISY, EXACT, SLIGHT]


@pytest.mark.parametrize(
    ("prefer", "order"),
    [("exact", [EXACT, SLIGHT, NOISY]), ("balanced", [SLIGHT, EXACT, NOISY]), ("speed", [NOISY, SLIGHT, EXACT])],
)
def test_order(prefer, order):
    assert select(WAYS, Options(prefer=prefer)) == order


def test_limits_leave_out_ways():
    assert select(WAYS, Options(max_noise=0.01)) == [SLIGHT, EXACT]
    assert select(WAYS, Options(max_slowdown=0.1)) == [SLIGHT, NOISY]
    assert select(WAYS, Options(max_noise=0.01, max_slowdown=0.1)) == [SLIGHT]
    assert select([], Options(max_noise=0.01)) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_noise": 0.01, "max_slowdown": 0.01}, "max_slowdown=0.01.*less than 0.02"),
        ({"max_slowdown": -0.0}, None),
        ({"max_noise": 0.0, "max_slowdown": 0.1}, "max_slowdown=0.1.*less than 0.3"),
    ],
)
def test_limits_that_nothing_keeps_are_named(options, words):
    if words is None:
        assert select(WAYS, Options(**options)) == [NOISY]
        return
    with pytest.raises(OptionError, match=words):
        select(WAYS, Options(**options))
