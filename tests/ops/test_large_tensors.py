"""Tensors of 2**31 elements and more, on fakes: what needs no counter is held, the rest is refused before it runs."""

from __future__ import annotations

import pytest
import torch
from helpers.tracing import Traced, trace
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from xconv_fx.codec_spec import CodecSpec
from xconv_fx.ops import SavedAs
from xconv_fx.ops.codec import codec_of
from xconv_fx.reproducible import portable

# 2**31 elements, 2**32, and 2**33: one more than a codec counts in pairs.
SIDES = (2**13, 2**13), (2**14, 2**13), (2**14, 2**14)
ORDER = (0, 2, 3, 1)
SIZES = [(1, 32, *sides) for sides in SIDES]
SHARED = CodecSpec("quantize", bits=2, by_sample="apart")


def held(spec, size):
    return SavedAs(spec, size, torch.bfloat16, ORDER)


def encoded(spec, size):
    """What the operators' own rules say of a fake of this size: shapes of the payload."""
    with FakeTensorMode():
        dtype = torch.bool if spec.codec == "bitmask" else torch.bfloat16
        x = torch.empty(size, dtype=dtype).contiguous(memory_format=torch.channels_last)
        payload = codec_of(spec.codec).encode(x, torch.zeros(1, dtype=torch.int64), held(spec, size))
        return sum(part.numel() * part.element_size() for part in payload)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bits_of_any_number_of_elements_are_held(size):
    spec = CodecSpec("bitmask")
    assert codec_of("bitmask").can_count(held(spec, size))
    assert encoded(spec, size) == codec_of("bitmask").payload_bytes(held(spec, size))


@pytest.mark.parametrize(
    ("spec", "possible"),
    [
        (CodecSpec("quantize", bits=4), (True, True, False)),  # Two elements share a draw.
        (CodecSpec("probe", probes=2**29, kind="fold"), (True, True, True)),  # Eight terms do.
        (CodecSpec("probe", probes=8, kind="gaussian"), (True, False, False)),
    ],
    ids=lambda value: getattr(value, "codec", ""),
)
def test_the_table_says_what_the_operators_refuse(spec, possible):
    codec = codec_of(spec.codec)
    assert tuple(codec.can_count(held(spec, size)) for size in SIZES) == possible
    for size, counted in zip(SIZES, possible, strict=True):
        if spec.kind == "gaussian":
            continue  # An opaque operator, whose rule for fakes counts nothing.
        if counted:
            assert encoded(spec, size) == codec.payload_bytes(held(spec, size))
        else:
            with pytest.raises(ValueError, match="which an int32 cannot"):
                encoded(spec, size)


def test_columns_of_a_sample_whose_bits_an_int32_cannot_count_are_no_codes_of_samples():
    codec = codec_of("quantize")
    assert codec.can_count(SavedAs(SHARED, (2, 2**27), torch.float32, (0, 1)))
    assert not codec.can_count(SavedAs(SHARED, (2, 2**29), torch.float32, (0, 1)))


@pytest.fixture(scope="module")
def traced() -> Traced:
    with FakeTensorMode(allow_non_fake_inputs=True):
        net = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 1, 1))
        return trace(net, torch.empty(SIZES[-1][0], 1, *SIDES[-1]))


@pytest.mark.parametrize("codecs", ["all", "all,fixed"])
def test_what_is_offered_can_be_written_into_the_graphs(traced, codecs):
    with portable():
        job = traced.planning(mem_budget="100%", codecs=codecs)
        rows = job.planning.candidates
        offered = {candidate.choice.codec for row in rows for candidate in row}
        assert "bitmask" in offered and "quantize" not in offered
        for number in range(max(map(len, rows))):
            job.chosen(tuple(min(number, len(row) - 1) for row in rows))


def test_where_nothing_that_is_asked_for_can_be_counted_the_tensor_is_kept(traced):
    with portable():
        (row, *_) = traced.planning(probes=2**32, codecs="all").planning.candidates
    assert [candidate.choice.codec for candidate in row] == ["keep"]
