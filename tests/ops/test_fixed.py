"""Fixed point: the sign of the result is exact without exception, errors are as predicted, kernels as the reference."""

from __future__ import annotations

import pytest
import torch
from torch._inductor.utils import fresh_cache, run_and_get_code

from xconv_fx.codec_spec import CodecSpec
from xconv_fx.ops import FIXED, SavedAs, fixed, layout, lowering

SIZE, ORDER = (4, 24, 9, 13), (0, 2, 3, 1)
CASES = [
    (SIZE, ORDER, torch.float32, 1),
    ((2, 3, 17, 19), (0, 2, 3, 1), torch.bfloat16, 1),
    ((2, 3, 4, 5, 6), (0, 1, 2, 3, 4), torch.float64, 2),
    ((3, 8, 50), (0, 1, 2), torch.float16, 3),
    ((4, 1009), (0, 1), torch.float32, 1),
]
# Borders inside, at the edge of and far beyond the bins, on both sides; no border at all; a channel of zeros.
GAMMAS = (1.0, -1.0, 0.5, -2.0, 1e-3, -1e-3, 1e-20, 0.0, -0.0, 3.0, 1e30, -0.3)
BETAS = (0.0, 0.3, -1.45, 2.9, 1.0, -1.0, 1.0, -1.0, 0.5, 0.0, 7.0, 0.1)


def held_as(size, order, dtype=torch.float32, bits=4):
    return SavedAs(CodecSpec("fixed", bits=bits), size, dtype, order)


