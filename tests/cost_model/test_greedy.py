from __future__ import annotations

import numpy as np
import pytest

from xconv_fx.cost_model.greedy import Table, descend, relax
from xconv_fx.cost_model.memory import Item, Option, Problem, peak


def noise_of(problem: Problem) -> np.ndarray:
    return np.array([option.noise for item in problem.items for option in item.options])


@pytest.mark.parametrize("seed", range(40))
def test_it_fits_when_it_says_so_and_is_always_legal(random_problems, legal, seed) -> None:
    problem = random_problems(seed, items=8)
    table = Table(problem)
    everything = np.ones(table.owner.size, dtype=bool)
    for share in (0.9, 0.7, 0.5):
        budget = int(peak(problem, [0] * 8)[0] * share)
        choice = descend(table, budget, noise_of(problem), everything)
        assert legal(problem, tuple(choice))
        assert table.alive(choice).max() == peak(problem, choice)[0]
        if peak(problem, choice)[0] <= budget:
            after = relax(table, choice, budget, noise_of(problem), everything)
            assert legal(problem, tuple(after))
            assert peak(problem, after)[0] <= budget
            assert table.cost(noise_of(problem), after) <= table.cost(noise_of(problem), choice)


@pytest.mark.parametrize("seed", range(10))
def test_blocked_is_what_breaks_a_need(random_problems, choices, legal, seed) -> None:
    problem = random_problems(seed, items=3)
    table = Table(problem)
    for choice in choices(problem):
        blocked = table.blocked(choice)
        for column, item in enumerate(table.owner.tolist()):
            changed = list(choice)
            changed[item] = column - int(table.first[item])
            assert blocked[column] != legal(problem, tuple(changed))


def test_it_takes_most_bytes_for_the_noise_and_takes_back_what_is_not_needed() -> None:
    """The small item goes first, being cheapest by the byte; the large one then makes it superfluous."""
    small = Item("small", (Option("keep", ((0, 0, 10),)), Option("coded", (), noise=0.1)))
    large = Item("large", (Option("keep", ((0, 0, 90),)), Option("coded", (), noise=1.0)))
    table = Table(Problem((0,), (small, large)))
    everything = np.ones(4, dtype=bool)
    noise = noise_of(table.problem)
    assert descend(table, 95, noise, everything) == [1, 0]
    assert descend(table, 20, noise, everything) == [1, 1]
    assert relax(table, [1, 1], 20, noise, everything) == [0, 1]


def test_it_leaves_alone_what_it_may_not_use() -> None:
    item = Item("a", (Option("keep", ((0, 0, 10),)), Option("coded", (), noise=0.1)))
    assert descend(Table(Problem((0,), (item,))), 5, np.zeros(2), np.array([True, False])) == [0]
