"""Problems of a given shape, from a seed: small ones to enumerate, and one as large as a network's."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import pytest

from xconv_fx.cost_model.memory import Item, Option, Problem


def random_problem(seed: int, *, items: int = 5, steps: int = 9, options: int = 4) -> Problem:
    """Any loads at all, a third of the options lossless, a quarter with needs."""
    rng = random.Random(seed)
    built: list[Item] = []
    for index in range(items):
        choices = [Option("keep", ((0, steps - 1, rng.randint(20, 60)),))]
        for number in range(1, options):
            ends = [sorted(rng.sample(range(steps), 2)) for _ in range(2)]
            loads = tuple((first, last, rng.randint(0, 30)) for first, last in ends)
            noise = rng.choice([0.0, rng.lognormvariate(-2, 2), rng.lognormvariate(-2, 2)])
            other = rng.choice([place for place in range(items) if place != index])
            needs = ((other, frozenset(rng.sample(range(options), 2))),) if rng.random() < 0.25 else ()
            layers = ((f"l{rng.randrange(2)}", noise), ("l2", noise * rng.random())) if noise else ()
            choices.append(Option(f"o{number}", loads, noise, rng.uniform(-0.2, 1.0), needs, layers))
        built.append(Item(f"r{index}", tuple(choices)))
    return Problem(tuple(rng.randint(0, 50) for _ in range(steps)), tuple(built))


def network_problem(residuals: int, seed: int = 0) -> Problem:
    """Residual i is made at step i and read at its mirror image; quantised, folded, or replayed from its neighbour."""
    rng = random.Random(seed)
    last = 2 * residuals - 1
    base = [rng.randint(0, 40_000_000) for _ in range(2 * residuals)]
    items = []
    for made in range(residuals):
        used, size = last - made, rng.randint(200, 30_000) * 1024
        decoded = (used, used, size)
        choices = [Option("keep", ((made, used, size),))]
        for bits in (8, 4, 2, 1):
            noise = rng.uniform(0.3, 3) * (6.4 / (2**bits - 1)) ** 2 / 6 / residuals
            choices.append(Option(f"{bits} bits", ((made, used, size * bits // 32), decoded), noise, size / 1e10))
        for fold in (32, 128):
            noise = rng.uniform(0.3, 3) * 1.7 * fold / residuals
            choices.append(Option(f"fold {fold}", ((made, used, size // fold // 4), decoded), noise, size / 5e9))
        if made % 8:
            needs = ((made - 1, frozenset({0})),)
            choices.append(Option("recompute", (decoded,), 0.0, rng.uniform(1, 30) * size / 1e10, needs))
        items.append(Item(f"r{made}", tuple(choices)))
    return Problem(tuple(base), tuple(items))


def every_choice(problem: Problem) -> Iterator[tuple[int, ...]]:
    """All choices that have what they need."""
    for choice in itertools.product(*(range(len(item.options)) for item in problem.items)):
        if respects_needs(problem, choice):
            yield choice


def respects_needs(problem: Problem, choice: tuple[int, ...]) -> bool:
    return all(
        choice[other] in allowed
        for item, index in zip(problem.items, choice, strict=True)
        for other, allowed in item.options[index].needs
    )


@pytest.fixture
def random_problems() -> Callable[..., Problem]:
    return random_problem


@pytest.fixture
def network() -> Callable[..., Problem]:
    return network_problem


@pytest.fixture
def choices() -> Callable[[Problem], Iterator[tuple[int, ...]]]:
    return every_choice


@pytest.fixture
def legal() -> Callable[[Problem, tuple[int, ...]], bool]:
    return respects_needs