def normal(size, order, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    physical = torch.randn(layout.physical_size(size, order), generator=generator, dtype=torch.float64)
    return layout.to_logical(physical.to(dtype), order)


def statistics(x, rows=1):
    """Mean and deviation of every channel, or of every sample and channel; (rows, channels)."""
    wide = x.to(layout.accumulator(x.dtype))
    flat = (wide if rows > 1 else wide.transpose(0, 1).unsqueeze(0)).flatten(2)
    return flat.mean(2), flat.std(2, correction=0)


def normalised(x, mean, deviation, gamma, beta):
    """The layer's result, computed as the layer does."""
    shape = (-1, x.shape[1], *(1,) * (x.dim() - 2))
    hat = (x - mean.view(shape)) / deviation.view(shape)
    return hat * gamma.view(shape) + beta.view(shape)


@pytest.mark.parametrize("bits", fixed.SPAN)
@pytest.mark.parametrize("offset", [0.0, 1e3, -1e5])
def test_signs_are_exact_whatever_gamma_and_beta(bits, offset):
    x = normal(SIZE, ORDER) * 2 + offset
    x[0, :, 0, 0] += 40  # An outlier on the far side of borders that are beyond the bins.
    x[1, :, 0, 0] -= 40
    gamma, beta = (torch.tensor(values).repeat(2)[None] for values in (GAMMAS, BETAS))
    mean, deviation = statistics(x)
    positive = normalised(x, mean, deviation, gamma, beta) > 0
    held, table = held_as(SIZE, ORDER, bits=bits), fixed.scales(mean, deviation, beta, gamma, bits)
    assert table.isfinite().all()
    (words,) = fixed.encode(x, table, held, positive)
    assert torch.equal(fixed.sign(words, table, held), positive)
    assert words.nbytes == FIXED.payload_bytes(held)


@pytest.mark.parametrize("bits", fixed.SPAN)
def test_the_decoded_value_has_the_sign_as_well(bits):
    # The replayed comparison agrees with the true one: middles of bins are half a step away from the border.
    x = normal(SIZE, ORDER)
    gamma, beta = torch.linspace(-2, 2, 24)[None], torch.linspace(3, -3, 24).sin()[None] * 2
    mean, deviation = statistics(x)
    true = normalised(x, mean, deviation, gamma, beta)
    held, table = held_as(SIZE, ORDER, bits=bits), fixed.scales(mean, deviation, beta, gamma, bits)
    decoded = FIXED.decode(fixed.encode(x, table, held, true > 0), table, held)
    assert torch.equal(normalised(decoded, mean, deviation, gamma, beta) > 0, true > 0)


@pytest.mark.parametrize(("size", "order", "dtype", "rows"), CASES, ids=str)
@pytest.mark.parametrize("bits", fixed.SPAN)
def test_values_move_half_a_step_unless_they_are_cut_off(size, order, dtype, rows, bits):
    x = normal(size, order, dtype)
    mean, deviation = statistics(x, rows)
    held, table = held_as(size, order, dtype, bits), fixed.scales(mean, deviation, None, None, bits)
    decoded = FIXED.decode(FIXED.encode(x, table, held), table, held)
    assert decoded.dtype == dtype and decoded.stride() == x.stride()
    shape = (-1, size[1], *(1,) * (len(size) - 2))
    hat, back = ((v - mean.view(shape)) / deviation.view(shape) for v in (x.double(), decoded.double()))
    inside = hat.abs() <= fixed.SPAN[bits] / 2
    step = fixed.SPAN[bits] / 2**bits
    assert (hat - back).abs()[inside].max() <= step / 2 + 4 * torch.finfo(dtype).eps * 4


@pytest.mark.parametrize("bits", fixed.SPAN)
def test_the_error_is_as_predicted(bits):
    x = normal((16, 16, 32, 32), ORDER)
    held, table = held_as((16, 16, 32, 32), ORDER, bits=bits), fixed.scales(*statistics(x), None, None, bits)
    error = (FIXED.decode(FIXED.encode(x, table, held), table, held) - x).square().mean() / x.square().mean()
    assert error.item() == pytest.approx(FIXED.noise(held), rel=0.05)


def test_what_is_not_a_number_spoils_its_channel_and_no_other():
    x = normal(SIZE, ORDER)
    x[1, 3, 2, 2] = float("nan")
    mean, deviation = statistics(x)
    table = fixed.scales(mean, deviation, torch.zeros(1, 24), torch.ones(1, 24), 4)
    held = held_as(SIZE, ORDER)
    decoded = FIXED.decode(fixed.encode(x, table, held, x > 0), table, held)
    assert decoded[:, 3].isnan().all() and decoded.isnan().sum() == decoded[:, 3].numel()


# Raised by torch 2.13 itself, while it imports Inductor.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("size", "order", "dtype", "rows"), [CASES[1], CASES[2]], ids=str)
def test_kernels_compute_what_the_reference_does(size, order, dtype, rows):
    lowering.install()
    torch._dynamo.reset()
    held = held_as(size, order, dtype)

    def every_operator(x, mean, deviation, beta, gamma):
        table = fixed.scales(mean, deviation, beta, gamma, 4)
        (words,) = fixed.encode(x, table, held, x > 0.2)
        (plain,) = FIXED.encode(x, fixed.scales(mean, deviation, None, None, 4), held)
        return words, plain, FIXED.decode((words,), table, held), fixed.sign(words, table, held)

    x = normal(size, order, dtype)
    mean, deviation = statistics(x, rows)
    inputs = (x, mean, deviation, torch.full_like(mean, -0.2), torch.ones_like(mean))
    with fresh_cache():
        outputs, (code,) = run_and_get_code(torch.compile(every_operator, backend="inductor", dynamic=False), *inputs)
    for output, expected in zip(outputs, every_operator(*inputs), strict=True):
        assert output.stride() == expected.stride() and torch.equal(output, expected)
    assert "torch.ops.xconv" not in code


@pytest.mark.parametrize(("size", "order", "dtype", "rows"), CASES[1:2], ids=str)
def test_operators_pass_opcheck(size, order, dtype, rows):
    x = normal(size, order, dtype)
    mean, deviation = statistics(x, rows)
    table = fixed.scales(mean, deviation, mean, deviation, 2)
    words = torch.ops.xconv.fix(x, x > 0, table, 2, order)
    torch.library.opcheck(torch.ops.xconv.fix.default, (x, x > 0, table, 2, order))
    torch.library.opcheck(torch.ops.xconv.unfix.default, (words, table, size, order, 2, dtype))
    torch.library.opcheck(torch.ops.xconv.fixed_sign.default, (words, table, size, order, 2))


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match="bits=3: codec 'fixed' has 8, 4, 2"):
        fixed.scales(torch.zeros(1, 2), torch.ones(1, 2), None, None, 3)
    with pytest.raises(ValueError, match="bits=0"):
        FIXED.payload_bytes(SavedAs(CodecSpec("fixed"), (4, 4), torch.float32, (0, 1)))
