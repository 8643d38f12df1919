"""What counts as a regression, and which layers are named for it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from xconv_fx.tools.check.compare import compare
from xconv_fx.tools.check.config import Tolerance
from xconv_fx.tools.check.record import Held

EXACTLY = Tolerance()


def test_equal_records_are_no_change(record):
    result = compare("net", record, record, EXACTLY)
    assert not result.failed and not result.changed


@pytest.mark.parametrize("field", ["peak", "unbudgeted", "lowest", "noise", "time"])
def test_every_number_may_not_grow(record, field):
    grown = replace(record, **{field: getattr(record, field) * 1.05})
    (number,) = compare("net", record, grown, EXACTLY).numbers
    assert number.regressed and number.after > number.before
    assert compare("net", record, grown, Tolerance(share=0.04)).failed
    assert not compare("net", record, grown, Tolerance(share=0.06)).failed
    assert not compare("net", grown, record, EXACTLY).failed


def test_a_tolerance_in_bytes_is_for_bytes(record):
    grown = replace(record, peak=record.peak + 100, noise=record.noise * 2)
    failed = {number.name: number.regressed for number in compare("net", record, grown, Tolerance(bytes=100)).numbers}
    assert failed == {"peak": False, "noise": True}


def test_an_exact_plan_that_becomes_noisy_is_a_regression(record):
    exact = replace(record, noise=0.0)
    assert compare("net", exact, record, Tolerance(share=1.0)).failed


def test_lines_of_code_may_move(record):
    moved = replace(record, residuals=tuple(replace(row, line="/src/net.py:99") for row in record.residuals))
    assert not compare("net", record, moved, EXACTLY).changed


def test_a_changed_activation_is_named(record, worse):
    result = compare("net", record, worse, EXACTLY)
    assert result.layers == (("act", "ReLU()", "SiLU()"),)
    assert [(item.layer, item.grown, item.moved) for item in result.residuals] == [
        ("act", (31744, 0), True),
        ("stem", (0, 0), False),
    ]


def test_residuals_that_came_and_went(record):
    more = Held("skip", "add", "4x8x16x16", "float32", "keep", "norm", 32768, 32768)
    result = compare("net", record, replace(record, residuals=(more, *record.residuals[1:])), EXACTLY)
    came, went = result.residuals
    assert (came.before, came.after) == (None, more)
    assert (went.before, went.after) == (record.residuals[0], None)
    assert not result.failed


def test_equal_operations_of_one_layer_are_paired_in_order(record):
    twice = replace(record, residuals=record.residuals[:1] * 2)
    grown = replace(twice.residuals[1], bytes=65536)
    (difference,) = compare("net", twice, replace(twice, residuals=(twice.residuals[0], grown)), EXACTLY).residuals
    assert (difference.before, difference.after) == (twice.residuals[1], grown)
