"""The plan: JSON there and back, and what it adds up."""

from __future__ import annotations

import dataclasses
import json

import pytest

from xconv_fx.codec_spec import CodecSpec
from xconv_fx.plan import FORMAT, Choice, Plan

SHAPE = (4, 8, 16, 16)
CODES = CodecSpec("quantize", bits=4)
CHOICES = (
    Choice("relu", "encoder.act", "relu", SHAPE, "float32", ("bn",), CODES, 32768, 4352, noise=0.03),
    Choice("gt", "encoder.act", "gt", SHAPE, "bool", ("where",), CodecSpec("bitmask"), 8192, 1024, time=1e-5),
)
PLAN = Plan("cpu", 10**6, 2 * 10**6, 900_000, "convolution_backward", 100, CHOICES, notes=("a note",))


def test_json_round_trip():
    for plan in (PLAN, dataclasses.replace(PLAN, budget=None, audited_peak=5, choices=(), notes=())):
        assert Plan.from_json(plan.to_json()) == plan


def test_json_is_deterministic_and_carries_its_format():
    text = PLAN.to_json()
    assert text == Plan.from_json(text).to_json()
    assert json.loads(text)["format"] == FORMAT
    assert list(json.loads(text)) == sorted(json.loads(text))


def test_parameters_of_codecs_lie_among_the_keys_of_a_choice():
    row = json.loads(PLAN.to_json())["choices"][0]
    assert (row["codec"], row["bits"], row["probes"], row["kind"], row["means"]) == ("quantize", 4, None, None, False)
    assert "spec" not in row


def test_sums():
    assert (PLAN.saved_before, PLAN.saved_after) == (40960, 5376)


def test_the_audited_peak_counts_once_there_is_one():
    assert PLAN.peak == 900_000
    assert dataclasses.replace(PLAN, audited_peak=0).peak == 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data.update(format=FORMAT + 1),
        lambda data: data.pop("format"),
        lambda data: data.pop("choices"),
        lambda data: data.pop("device"),
        lambda data: data.update(unknown=1),
        lambda data: data["choices"][0].pop("codec"),
        lambda data: data["choices"][0].update(shape=4),
    ],
)
def test_other_json_is_refused(spoil):
    data = json.loads(PLAN.to_json())
    spoil(data)
    with pytest.raises(ValueError, match="not a plan"):
        Plan.from_json(json.dumps(data))


def test_plans_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAN.budget = 1  # type: ignore[misc]
