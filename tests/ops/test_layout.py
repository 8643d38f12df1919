from __future__ import annotations

import itertools
import math

import pytest
import torch

from xconv_fx.ops import layout

CHANNELS_LAST = (0, 2, 3, 1)
SHAPES = [
    ((16, 64, 64, 64), CHANNELS_LAST),
    ((4, 3, 224, 224), CHANNELS_LAST),
    ((2, 512, 7, 7), CHANNELS_LAST),
    ((1, 1, 33, 35), CHANNELS_LAST),
    ((2, 16, 32, 32, 32), (0, 1, 2, 3, 4)),
    ((32, 1000), (0, 1)),
    ((4, 1009), (0, 1)),
    ((3, 8, 50), (0, 1, 2)),
    ((5,), (0,)),
    ((1, 1), (0, 1)),
]


@pytest.mark.parametrize(("size", "order"), SHAPES, ids=str)
def test_strides_are_those_of_a_dense_tensor(size, order):
    x = layout.to_logical(torch.empty(layout.physical_size(size, order)), order)
    assert x.shape == size
    assert x.stride() == layout.dense_strides(size, order)
    again = layout.order_of(size, x.stride())
    assert layout.to_physical(x, again).is_contiguous()


def test_order_of_channels_last():
    x = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert layout.order_of(x.shape, x.stride()) == CHANNELS_LAST


@pytest.mark.parametrize("bits", layout.CODE_BITS)
@pytest.mark.parametrize(("size", "order"), SHAPES[2:], ids=str)
def test_packing_round_trips(size, order, bits):
    plan = layout.packing(size, order, bits)
    codes = torch.randint(1 << bits, plan.physical, dtype=torch.int32)
    words = layout.pack(layout.to_rows(codes, plan), plan)
    assert words.shape == plan.words and words.dtype == torch.int32 and words.is_contiguous()
    assert words.nbytes == plan.word_bytes
    assert torch.equal(layout.unpack(words, plan), codes)


def test_neighbouring_rows_share_a_word():
    plan = layout.Packing((40, 3), 1, 1)
    codes = torch.zeros(40, 3, dtype=torch.int32)
    codes[33, 2] = 1
    words = layout.pack(layout.to_rows(codes, plan), plan)
    assert words.shape == (2, 3)
    assert words[1, 2] == 1 << 1 and words.count_nonzero() == 1


def test_the_last_row_fills_its_word():
    plan = layout.Packing((5, 2), 1, 8)
    codes = torch.arange(10, dtype=torch.int32).reshape(5, 2)
    rows = layout.to_rows(codes, plan)
    assert rows.shape == (8, 2) and torch.equal(rows[5:], codes[-1:].expand(3, 2))
    assert layout.pack(rows, plan)[1].tolist() == [0x08080808, 0x09090909]


@pytest.mark.parametrize(("size", "order"), SHAPES[:5], ids=str)
def test_activations_are_packed_in_long_rows_without_waste(size, order):
    for bits in layout.CODE_BITS:
        plan = layout.packing(size, order, bits)
        assert plan.padding <= 1 / 2
        assert math.prod(plan.inner) >= 64 or math.prod(size) < 2048


@pytest.mark.parametrize(("size", "order"), SHAPES, ids=str)
def test_groups_are_contiguous_runs_of_about_256(size, order):
    physical = layout.physical_size(size, order)
    extents, counts = layout.group_extents(physical), layout.group_counts(physical)
    # Contiguous: one element of each outer dimension, a part of one, all of those further in.
    first = next((dim for dim in range(len(physical)) if extents[dim] > 1), len(physical) - 1)
    assert extents[first + 1 :] == physical[first + 1 :]
    assert math.prod(extents) <= 512
    assert math.prod(extents) >= min(128, math.prod(physical))
    assert all(extent * count >= length for extent, count, length in zip(extents, counts, physical, strict=True))


def test_long_rows_are_divided_exactly_where_they_can():
    assert layout.group_extents((2, 1024))[1] == 256
    assert 1000 % layout.group_extents((2, 1000))[1] == 0


@pytest.mark.parametrize("part", [1, 2, 3, 4, 16, 64])
@pytest.mark.parametrize(("size", "order"), SHAPES[:5], ids=str)
def test_fitting_probes_are_whole_rows_or_all_that_fit(size, order, part):
    length = math.prod(size[1:])
    limit = -(-length // part)
    probes = layout.fitting_probes(size, order, limit)
    assert 0.9 * limit <= probes <= limit
    plan = layout.folding(size, order, probes)
    assert plan.rows * math.prod(plan.block) == probes
    assert plan.terms * probes >= length > (plan.terms - 1) * probes
    assert 0 < plan.full <= probes


def test_a_good_fold_of_an_activation_takes_whole_rows():
    plan = layout.folding(
        (16, 64, 64, 64), CHANNELS_LAST, layout.fitting_probes((16, 64, 64, 64), CHANNELS_LAST, 16500)
    )
    assert plan.block == (64, 64) and plan.rows == 4 and plan.terms == 16


def test_all_elements_are_the_most_probes_that_fit():
    assert layout.fitting_probes((2, 3, 4), (0, 1, 2), 99) == 12


def test_wrong_arguments_are_named():
    for order in [(0, 1), (0, 1, 1), (0, 1, 3)]:
        with pytest.raises(ValueError, match="order="):
            layout.check_order((2, 3, 4), order)
    with pytest.raises(ValueError, match="size="):
        layout.check_order((2, 0), (0, 1))
    with pytest.raises(ValueError, match=r"bits=3.*16, 8, 4, 2, 1"):
        layout.check_bits(3)
    with pytest.raises(ValueError, match="limit=0"):
        layout.fitting_probes((2, 3), (0, 1), 0)
    for probes, order in itertools.product([0, 13], [(0, 1, 2)]):
        with pytest.raises(ValueError, match=r"1 \.\. 12"):
            layout.folding((2, 3, 4), order, probes)
    with pytest.raises(ValueError, match="outermost"):
        layout.folding((2, 3, 4), (1, 0, 2), 3)
