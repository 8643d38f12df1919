"""Plans to begin with, in which everything is made again for segments of one length."""

from __future__ import annotations

import itertools

import pytest

from xconv_fx.cost_model.memory import Item, Option, Problem, peak
from xconv_fx.cost_model.segments import legal, segmented
from xconv_fx.cost_model.solver import minimum_peak

SIZE = 10


def chain(length: int) -> Problem:
    """A chain of values, of which the backward reads the last one first.

    Each is kept, made again of the one before it when it is read, which needs that kept, or at the first step of the
    backward with all others, which needs that the one before it is there then.
    """
    turn = length
    items = []
    for place in range(length):
        read = turn + length - 1 - place
        before = [(place - 1, frozenset({0}))] if place else []
        together = [(place - 1, frozenset({0, 2}))] if place else []
        items.append(
            Item(
                f"value {place}",
                (
                    Option("keep", ((place, read, SIZE),)),
                    Option("again", ((read, read, SIZE),), time=1.0, needs=tuple(before), segment=0),
                    Option("again", ((turn, read, SIZE),), time=1.0, needs=tuple(together), segment=3),
                ),
            )
        )
    return Problem((0,) * (2 * length), tuple(items))


def test_a_plan_for_each_length():
    problem = chain(6)
    short, long = segmented(problem)
    # Alone, each is made of what is kept: every other one, seen from the end.
    assert [problem.items[i].options[place].segment for i, place in enumerate(long)] == [3] * 6
    assert all(
        short[other] in allowed
        for item, place in zip(problem.items, short, strict=True)
        for other, allowed in item.options[place].needs
    )
    assert 0 in short and 1 in short and 2 not in short


def test_what_an_option_needs_is_kept():
    problem = chain(3)
    assert legal(problem, [1, 1, 1]) in ([0, 1, 0], [0, 0, 1], [1, 0, 1])
    assert legal(problem, [1, 2, 2]) == [0, 2, 2]
    assert legal(problem, [2, 2, 2]) == [2, 2, 2]


def test_without_segments_there_is_nothing_to_begin_with():
    assert list(segmented(Problem((1,), (Item("x", (Option("keep", ()),)),)))) == []


@pytest.mark.parametrize("busy", [0, 1, 3])
def test_the_least_peak_is_found(busy):
    """Where the forward has room for all values, for few, and for none."""
    plain = chain(5)
    problem = Problem((*(busy * SIZE for _ in range(5)), *(0 for _ in range(5))), plain.items)

    def is_legal(choice):
        needs = (need for item, place in zip(problem.items, choice, strict=True) for need in item.options[place].needs)
        return all(choice[other] in allowed for other, allowed in needs)

    every = itertools.product(*(range(len(item.options)) for item in problem.items))
    least = min(peak(problem, choice)[0] for choice in every if is_legal(choice))
    found = minimum_peak(problem)
    assert found.peak == peak(problem, found.choice)[0] == least and is_legal(found.choice)
