from __future__ import annotations

import random

import numpy as np
import pytest

from xconv_fx.cost_model.memory import Item, Option, Problem, dominant_steps, first_columns, load_matrix, peak, profile

KEEP = Option("keep", ((1, 4, 10),))
CODED = Option("coded", ((1, 4, 2), (4, 4, 10)))


def test_profile_adds_closed_intervals() -> None:
    problem = Problem((5, 5, 5, 20, 5, 5), (Item("a", (KEEP, CODED)), Item("b", (Option("keep", ((0, 5, 1),)),))))
    assert profile(problem, (0, 0)).tolist() == [6, 16, 16, 31, 16, 6]
    assert profile(problem, (1, 0)).tolist() == [6, 8, 8, 23, 18, 6]
    assert peak(problem, (0, 0)) == (31, 3)


def test_peak_is_the_first_of_equal_steps_and_may_exceed_32_bits() -> None:
    problem = Problem((1, 2**40, 2**40), ())
    assert peak(problem, ()) == (2**40, 1)


def test_load_matrix_samples_the_loads() -> None:
    problem = Problem((0,) * 6, (Item("a", (KEEP, CODED)),))
    assert load_matrix(problem, range(6)).T.tolist() == [[0, 10, 10, 10, 10, 0], [0, 2, 2, 2, 12, 0]]
    assert load_matrix(problem, (0, 2, 4)).T.tolist() == [[0, 10, 10], [0, 2, 12]]
    assert first_columns(Problem((0,), (Item("a", (KEEP_ONE,)), Item("b", (KEEP_ONE, KEEP_ONE))))).tolist() == [0, 1]


KEEP_ONE = Option("keep", ((0, 0, 1),))


def test_dominated_steps_go() -> None:
    growing = Problem((0, 0, 5, 0, 0, 0), (Item("a", (KEEP,)), Item("b", (Option("keep", ((2, 4, 3),)),))))
    assert dominant_steps(growing) == (2,)


def test_the_step_where_something_is_decoded_stays() -> None:
    problem = Problem((0, 0, 1, 0, 0, 0), (Item("a", (KEEP, CODED)),))
    assert dominant_steps(problem) == (2, 4)


@pytest.mark.parametrize("seed", range(40))
def test_dominant_steps_hold_every_peak(random_problems, seed) -> None:
    problem = random_problems(seed, items=4, steps=30)
    steps = list(dominant_steps(problem))
    assert steps == sorted(set(steps))
    rng = random.Random(seed)
    for _ in range(50):
        alive = profile(problem, [rng.randrange(4) for _ in problem.items])
        assert alive[steps].max() == alive.max()


def test_domination_makes_a_networks_table_small(network) -> None:
    problem = network(100)
    assert len(dominant_steps(problem)) < 60 < len(problem.base)


def test_a_problem_without_items_has_its_base() -> None:
    problem = Problem((3, 7, 7, 2), ())
    assert np.array_equal(profile(problem, ()), [3, 7, 7, 2])
    assert dominant_steps(problem) == (1,)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Problem((), ()), "at least one step"),
        (lambda: Problem((1, 2), (), ("one",)), "1 labels for 2 steps"),
        (lambda: Problem((1,), (Item("a", ()),)), "'a'.*option 0"),
        (lambda: Problem((1,), (Item("a", (Option("keep", (), needs=((1, frozenset({0})),)),)),)), "option 0"),
        (lambda: Problem((1,), (Item("a", (KEEP,)),)), "load 1..4 is not an interval within 0..0"),
        (lambda: Problem((1,), (Item("a", (Option("keep", (), noise=-1.0),)),)), "noise -1.0"),
        (lambda: Problem((1,), (Item("a", (Option("keep", (), time=float("inf")),)),)), "time inf"),
        (lambda: _needing(0, {0}), "needs item 0"),
        (lambda: _needing(2, {0}), "needs item 2"),
        (lambda: _needing(1, {1}), r"options \[1\] of 'b'"),
    ],
)
def test_malformed_problems_are_named(build, says) -> None:
    with pytest.raises(ValueError, match=says):
        build()


def _needing(item: int, options: set[int]) -> Problem:
    again = Option("recompute", (), needs=((item, frozenset(options)),))
    return Problem((1,), (Item("a", (KEEP_ONE, again)), Item("b", (KEEP_ONE,))))
