"""Widths found by counting against those found by sorting: the same ones, whatever the weights."""

from __future__ import annotations

import math

import pytest
import torch

from xconv_fx.ops import bit_shares, samples
from xconv_fx.ops.sample_gradients import SampleGradients

ops = torch.ops.xconv


@pytest.mark.parametrize("average", samples.AVERAGES)
@pytest.mark.parametrize("count", [1, 2, 5, 33, 64])
def test_counting_finds_what_sorting_does(count, average):
    generator = torch.Generator().manual_seed(count)
    for trial in range(30):
        weights = torch.randn(count, generator=generator).mul(2).exp()
        if trial % 3 == 0:  # Equal ones, of which the first come first.
            weights = torch.randint(0, 3, (count,), generator=generator).float()
        if trial % 5 == 0:
            weights[0] = math.inf
        if trial % 7 == 0:
            weights[-1] = math.nan
        assert torch.equal(bit_shares.least_noise(weights, average), samples.least_noise(weights, average))


@pytest.mark.parametrize("mixed", [False, True])
def test_units_are_the_same_with_and_without_gradients(mixed):
    ranges, seen = torch.randn(2, 6, 3, 4).cumsum(0), SampleGradients(20)
    seen.squares[:10] = torch.rand(10)
    for indices in (None, range(6), range(8, 14), range(4)):  # The last ones are of another batch.
        with seen.batch(indices) if indices is not None else torch.no_grad():
            noted = ops.noted_gradients(6, ranges.device)
            wanted, found = ops.share_bits(ranges, 2, mixed), bit_shares.shares(ranges, noted, 2, mixed)
        assert all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))


def test_what_was_noted_is_asked_for_outside_of_cuda_graphs():
    assert torch.Tag.cudagraph_unsafe in ops.noted_gradients.default.tags
    torch.library.opcheck(
        ops.noted_gradients.default, (4, torch.device("cpu")), test_utils=("test_schema", "test_faketensor")
    )
