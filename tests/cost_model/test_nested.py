"""Steps of several graphs: against a simulation that runs the graphs one inside the other, and enumeration."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from xconv_fx.cost_model.memory import Item, Option, Problem, peak, profile
from xconv_fx.cost_model.nested import Nested, Part, Run, nest
from xconv_fx.cost_model.solver import minimum_peak, solve

KEEP = Option("keep", ((0, 2, 10),))
# Held over the loss, and read in the backward.
ITEM = Item("r", (KEEP, Option("half", ((0, 2, 5), (2, 2, 10)), noise=1.0)))
PLAIN = Part(Problem((1, 100, 2), (ITEM,), ("f", "loss", "b")), 1)


def simulated(parts: Sequence[Part], runs: Sequence[Run], choice: Sequence[tuple[int, ...]], between: int) -> list[int]:
    """Bytes alive, by running the step: what an outer run holds at its turn is added to all that is inside."""

    def steps(index: int, held: int) -> list[int]:
        run = runs[index]
        part = parts[run.part]
        own = profile(part.problem, choice[run.part]).tolist()
        before = [size + held + run.forward for size in own[: part.turn]]
        after = [size + held + run.backward for size in own[part.turn + 1 :]]
        if index + 1 == len(runs):
            return [*before, own[part.turn] + held + run.forward + between, *after]
        return [*before, *steps(index + 1, held + own[part.turn]), *after]

    return steps(0, 0)


def drawn(seed: int, random_problems: Callable[..., Problem]) -> Nested:
    rng = random.Random(seed)
    parts = []
    for number in range(rng.randint(1, 3)):
        problem = random_problems(seed * 10 + number, items=rng.randint(2, 3), steps=rng.randint(3, 6), options=3)
        parts.append(Part(problem, rng.randrange(len(problem.base))))
    order = [rng.randrange(len(parts)) for _ in range(rng.randint(1, 4))]
    return nest(parts, [Run(part, rng.randint(0, 20), rng.randint(0, 20)) for part in order], between=seed)


@pytest.mark.parametrize("seed", range(30))
def test_a_step_is_what_running_it_would_take(
    seed: int, random_problems: Callable[..., Problem], choices: Callable[..., object]
) -> None:
    nested = drawn(seed, random_problems)
    rng = random.Random(seed)
    for _ in range(5):
        choice = [rng.randrange(len(item.options)) for item in nested.problem.items]
        split = [nested.choice_of(index, choice) for index in range(len(nested.parts))]
        assert profile(nested.problem, choice).tolist() == simulated(nested.parts, nested.runs, split, seed)


def test_all_parts_are_solved_for_together() -> None:
    """The least noise within a budget, by enumeration: the solver takes from whichever part gives the most."""
    dear = Item("dear", (KEEP, Option("half", ((0, 2, 5),), noise=7.0)))
    parts = [PLAIN, Part(Problem((3, 0, 4), (ITEM, dear), ("f", "loss", "b")), 1)]
    nested = nest(parts, [Run(0), Run(1)])
    lowest = minimum_peak(nested.problem).peak
    every = list(itertools.product(range(2), repeat=3))
    assert lowest == min(peak(nested.problem, choice)[0] for choice in every)
    for budget in range(lowest, peak(nested.problem, (0, 0, 0))[0] + 1, 3):
        noises = {
            sum(item.options[i].noise for item, i in zip(nested.problem.items, choice, strict=True))
            for choice in every
            if peak(nested.problem, choice)[0] <= budget
        }
        assert solve(nested.problem, budget).noise == min(noises)


def test_needs_stay_within_a_part(random_problems: Callable[..., Problem], legal: Callable[..., bool]) -> None:
    parts = [Part(random_problems(seed, items=4), 4) for seed in (1, 2)]
    nested = nest(parts, [Run(0), Run(1)])
    rng = random.Random(0)
    for _ in range(200):
        choice = tuple(rng.randrange(len(item.options)) for item in nested.problem.items)
        apart = all(legal(part.problem, nested.choice_of(i, choice)) for i, part in enumerate(parts))
        assert legal(nested.problem, choice) == apart


def test_what_is_inside_leaves_room_for_what_is_held() -> None:
    """`inside` and `held` add up to the most that is alive between a part's forward and its backward."""
    nested = nest([PLAIN, PLAIN], [Run(0), Run(1, forward=3), Run(1, backward=50), Run(0)])
    for choice in itertools.product(range(2), repeat=2):
        alive = profile(nested.problem, choice)
        for part in range(2):
            inner = [place for run, place in zip(nested.runs, nested.places, strict=True) if run.part == part]
            held = nested.held(part, choice)
            own = {step for a, b, c in inner for step in (*range(a, b), c)}
            tops = [
                alive[step] - held * sum(first <= step < after for _, first, after in inner)
                for step in range(min(first for _, first, _ in inner), max(after for _, _, after in inner))
                if step not in own
            ]
            assert nested.inside(part, choice) == max(tops)
            outer = np.concatenate([[*alive[a:b], *alive[c : c + 1]] for a, b, c in inner])
            assert nested.own_peak(part, choice) == outer.max()


def test_a_part_that_runs_twice_has_one_item_and_takes_twice_the_time() -> None:
    slow = Item("r", (KEEP, Option("slow", ((0, 2, 1),), time=0.5)))
    nested = nest([Part(Problem((0, 0, 0), (slow,)), 1)], [Run(0), Run(0)])
    assert len(nested.problem.items) == 1
    assert profile(nested.problem, (0,)).tolist() == [10, 20, 20, 20, 10]
    assert nested.problem.items[0].options[1].time == 1.0
    assert nested.problem.labels == ()


def test_steps_keep_their_names() -> None:
    second = Part(Problem((0, 0, 0), (), ("f2", "loss2", "b2")), 1)
    assert nest([PLAIN, second], [Run(0), Run(1)]).problem.labels == ("f", "f2", "loss2", "b2", "b")


def test_a_step_has_a_run_and_a_part_has_a_turn() -> None:
    with pytest.raises(ValueError, match="at least one"):
        nest([PLAIN], [])
    with pytest.raises(ValueError, match="none of 3 steps"):
        Part(PLAIN.problem, 3)
