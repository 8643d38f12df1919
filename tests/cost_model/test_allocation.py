"""Sharing bits out: against enumeration, and against the optimum that ActNN's weights have in the continuous limit."""

from __future__ import annotations

import itertools

import pytest

from xconv_fx.cost_model.allocation import share_bits
from xconv_fx.cost_model.memory import Item, Option
from xconv_fx.cost_model.solver import Infeasible

WIDTHS = (8, 4, 2, 1)
LAYERS = [(100, 5.0), (400, 0.3), (50, 0.01), (200, 2.0), (300, 1.0)]  # Elements and sensitivities.


def items(layers):
    return [
        Item(str(n), tuple(Option(str(b), (), weight / (2**b - 1) ** 2, 0.0) for b in WIDTHS))
        for n, (_, weight) in enumerate(layers)
    ]


def totals(layers, choice):
    bits = sum(elements * WIDTHS[place] for (elements, _), place in zip(layers, choice, strict=True))
    noise = sum(weight / (2 ** WIDTHS[place] - 1) ** 2 for (_, weight), place in zip(layers, choice, strict=True))
    return bits, noise


@pytest.mark.parametrize("average", [1, 1.5, 2, 3, 8])
def test_the_least_noise_of_all_allocations(average):
    total = int(average * sum(elements for elements, _ in LAYERS))
    choice = share_bits(items(LAYERS), [[elements * b for b in WIDTHS] for elements, _ in LAYERS], total)
    every = (totals(LAYERS, other) for other in itertools.product(range(len(WIDTHS)), repeat=len(LAYERS)))
    least = min(noise for bits, noise in every if bits <= total)
    bits, noise = totals(LAYERS, choice)
    assert bits <= total and noise <= least * 1.01


def test_what_is_struck_out_is_not_taken_and_what_takes_nothing_may_be_needed():
    # The second has no bits of its own if the first has 4, of which there are just enough.
    first = Item("codes", tuple(Option(str(bits), (), 1 / bits, 0.0) for bits in (8, 4, 2)))
    second = Item(
        "again", (Option("codes", (), 0.5, 0.0), Option("from the first", (), 0.1, 0.0, ((0, frozenset({1})),)))
    )
    bits = [[None, 40, 20], [20, 0]]
    assert share_bits([first, second], bits, 40) == (1, 1)
    assert share_bits([first, second], [[None, None, 20], [20, 0]], 40) == (2, 0)
    assert share_bits([], [], 0) == ()


def test_too_few_bits_are_an_error():
    with pytest.raises(Infeasible):
        share_bits(items(LAYERS), [[elements * b for b in WIDTHS] for elements, _ in LAYERS], 10)
