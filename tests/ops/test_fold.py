from __future__ import annotations

import itertools
import math

import pytest
import torch

from xconv_fx.codec_spec import CodecSpec
from xconv_fx.ops import PROBE, SavedAs, counter_rng, fitting_probes, layout
from xconv_fx.ops.fold import STREAM

CASES = [
    ((2, 24, 9, 13), (0, 2, 3, 1), torch.float32),
    ((2, 3, 4, 5, 6), (0, 1, 2, 3, 4), torch.float64),
    ((3, 8, 50), (0, 1, 2), torch.float16),
    ((4, 101), (0, 1), torch.bfloat16),
]
IMAGE = ((4, 32, 16, 16), (0, 2, 3, 1))


def held_as(size, order, fold=4, dtype=torch.float32, **options):
    probes = fitting_probes(size, order, -(-math.prod(size[1:]) // fold))
    return SavedAs(CodecSpec("probe", probes=probes, kind="fold", **options), size, dtype, order)


def round_trip(x, held, seed=7):
    token = torch.tensor([seed])
    return PROBE.decode(PROBE.encode(x, token, held), token, held)


def normal(size, order, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    physical = torch.randn(layout.physical_size(size, order), generator=generator, dtype=torch.float64)
    return layout.to_logical(physical.to(dtype), order)


def test_sums_are_as_defined():
    size, order, probes, seed = (2, 3, 4, 5), (0, 2, 3, 1), 7, torch.tensor([11])
    x = normal(size, order, torch.float64)
    flat = x.permute(order).reshape(2, 60)
    expected = torch.zeros(2, probes, dtype=torch.float64)
    for sample, position in itertools.product(range(2), range(60)):
        term, probe = divmod(position, probes)
        draw = torch.tensor([sample * probes + probe + term // 8 * 2 * probes], dtype=torch.int32)
        bit = counter_rng.random_bits(draw, seed, STREAM).item() >> (term % 8) & 1
        expected[sample, probe] += (-1) ** bit * flat[sample, position]
    assert torch.allclose(torch.ops.xconv.fold(x, seed, probes, order), expected)


@pytest.mark.parametrize(("size", "order", "dtype"), CASES, ids=str)
def test_as_many_probes_as_elements_are_exact(size, order, dtype):
    x = normal(size, order, dtype)
    decoded = round_trip(x, held_as(size, order, 1, dtype))
    assert torch.equal(decoded, x) and decoded.stride() == x.stride()


@pytest.mark.parametrize("means", [False, True])
@pytest.mark.parametrize("bits", [None, 32, 16, 4])
@pytest.mark.parametrize(("size", "order", "dtype"), CASES[:3], ids=str)
def test_payload_bytes_are_exact(size, order, dtype, bits, means):
    held = held_as(size, order, 3, dtype, bits=bits, means=means)
    payload = PROBE.encode(normal(size, order, dtype), torch.tensor([1]), held)
    assert sum(part.nbytes for part in payload) == PROBE.payload_bytes(held)
    assert PROBE.decode(payload, torch.tensor([1]), held).dtype == dtype
    assert PROBE.traffic(held) > PROBE.payload_bytes(held)


@pytest.mark.parametrize("bits", [None, 8, 4, 2, 1])
@pytest.mark.parametrize("fold", [2, 8, 11])
def test_variance_is_as_predicted(fold, bits):
    x, held = normal(*IMAGE), held_as(*IMAGE, fold, bits=bits)
    draws = [round_trip(x, held, seed) for seed in range(8)]
    measured = sum((draw - x).square().mean() for draw in draws) / len(draws) / x.square().mean()
    assert measured.item() == pytest.approx(PROBE.noise(held), rel=0.2)


def test_variance_with_codes_is_as_predicted_without_folding():
    x = normal(*IMAGE)
    for bits in (8, 4, 2, 1):
        held = held_as(*IMAGE, 1, bits=bits)
        measured = (round_trip(x, held) - x).square().mean() / x.square().mean()
        assert measured.item() == pytest.approx(PROBE.noise(held), rel=0.2)


@pytest.mark.parametrize("options", [{}, {"bits": 2}, {"means": True}], ids=str)
def test_estimates_are_unbiased(options):
    size, order, draws = (2, 4, 6, 6), (0, 2, 3, 1), 600
    x, held = normal(size, order), held_as(size, order, 4, **options)
    errors = torch.stack([round_trip(x, held, seed) - x for seed in range(draws)]).double()
    z = errors.mean(0) / (errors.std(0) / draws**0.5)
    assert z.abs().max() < 5  # 288 elements
    assert z.square().mean() < 1.5


def test_means_leave_only_the_deviation_to_be_folded():
    x = normal(*IMAGE) + 10
    plain, held = held_as(*IMAGE), held_as(*IMAGE, means=True)
    error, plain_error = ((round_trip(x, way) - x).square().mean() for way in (held, plain))
    assert error < plain_error / 50
    decoded = round_trip(torch.full(IMAGE[0], 3.0).to(memory_format=torch.channels_last), held)
    assert torch.equal(decoded, torch.full(IMAGE[0], 3.0))


def test_signs_of_samples_and_terms_are_uncorrelated():
    x = torch.ones(64, 64 * 32)
    sums = torch.ops.xconv.fold(x, torch.tensor([2]), 64, (0, 1))
    # Each sum adds 32 signs: variance 32 if the terms are independent.
    assert sums.var().item() == pytest.approx(32, rel=0.1)
    assert abs(sums.mean()) < 5 * (32 / sums.numel()) ** 0.5


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "orthogonal"])
def test_dense_projections_go_through_the_same_row(kind):
    size, order = (2, 3, 4, 4), (0, 2, 3, 1)
    held = SavedAs(CodecSpec("probe", probes=12, kind=kind), size, torch.float32, order)
    x = normal(size, order)
    payload = PROBE.encode(x, torch.tensor([1]), held)
    assert sum(part.nbytes for part in payload) == PROBE.payload_bytes(held)
    errors = [(round_trip(x, held, seed) - x).square().sum() for seed in range(60)]
    assert (sum(errors) / 60 / x.square().sum()).item() == pytest.approx(PROBE.noise(held), rel=0.3)


@pytest.mark.parametrize(("size", "order", "dtype"), CASES[:2], ids=str)
def test_operators_pass_opcheck(size, order, dtype):
    x, seed = normal(size, order, dtype), torch.tensor([5])
    sums = torch.ops.xconv.fold(x, seed, 20, order)
    torch.library.opcheck(torch.ops.xconv.fold.default, (x, seed, 20, order))
    torch.library.opcheck(torch.ops.xconv.unfold.default, (sums, seed, size, order, dtype))


def test_wrong_arguments_are_named():
    size, order = (2, 3, 4), (0, 1, 2)
    with pytest.raises(ValueError, match="probes=None"):
        PROBE.payload_bytes(SavedAs(CodecSpec("probe", kind="fold"), size, torch.float32, order))
    for kind in ("sparse", None):
        with pytest.raises(ValueError, match=rf"kind={kind!r}.*fold, gaussian"):
            PROBE.payload_bytes(SavedAs(CodecSpec("probe", probes=2, kind=kind), size, torch.float32, order))
    with pytest.raises(ValueError, match="means=True"):
        held = SavedAs(CodecSpec("probe", probes=2, kind="fold", means=True), (2, 6), torch.float32, (0, 1))
        PROBE.encode(torch.ones(2, 6), torch.tensor([1]), held)


@pytest.mark.parametrize("block", [1, 100, 3000])
@pytest.mark.parametrize("fold", [2, 23])
@pytest.mark.parametrize(("size", "order", "dtype"), CASES, ids=str)
def test_blocks_change_nothing_but_the_order_of_sums(size, order, dtype, fold, block, monkeypatch):
    x, held, token = normal(size, order, dtype), held_as(size, order, fold, dtype), torch.tensor([3])
    (whole,) = PROBE.encode(x, token, held)
    decoded = PROBE.decode((whole,), token, held)
    monkeypatch.setattr(layout, "BLOCK", block)
    torch.testing.assert_close(PROBE.encode(x, token, held)[0], whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(PROBE.decode((whole,), token, held), decoded)
