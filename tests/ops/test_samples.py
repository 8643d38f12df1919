from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch._inductor.utils import fresh_cache

from xconv_fx.codec_spec import CodecSpec
from xconv_fx.ops import QUANTIZE, SavedAs, layout, lowering, samples
from xconv_fx.ops.sample_gradients import SampleGradients

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

ops = torch.ops.xconv
SEED = torch.tensor([-6123456789012345678])
# Images and volumes in both layouts, groups that do not divide, rows with padding, words without vector rows.
CASES = [
    ((4, 72, 16, 5), (0, 2, 3, 1), torch.float32, 2),
    ((6, 3, 17, 19), (0, 2, 3, 1), torch.bfloat16, 4),
    ((3, 3, 4, 5, 6), (0, 1, 2, 3, 4), torch.float64, 4),
    ((3, 8, 50), (0, 1, 2), torch.float16, 2),
    ((5, 1009), (0, 1), torch.float32, 2),
]


def values(size, order, dtype=torch.float32):
    """Samples of very different ranges."""
    generator = torch.Generator().manual_seed(0)
    physical = torch.randn(layout.physical_size(size, order), generator=generator, dtype=torch.float64)
    physical *= torch.logspace(-1, 1, size[0], dtype=torch.float64).view(-1, *[1] * (len(size) - 1))
    return layout.to_logical(physical.to(dtype), order)


def held_as(size, order, dtype=torch.float32, bits=2):
    return SavedAs(CodecSpec("quantize", bits=bits, by_sample="apart"), size, dtype, order)


def noise(weights, widths):
    return float((weights.double() / (2.0 ** widths.double() - 1) ** 2).sum())


@pytest.mark.parametrize(("size", "order", "dtype", "bits"), CASES, ids=str)
def test_every_sample_moves_less_than_a_step_of_its_width(size, order, dtype, bits):
    x, held = values(size, order, dtype), held_as(size, order, dtype, bits)
    payload = QUANTIZE.encode(x, SEED, held)
    decoded = QUANTIZE.decode(payload, SEED, held)
    assert decoded.dtype == dtype and decoded.stride() == x.stride()
    assert sum(part.nbytes for part in payload) == QUANTIZE.payload_bytes(held)
    widths = payload[2][0]
    assert widths.sum() <= bits * size[0] and len(widths.unique()) > 1
    for sample, width in enumerate(widths.tolist()):
        low, high = payload[1][:, sample].double()
        step = (high - low).max() / (2**width - 1)
        rounding = torch.finfo(dtype).eps * x[sample].double().abs().max()
        assert (decoded[sample].double() - x[sample].double()).abs().max() <= step + rounding


@pytest.mark.parametrize(("size", "order", "dtype", "bits"), CASES, ids=str)
def test_kernels_compute_what_the_reference_does(size, order, dtype, bits):
    def round_trip(x, seed):
        codes, ranges, widths = samples.encode(x, seed, bits, order, False)
        return codes, ranges, widths, ops.dequantize_samples(codes, ranges, widths, size, order, dtype)

    lowering.install()
    torch._dynamo.reset()
    x = values(size, order, dtype)
    with fresh_cache():
        found = torch.compile(round_trip, backend="inductor", dynamic=False)(x, SEED)
    for one, expected in zip(found, round_trip(x, SEED), strict=True):
        assert one.dtype == expected.dtype and torch.equal(one, expected)


def test_rounding_is_unbiased():
    size, order, draws = (4, 16, 8, 8), (0, 2, 3, 1), 200
    x, held = values(size, order), held_as(size, order)
    decoded = [QUANTIZE.decode(QUANTIZE.encode(x, seed, held), seed, held) for seed in torch.arange(draws)[:, None]]
    errors = torch.stack(decoded).double() - x
    # Each of eight numbers is within 4.5 standard errors of zero: missed once in 18000 trials.
    for along in (torch.ones_like(x), x):
        found = (errors * along).flatten(2).sum(2)
        assert (found.mean(0).abs() < 4.5 * found.std(0) / draws**0.5).all() and (found.std(0) > 0).all()


