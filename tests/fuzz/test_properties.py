"""What holds for every shape, size and plan, tried on many: packing, sizes, plans, and linear backwards."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from xconv_fx.codec_spec import CodecSpec
from xconv_fx.ops import bitmask, layout, quantize
from xconv_fx.options.budget import Budget, parse_size
from xconv_fx.plan import Choice, Plan
from xconv_fx.units import format_size, sufficient_size

FEW = settings(max_examples=60, deadline=None)


@st.composite
def laid_out(draw, most=6000):
    """A shape of at most so many elements, and an order of its dimensions in memory."""
    size = draw(st.lists(st.integers(1, 40), min_size=1, max_size=5).filter(lambda s: math.prod(s) <= most))
    return tuple(size), tuple(draw(st.permutations(range(len(size)))))


@FEW
@given(laid_out(), st.sampled_from(layout.CODE_BITS), st.integers(0, 2**31))
def test_packing_round_trips(shape, bits, seed):
    plan = layout.packing(*shape, bits)
    torch.manual_seed(seed)
    codes = torch.randint(1 << bits, plan.physical, dtype=torch.int32)
    words = layout.pack(layout.to_rows(codes, plan), plan)
    assert words.nbytes == plan.word_bytes
    assert torch.equal(layout.unpack(words, plan), codes)


@FEW
@given(laid_out(), st.integers(0, 2**31))
def test_masks_round_trip(shape, seed):
    size, order = shape
    torch.manual_seed(seed)
    mask = torch.rand(size) < 0.5
    assert torch.equal(bitmask.unpack_mask(bitmask.pack_mask(mask, order), size, order), mask)


@FEW
@given(laid_out(), st.sampled_from([1, 2, 4, 8]), st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(0, 2**31))
def test_codes_are_within_a_step(shape, bits, shift, scale, seed):
    """Every value is decoded to one of the two levels beside it, so within a step of its group, and so of the whole."""
    size, order = shape
    torch.manual_seed(seed)
    x = torch.randn(size, dtype=torch.float64) * scale + shift
    found = quantize.dequantize(
        *quantize.quantize(x, torch.tensor([seed]), bits, order), size, order, bits, torch.float64
    )
    step = (x.max() - x.min()).item() / ((1 << bits) - 1)
    assert (found - x).abs().max().item() <= step * (1 + 1e-6) + 1e-9 * (abs(shift) + scale)
    assert x.min() - 1e-6 * step <= found.min() and found.max() <= x.max() + 1e-6 * step


@FEW
@given(laid_out())
def test_orders_are_found_in_strides(shape):
    size, order = shape
    x = layout.to_logical(torch.empty(layout.physical_size(size, order)), order)
    assert x.stride() == layout.dense_strides(size, order)
    assert layout.to_physical(x, layout.order_of(size, x.stride())).is_contiguous()


@given(st.integers(1, 2**62))
def test_a_sufficient_size_is_enough_and_not_much_more(size):
    again = parse_size(sufficient_size(size))
    assert size <= again <= size * 1.011 + 1


@given(st.integers(1, 2**62))
def test_sizes_that_are_shown_can_be_typed(size):
    assert parse_size(format_size(size)) == pytest.approx(size, rel=5.1e-3, abs=0.5)


@given(st.integers(1, 2**62))
def test_bytes_are_exact_however_written(size):
    assert parse_size(size) == parse_size(str(size)) == parse_size(f"{size}B") == Budget.parse(size).resolve(1)


@given(st.floats(0.01, 100), st.integers(1, 2**50))
def test_a_percentage_is_at_most_its_share(percent, baseline):
    budget = Budget.parse(f"{percent:.4f}%").resolve(baseline)
    assert 1 <= budget <= max(1, math.ceil(baseline))
    assert budget == 1 or abs(budget - float(f"{percent:.4f}") / 100 * baseline) <= 1 + 1e-9 * baseline


NAMES = st.text(max_size=12)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
COUNTS = st.integers(0, 2**60)
SPECS = st.builds(
    CodecSpec, codec=NAMES, probes=st.none() | COUNTS, bits=st.none() | COUNTS, kind=st.none() | NAMES,
    means=st.booleans(), by_sample=NAMES,
)  # fmt: skip
CHOICES = st.builds(
    Choice, residual=NAMES, layer=NAMES, source=NAMES, shape=st.lists(st.integers(0, 2**31), max_size=5).map(tuple),
    dtype=NAMES, uses=st.lists(NAMES, max_size=3).map(tuple), spec=SPECS, bytes_before=COUNTS, bytes_after=COUNTS,
    noise=NUMBERS, time=NUMBERS, readers=st.lists(NAMES, max_size=2).map(tuple),
)  # fmt: skip
PLANS = st.builds(
    Plan, device=NAMES, budget=st.none() | COUNTS, baseline_peak=COUNTS, predicted_peak=COUNTS, peak_at=NAMES,
    fixed_bytes=COUNTS, choices=st.lists(CHOICES, max_size=3).map(tuple), noise=NUMBERS, time=NUMBERS, gap=NUMBERS,
    audited_peak=st.none() | COUNTS, notes=st.lists(NAMES, max_size=3).map(tuple), slices=st.integers(1, 64),
    layers=st.lists(st.tuples(NAMES, NUMBERS), max_size=3).map(tuple),
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(PLANS)
def test_plans_survive_json(plan):
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()


def test_backwards_are_linear_in_the_incoming_gradient():
    """Exact codecs, in slices of which some run again: the gradient of a sum is the sum of the gradients."""
    torch._dynamo.reset()
    net = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(3, 12), nn.SiLU(), nn.Conv2d(12, 12, 3, padding=1),
                        nn.ReLU(), nn.Conv2d(12, 5, 1)).double()  # fmt: skip
    call = torch.compile(net, backend="xconv", options={"mem_budget": "70%", "codecs": "exact", "slices": 2})
    x = torch.randn(4, 3, 20, 20, dtype=torch.float64)

    def backward(tangent):
        return torch.cat([g.flatten() for g in torch.autograd.grad(call(x), net.parameters(), tangent)])

    tangents = torch.randn(2, 4, 5, 20, 20, dtype=torch.float64)
    one, other = (backward(tangent) for tangent in tangents)
    for a, b in itertools.product((-3.0, 0.5), repeat=2):
        torch.testing.assert_close(backward(a * tangents[0] + b * tangents[1]), a * one + b * other)
