from __future__ import annotations

import pytest
import torch

from xconv_fx.codec_spec import CodecSpec
from xconv_fx.ops import QUANTIZE, SavedAs, layout
from xconv_fx.ops.quantize import group_noise, normal_noise

CASES = [
    ((2, 24, 9, 13), (0, 2, 3, 1), torch.float32),
    ((2, 3, 17, 19), (0, 2, 3, 1), torch.bfloat16),
    ((2, 3, 4, 5, 6), (0, 1, 2, 3, 4), torch.float64),
    ((3, 8, 50), (0, 1, 2), torch.float16),
    ((4, 1009), (0, 1), torch.float32),
    ((7,), (0,), torch.float32),
]
IMAGE = ((4, 64, 16, 16), (0, 2, 3, 1))


def held_as(size, order, dtype=torch.float32, bits=4):
    return SavedAs(CodecSpec("quantize", bits=bits), size, dtype, order)


def round_trip(x, held, seed=7):
    token = torch.tensor([seed])
    return QUANTIZE.decode(QUANTIZE.encode(x, token, held), token, held)


def normal(size, order, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    physical = torch.randn(layout.physical_size(size, order), generator=generator, dtype=torch.float64)
    return layout.to_logical(physical.to(dtype), order)


@pytest.mark.parametrize("bits", layout.CODE_BITS)
@pytest.mark.parametrize(("size", "order", "dtype"), CASES, ids=str)
def test_values_move_less_than_a_step_and_bytes_are_exact(size, order, dtype, bits):
    x, held = normal(size, order, dtype), held_as(size, order, dtype, bits)
    payload = QUANTIZE.encode(x, torch.tensor([3]), held)
    decoded = QUANTIZE.decode(payload, torch.tensor([3]), held)
    assert decoded.dtype == dtype and decoded.stride() == x.stride()
    assert sum(part.nbytes for part in payload) == QUANTIZE.payload_bytes(held)
    low, high = payload[1].double()
    step = (high - low).max() / (2**bits - 1)
    rounding = torch.finfo(dtype).eps * x.double().abs().max()
    assert (decoded.double() - x.double()).abs().max() <= step + rounding


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_variance_is_as_predicted(bits):
    x, held = normal(*IMAGE), held_as(*IMAGE, bits=bits)
    measured = (round_trip(x, held) - x).square().mean() / x.square().mean()
    assert measured.item() == pytest.approx(QUANTIZE.noise(held), rel=0.2)


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_rounding_is_unbiased(bits):
    size, order, draws = (2, 16, 8, 8), (0, 2, 3, 1), 200
    x, held = normal(size, order), held_as(size, order, bits=bits)
    errors = torch.stack([round_trip(x, held, seed) - x for seed in range(draws)]).double()
    # 2048 mean errors in units of their standard error: normal if the codec is unbiased.
    z = errors.mean(0) / (errors.std(0) / draws**0.5).clamp(min=1e-12)
    free = errors.std(0) > 1e-4 * errors.std(0).max()
    assert z[free].abs().max() < 6
    assert abs(errors.mean() / errors.std()) < 5 / errors.numel() ** 0.5


def test_constant_groups_and_extremes_are_exact():
    x = torch.full((2, 512), 0.1)
    x[1, :256] = torch.linspace(-3, 5, 256)
    decoded = round_trip(x, held_as((2, 512), (0, 1), bits=2))
    assert torch.equal(decoded[0], x[0]) and torch.equal(decoded[1, 256:], x[1, 256:])
    assert decoded[1, 0] == -3 and decoded[1, 255] == 5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_non_finite_values_spoil_their_group_and_no_other(value, dtype):
    x = normal((4, 512), (0, 1), dtype)
    x[2, 300] = value
    for bits in (8, 1):
        decoded = round_trip(x, held_as((4, 512), (0, 1), dtype, bits))
        finite = decoded.isfinite()
        assert not finite[2, 256:].any()
        finite[2, 256:] = True
        assert finite.all()


def test_the_full_range_of_half_precision_survives():
    x = torch.tensor([[-65504.0, 65504.0, 0.0, 1.0]], dtype=torch.float16)
    assert round_trip(x, held_as((1, 4), (0, 1), torch.float16, 1)).isfinite().all()


def test_the_seed_changes_the_rounding():
    x = normal(*IMAGE)
    first = round_trip(x, held_as(*IMAGE, bits=2))
    assert torch.equal(first, round_trip(x, held_as(*IMAGE, bits=2)))
    assert not torch.equal(first, round_trip(x, held_as(*IMAGE, bits=2), seed=8))


def test_noise_falls_with_bits_and_with_smaller_groups():
    assert normal_noise(1, 256) > normal_noise(2, 256) > normal_noise(4, 256) > normal_noise(8, 256) > 0
    assert normal_noise(16, 256) == pytest.approx(normal_noise(8, 256) * (255 / 65535) ** 2)
    assert normal_noise(2, 64) < normal_noise(2, 256)
    assert normal_noise(2, 1) == normal_noise(2, 2) == 0
    assert 0 < group_noise((2, 3, 17, 19), (0, 2, 3, 1), 4) < normal_noise(4, 400)


@pytest.mark.parametrize(("size", "order", "dtype"), CASES[:2], ids=str)
def test_operators_pass_opcheck(size, order, dtype):
    x, seed = normal(size, order, dtype), torch.tensor([5])
    codes, ranges = torch.ops.xconv.quantize(x, seed, 2, order)
    torch.library.opcheck(torch.ops.xconv.quantize.default, (x, seed, 2, order))
    torch.library.opcheck(torch.ops.xconv.dequantize.default, (codes, ranges, size, order, 2, dtype))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="bits=3"):
        torch.ops.xconv.quantize(torch.ones(4), torch.tensor([1]), 3, (0,))
    with pytest.raises(ValueError, match="floating-point"):
        torch.ops.xconv.quantize(torch.ones(4, dtype=torch.int32), torch.tensor([1]), 4, (0,))
    with pytest.raises(ValueError, match="bits=None"):
        QUANTIZE.payload_bytes(SavedAs(CodecSpec("quantize"), (4,), torch.float32, (0,)))


@pytest.mark.parametrize("block", [1, 100])
@pytest.mark.parametrize(("size", "order", "dtype"), CASES, ids=str)
def test_draws_in_blocks_are_the_same(size, order, dtype, block, monkeypatch):
    x, held, token = normal(size, order, dtype), held_as(size, order, dtype), torch.tensor([3])
    whole = QUANTIZE.encode(x, token, held)
    monkeypatch.setattr(layout, "BLOCK", block)
    for part, other in zip(QUANTIZE.encode(x, token, held), whole, strict=True):
        assert torch.equal(part, other)