@pytest.mark.parametrize("op", ["group_ranges", "share_bits", "quantize_samples", "dequantize_samples"])
def test_operators_are_sound(op):
    size, order, dtype, bits = CASES[0]
    x = values(size, order, dtype)
    ranges = ops.group_ranges(x, order)
    widths, units = ops.share_bits(ranges, bits, False)
    codes = ops.quantize_samples(x, ranges, units, SEED, bits, order)
    arguments = {
        "group_ranges": (x, order),
        "share_bits": (ranges, bits, False),
        "quantize_samples": (x, ranges, units, SEED, bits, order),
        "dequantize_samples": (codes, ranges, widths, size, order, dtype),
    }[op]
    torch.library.opcheck(getattr(ops, op).default, arguments)


@pytest.mark.parametrize("average", samples.AVERAGES)
def test_widths_are_nearly_the_best_there_are(average):
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for count in (2, 3, 4, 5, 6) * 10:
        weights = torch.randn(count, generator=generator).mul(2).exp()
        found = samples.least_noise(weights, average)
        assert found.sum() <= average * count and set(found.tolist()) <= set(samples.WIDTHS)
        every = itertools.product(samples.WIDTHS, repeat=count)
        best = min(noise(weights, torch.tensor(w)) for w in every if sum(w) <= average * count)
        ratios.append(noise(weights, found) / best)
    assert sum(ratios) / len(ratios) < 1.1


@pytest.mark.parametrize("average", samples.AVERAGES)
def test_equal_samples_have_equal_widths(average):
    for weights in (torch.ones(8), torch.zeros(8), torch.full((8,), math.nan)):
        assert samples.least_noise(weights, average).tolist() == [average] * 8


def test_an_overflown_sample_takes_no_bits_that_others_need_more():
    found = samples.least_noise(torch.tensor([1.0, math.inf, 1e-6, math.nan, 1e-6, 1e-6]), 2)
    assert sorted(found[[0, 1, 3]].tolist()) == [2, 2, 4] and sorted(found[[2, 4, 5]].tolist()) == [1, 1, 2]


def test_gradients_that_were_noted_decide():
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    ranges, seen = ops.group_ranges(x, (0, 1)), SampleGradients(20)
    assert ops.share_bits(ranges, 2, False)[0][0].tolist() == [2] * 8
    seen.squares[:] = 1e-6
    seen.squares[[11, 13]] = 1.0
    with seen.batch(range(10, 18)):
        widths, units = ops.share_bits(ranges, 2, False)
    # Of 16 bits each sample has one; the eight others are two steps to four bits, and two small ones.
    assert widths[0, [1, 3]].tolist() == [4, 4] and sorted(widths[0].tolist()) == [1, 1, 1, 1, 2, 2, 4, 4]
    # Every unit belongs to one sample, in order.
    expected = [[sample, width, unit] for sample, width in enumerate(widths[0].tolist()) for unit in range(width)]
    assert units.t().tolist()[: len(expected)] == expected
    with seen.batch(range(4)):  # Names of another batch.
        assert ops.share_bits(ranges, 2, False)[0][0].tolist() == [2] * 8


@pytest.mark.parametrize(
    ("size", "order", "bits", "why"),
    [
        ((8, 16, 8, 8), (0, 2, 3, 1), 8, "eight bits leave nothing to share"),
        ((8, 16, 8, 8), (0, 2, 3, 1), 1, "nor does one"),
        ((1, 16, 8, 8), (0, 2, 3, 1), 2, "a single sample"),
        ((8, 16, 8, 8), (1, 0, 2, 3), 2, "samples are not outermost"),
        ((64,), (0,), 2, "no samples"),
        ((8, 33), (0, 1), 2, "words would be half empty"),
    ],
)
def test_what_cannot_be_shared(size, order, bits, why):
    assert not samples.shareable(size, order, bits), why
    assert samples.shareable((8, 16, 8, 8), (0, 2, 3, 1), 2)
