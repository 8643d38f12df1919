"""Dense probes: unbiased, as noisy as predicted, independent of layout and blocking, two equal forms."""

from __future__ import annotations

import pytest
import torch

from xconv_fx.measure import allocated_by
from xconv_fx.ops import dense
from xconv_fx.ops.conv import weight_gradient
from xconv_fx.ops.dense import KINDS, dense_noise, gradient_by_probe, gradient_by_sample

ops = torch.ops.xconv


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small only wait for the threads of other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seed(value):
    return torch.tensor([value])


def roundtrip(x, value, probes, kind):
    sums = ops.dense_encode(x, seed(value), probes, kind)
    return ops.dense_decode(sums, seed(value), x.shape, kind, x.dtype)


@pytest.fixture
def x():
    return torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_unbiased_and_as_noisy_as_predicted(kind, x):
    """The mean of 100 draws within 5 standard errors at every element; the mean energy within 20 % of the formula."""
    draws = torch.stack([roundtrip(x, value, 8, kind) for value in range(100)])
    error = (draws.mean(0) - x).abs() / (draws.std(0) / 10)
    assert error.max() < 5
    energy = (draws - x).square().sum() / 100 / x.square().sum()
    assert energy == pytest.approx(dense_noise(kind, 8, 60, x.shape[1]), rel=0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_moments_of_the_probes(kind):
    z = dense.Probes(seed(5), kind, 32, 4096, torch.float64).samples(slice(None))
    assert abs(z.mean()) < 5 / 362
    assert z.square().mean() == pytest.approx(1, abs=0.02)
    correlation = z @ z.t() / 4096 - torch.eye(32, dtype=torch.float64)
    assert correlation.abs().max() < (1e-12 if kind == "orthogonal" else 0.12)


def test_neighbouring_gaussian_probes_share_no_draws():
    """Draws in common leave the probes uncorrelated; their squares would correlate by 0.06."""
    z = dense.Probes(seed(5), "gaussian", 32, 4096, torch.float64).samples(slice(None))
    squares = (z.square() - 1) / 2**0.5
    assert abs((squares[1:] * squares[:-1]).mean()) < 5 / (4096 * 31) ** 0.5


def test_every_probe_orthogonal_is_exact(x):
    assert (roundtrip(x, 1, 60, "orthogonal") - x).abs().max() < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_changes_the_draw(kind, x):
    first = roundtrip(x, 1, 4, kind)
    assert torch.equal(first, roundtrip(x, 1, 4, kind))
    assert not torch.allclose(first, roundtrip(x, 2, 4, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [1, 40, 1000])
def test_blocks_and_layout_do_not_change_the_sums(kind, block, x, monkeypatch):
    whole = ops.dense_encode(x, seed(1), 7, kind)
    again = roundtrip(x, 1, 7, kind)
    monkeypatch.setattr(dense, "BLOCK", block)
    torch.testing.assert_close(ops.dense_encode(x, seed(1), 7, kind), whole)
    channels_last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(ops.dense_encode(channels_last, seed(1), 7, kind), whole)
    torch.testing.assert_close(roundtrip(x, 1, 7, kind), again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, x):
    sums = ops.dense_encode(x.to(dtype), seed(1), 6, "gaussian")
    assert sums.dtype == torch.float32
    decoded = ops.dense_decode(sums, seed(1), x.shape, "gaussian", dtype)
    assert decoded.dtype == dtype
    exact = roundtrip(x.to(dtype).double(), 1, 6, "gaussian")
    assert (decoded - exact).norm() < 0.01 * exact.norm()


CASES = {
    "stride and groups": ((6, 4, 7, 8), (6, 2, 3, 3), ([2, 2], [1, 1], [1, 1], False, [0, 0], 2)),
    "dilation 3d": ((5, 2, 5, 5, 5), (3, 2, 2, 2, 2), ([1] * 3, [0] * 3, [2] * 3, False, [0] * 3, 1)),
    "transposed 1d": ((5, 4, 6), (4, 3, 3), ([2], [1], [1], True, [1], 1)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_both_forms_are_the_same_number(kind, case, monkeypatch):
    size, weight_size, geometry = CASES[case]
    x = torch.randn(size, dtype=torch.float64)
    out = torch.ops.aten.convolution(x, torch.zeros(weight_size, dtype=x.dtype), None, *geometry)
    grad_out = torch.randn_like(out)
    if x.dim() == 4:
        grad_out = grad_out.to(memory_format=torch.channels_last)
    monkeypatch.setattr(dense, "BLOCK", 300)
    sums = ops.dense_encode(x, seed(1), 4, kind)
    arguments = (grad_out, sums, seed(1), kind, size, weight_size)
    reference = weight_gradient(grad_out, roundtrip(x, 1, 4, kind), weight_size, *geometry)
    forms = [gradient_by_sample] if kind == "independent" else [gradient_by_sample, gradient_by_probe]
    results = [form(*arguments, geometry) for form in forms]
    for result in (*results, ops.dense_weight_gradient(*arguments, *geometry)):
        assert (result - reference).norm() < 1e-12 * reference.norm()


def test_the_cheaper_form_is_taken(monkeypatch):
    taken = []
    for form in ("gradient_by_probe", "gradient_by_sample"):
        monkeypatch.setattr(dense, form, lambda grad_out, *rest, form=form: taken.append(form) or grad_out.new_ones(1))
    for probes in (3, 4):
        rest = (seed(0), "gaussian", [4, 1, 1], [1, 1, 1], [1], [0], [1], False, [0], 1)
        ops.dense_weight_gradient(torch.zeros(4, 1, 1), torch.zeros(4, probes), *rest)
    assert taken == ["gradient_by_probe", "gradient_by_sample"]


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_does_not_lower_the_precision(kind, x):
    single = x.float()
    expected = ops.dense_encode(single, seed(1), 8, kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ops.dense_encode(single, seed(1), 8, kind), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_not_finite_values_surface(kind, x):
    x[1, 2, 3, 4] = float("nan")
    decoded = roundtrip(x, 1, 8, kind)
    assert decoded[1, 2 if kind == "independent" else slice(None)].isnan().all()
    assert decoded[0].isfinite().all()


def test_errors_name_the_value_and_the_choices(x):
    with pytest.raises(ValueError, match=r"'hadamard'.*gaussian, rademacher, orthogonal"):
        ops.dense_encode(x, seed(1), 8, "hadamard")
    with pytest.raises(ValueError, match="probes is 0"):
        ops.dense_encode(x, seed(1), 0, "gaussian")
    with pytest.raises(ValueError, match="probes is 61; at most 60"):
        ops.dense_encode(x, seed(1), 61, "orthogonal")


def test_opcheck():
    x = torch.randn(3, 2, 4, 4)
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    sums = ops.dense_encode(x, seed(1), 2, "orthogonal")
    torch.library.opcheck(ops.dense_encode.default, (x, seed(1), 2, "orthogonal"))
    torch.library.opcheck(ops.dense_decode.default, (sums, seed(1), x.shape, "orthogonal", torch.bfloat16))
    arguments = (torch.randn(3, 4, 4, 4), sums, seed(1), "orthogonal", x.shape, [4, 2, 3, 3], *geometry)
    torch.library.opcheck(ops.dense_weight_gradient.default, arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_take_less_than_half_of_an_input(kind):
    x = torch.randn(8, 16, 32, 32)
    peak, sums = allocated_by(lambda: ops.dense_encode(x, seed(1), 8, kind))
    assert peak < x.nbytes / 2
    peak, _ = allocated_by(lambda: ops.dense_decode(sums[0], seed(1), x.shape, kind, x.dtype))
    assert peak - x.nbytes < x.nbytes / 2
