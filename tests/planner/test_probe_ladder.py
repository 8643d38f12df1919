"""The ladder of probes that the planner is offered: sizes, what is chosen on a rung, and the noise that is expected."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from xconv_fx.codec_spec import CodecSpec
from xconv_fx.noise.expected import DEVIATION, expected_noise
from xconv_fx.ops import SavedAs, codec_of
from xconv_fx.planner.probe_ladder import RUNGS, SUM_BITS, probe_candidates

IMAGES = SavedAs(CodecSpec("probe", kind="fold"), (4, 16, 32, 32), torch.float32, (0, 2, 3, 1))
TINY = replace(IMAGES, size=(4, 32, 7, 7))
ROWS = replace(IMAGES, size=(4, 4096), order=(0, 1))


def taken(held: SavedAs) -> int:
    return codec_of("probe").payload_bytes(held)


@pytest.mark.parametrize("blank", [IMAGES, TINY, ROWS, replace(IMAGES, dtype=torch.bfloat16)], ids=str)
def test_every_rung_is_filled_and_not_exceeded(blank):
    found = probe_candidates(blank, ("fold",))
    rooms = [4 * math.prod(blank.size) // rung for rung in RUNGS]
    assert len(found) >= 5
    for held, room in zip(found, rooms, strict=False):
        assert 0.7 * room <= taken(held) <= room
    noises = [expected_noise(held, rectified=True) for held in found]
    assert noises == sorted(noises)


def test_a_rung_offers_the_parameters_of_least_expected_noise():
    for held in probe_candidates(IMAGES, ("fold",))[:4]:
        others = [
            held.varied(bits=bits, means=means, probes=probes)
            for bits in SUM_BITS
            for means in (True, False)
            for probes in range(16, 16 * 1024, 16 * 8)
        ]
        fitting = [other for other in others if taken(other) <= taken(held)]
        least = min(expected_noise(other, rectified=True) for other in fitting)
        assert expected_noise(held, rectified=True) <= 1.15 * least


def test_means_are_held_where_they_are_small():
    assert all(held.spec.means for held in probe_candidates(IMAGES, ("fold",))[:5])
    assert not any(held.spec.means for held in probe_candidates(TINY, ("fold",)))
    assert not any(held.spec.means for held in probe_candidates(ROWS, ("fold",)))


def test_dense_kinds_fill_the_same_payloads():
    found = probe_candidates(IMAGES, ("gaussian", "orthogonal"))
    assert {held.spec.kind for held in found} == {"gaussian", "orthogonal"}
    assert taken(found[0]) == 4 * math.prod(IMAGES.size) // RUNGS[0]


def test_nothing_is_offered_where_samples_are_not_outermost_or_few_sums_are_left():
    assert probe_candidates(replace(IMAGES, order=(1, 0, 2, 3)), ("fold",)) == []
    assert probe_candidates(replace(IMAGES, size=(4, 3, 2, 2)), ("fold",)) == []


def test_priors_apply_to_rectified_values_alone():
    codes = IMAGES.varied(codec="quantize", bits=2)
    assert expected_noise(codes, rectified=False) == codec_of("quantize").noise(codes)
    assert expected_noise(codes, rectified=True) < expected_noise(codes, rectified=False)
    sums = IMAGES.varied(probes=1024, means=True)
    assert expected_noise(sums, rectified=True) == pytest.approx(DEVIATION * codec_of("probe").noise(sums))
    assert expected_noise(sums.varied(bits=2), rectified=True) > expected_noise(sums, rectified=True)


def test_the_noise_of_rectified_values_is_as_expected():
    """Against decoded draws: the priors are for trained layers, but rectified normal values are not far off."""
    torch.manual_seed(0)
    x = torch.randn(IMAGES.size).relu().contiguous(memory_format=torch.channels_last)
    for held in probe_candidates(IMAGES, ("fold",))[:6]:
        seeds = [torch.randint(2**62, (1,)) for _ in range(4)]
        row = codec_of("probe")
        error = sum(float((row.decode(row.encode(x, s, held), s, held) - x).square().sum()) for s in seeds) / 4
        assert expected_noise(held, rectified=True) == pytest.approx(error / float(x.square().sum()), rel=0.35)
