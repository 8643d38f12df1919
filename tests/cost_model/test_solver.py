from __future__ import annotations

import math
import time
from itertools import pairwise

import pytest

from xconv_fx.cost_model.memory import Item, Option, Problem, peak, profile
from xconv_fx.cost_model.program import RELATIVE_GAP, Answer, Program
from xconv_fx.cost_model.solver import TIE, Infeasible, minimum_peak, solve


def total(problem: Problem, choice: tuple[int, ...], field: str) -> float:
    return math.fsum(getattr(item.options[o], field) for item, o in zip(problem.items, choice, strict=True))


def budgets(problem: Problem, smallest: int) -> list[int]:
    """From the smallest possible to "keep everything"."""
    largest = peak(problem, [0] * len(problem.items))[0]
    return [smallest, (3 * smallest + largest) // 4, (smallest + largest) // 2, largest]


@pytest.mark.parametrize("seed", range(25))
def test_it_finds_what_enumeration_finds(random_problems, choices, seed) -> None:
    problem = random_problems(seed)
    table = [
        (peak(problem, choice)[0], total(problem, choice, "noise"), total(problem, choice, "time"))
        for choice in choices(problem)
    ]
    smallest = min(table)[0]
    for budget in budgets(problem, smallest):
        fitting = [(noise, seconds) for top, noise, seconds in table if top <= budget]
        quietest = min(fitting)[0]
        fastest = min(seconds for noise, seconds in fitting if noise <= quietest * (1 + TIE))
        plan = solve(problem, budget)
        assert plan.noise <= quietest * (1 + TIE) * (1 + RELATIVE_GAP) + 1e-12
        assert plan.time <= fastest + 2 * RELATIVE_GAP * len(problem.items)
        assert plan.bound <= quietest + 1e-12
        with_price = solve(problem, budget, tradeoff=2.0)
        best = min(noise + 2 * seconds for noise, seconds in fitting)
        assert with_price.objective == pytest.approx(with_price.noise + 2 * with_price.time)
        assert best - 1e-9 <= with_price.objective <= best + 2 * TIE * len(problem.items)
        assert with_price.bound <= best + 1e-9


@pytest.mark.parametrize("seed", range(15))
def test_plans_are_legal_and_within_budget_at_every_step(random_problems, legal, seed) -> None:
    problem = random_problems(seed, items=12, steps=40)
    lowest = minimum_peak(problem)
    for budget in budgets(problem, lowest.peak):
        plan = solve(problem, budget)
        assert legal(problem, plan.choice)
        assert profile(problem, plan.choice).max() == plan.peak <= budget
        assert profile(problem, plan.choice)[plan.step] == plan.peak
        assert plan.noise == pytest.approx(total(problem, plan.choice, "noise"))
        assert 0 <= plan.gap <= 1.1 * TIE


@pytest.mark.parametrize("seed", range(15))
def test_minimum_peak_is_what_enumeration_finds(random_problems, choices, legal, seed) -> None:
    problem = random_problems(seed)
    smallest = min(peak(problem, choice)[0] for choice in choices(problem))
    lowest = minimum_peak(problem)
    assert legal(problem, lowest.choice)
    assert peak(problem, lowest.choice) == (lowest.peak, lowest.step)
    assert lowest.bound <= smallest <= lowest.peak <= smallest * (1 + RELATIVE_GAP)
    with pytest.raises(Infeasible, match=f"no plan within {smallest - 1} bytes") as caught:
        solve(problem, smallest - 1)
    assert caught.value.smallest == lowest.peak
    assert peak(problem, caught.value.choice) == (caught.value.smallest, caught.value.step)
    assert solve(problem, caught.value.smallest).peak <= caught.value.smallest


@pytest.mark.parametrize("seed", range(5))
def test_a_larger_budget_is_never_worse(random_problems, seed) -> None:
    problem = random_problems(seed, items=10, steps=20)
    lowest = minimum_peak(problem).peak
    largest = peak(problem, [0] * 10)[0]
    noises = [solve(problem, lowest + (largest - lowest) * part // 8).noise for part in range(9)]
    assert all(after <= before * (1 + TIE) for before, after in pairwise(noises))
    assert noises[0] > 0 == noises[-1]


def test_lossless_comes_first_however_long_it_takes() -> None:
    slow = Option("recompute", (), time=100.0)
    quick = Option("8 bits", ((0, 0, 2),), noise=1e-9)
    problem = Problem((0,), (Item("a", (Option("keep", ((0, 0, 8),)), quick, slow)),))
    assert solve(problem, 8).choice == (0,)
    assert solve(problem, 7).choice == (2,)
    assert solve(problem, 7, tradeoff=1e-6).choice == (1,)
    assert solve(problem, 7, tradeoff=math.inf).choice == (1,)
    for tradeoff in (-1.0, math.nan):
        with pytest.raises(ValueError, match="tradeoff"):
            solve(problem, 7, tradeoff=tradeoff)


def test_noise_of_any_magnitude_is_told_apart() -> None:
    """1e-9 against 2e-9 while another item is forced to 1e3: seven decades below what HiGHS resolves at one scale."""
    forced = Item("forced", (Option("keep", ((0, 0, 100),)), Option("fold", (), noise=1e3)))
    gentle = [Option("keep", ((1, 1, 100),)), Option("a", (), noise=2e-9), Option("b", (), noise=1e-9)]
    alone = Problem((0, 0), (Item("gentle", tuple(gentle)),))
    assert solve(alone, 50).choice == (2,)
    both = Problem((0, 0), (forced, Item("gentle", tuple(gentle))))
    assert solve(both, 50).choice[0] == 1
    assert solve(both, 50).noise == pytest.approx(1e3)


def test_gigabytes_are_counted_to_the_byte() -> None:
    """One byte over 8 GB is over, although HiGHS's tolerance is thousands of bytes at that size."""
    size = 2_000_000_000
    items = tuple(
        Item(f"r{place}", (Option("keep", ((0, 0, size),)), Option("coded", ((0, 0, size - 1),), noise=1.0 + place)))
        for place in range(4)
    )
    problem = Problem((0,), items)
    assert solve(problem, 4 * size).choice == (0, 0, 0, 0)
    assert solve(problem, 4 * size - 1).choice == (1, 0, 0, 0)
    assert solve(problem, 4 * size - 3).peak == 4 * size - 3
    assert solve(problem, 4 * size - 4).choice == (1, 1, 1, 1)
    with pytest.raises(Infeasible):
        solve(problem, 4 * size - 5)


@pytest.mark.parametrize("missing", [100, 5_000])
def test_a_plan_a_few_bytes_over_8_gb_does_not_hide_a_better_one(missing) -> None:
    """ "nearly" is quietest but a few bytes too large; the greedy walk goes on from it to "all", the best is a pair."""
    size = 1_000_000_000
    nearly, every = Option("nearly", ((0, 0, missing),), noise=1.0), Option("all", (), noise=1.5)
    half = (Option("keep", ((0, 0, size // 2),)), Option("coded", (), noise=0.6))
    items = (Item("a", (Option("keep", ((0, 0, size),)), nearly, every)), Item("b", half), Item("c", half))
    assert solve(Problem((7 * size,), items), 8 * size).choice == (0, 1, 1)


def test_a_plan_over_the_budget_is_asked_for_again_with_a_lower_limit(random_problems, monkeypatch) -> None:
    """HiGHS may return what fits to its tolerance only; here it "keeps everything" the first time."""
    problem = random_problems(2)
    largest = peak(problem, [0] * 5)[0]
    budget = (minimum_peak(problem).peak + largest) // 2
    expected = solve(problem, budget)
    original = Program.cheapest
    limits: list[int] = []

    def sloppy(self, costs, limit, *rest, relax=False) -> Answer:
        if relax:
            return Answer(None, -math.inf, infeasible=False)
        limits.append(limit)
        if len(limits) == 1:
            return Answer([0] * 5, 0.0, infeasible=False)
        return original(self, costs, limit + largest - budget, *rest)

    monkeypatch.setattr(Program, "cheapest", sloppy)
    assert solve(problem, budget).choice == expected.choice
    assert limits[:2] == [budget, 2 * budget - largest]


def test_without_items_there_is_only_the_base() -> None:
    problem = Problem((4, 9, 2), ())
    assert solve(problem, 9).choice == ()
    assert minimum_peak(problem).peak == 9
    with pytest.raises(Infeasible) as caught:
        solve(problem, 8)
    assert (caught.value.smallest, caught.value.step) == (9, 1)


@pytest.mark.parametrize("seed", range(10))
def test_without_highs_the_greedy_plan_stands_in(random_problems, legal, monkeypatch, seed) -> None:
    def no_answer(*_: object, **__: object) -> Answer:
        return Answer(None, -math.inf, infeasible=False)

    problem = random_problems(seed, items=10, steps=20)
    monkeypatch.setattr(Program, "cheapest", no_answer)
    monkeypatch.setattr(Program, "lower_peak", no_answer)
    lowest = minimum_peak(problem)
    budget = (lowest.peak + peak(problem, [0] * 10)[0]) // 2
    plan = solve(problem, budget)
    assert legal(problem, plan.choice)
    assert peak(problem, plan.choice)[0] <= budget
    assert plan.bound == 0
    assert plan.gap == (1.0 if plan.noise else 0.0)


def test_a_network_is_solved_in_two_seconds_with_a_small_gap(network, legal) -> None:
    """200 residuals of up to 8 options, 400 steps. The limit is twice the time asked for: machines are shared."""
    problem = network(200)
    budget = peak(problem, [0] * 200)[0] // 5
    began = time.monotonic()
    plan = solve(problem, budget)
    assert time.monotonic() - began < 4
    assert legal(problem, plan.choice)
    assert peak(problem, plan.choice)[0] <= budget
    assert plan.gap < 0.05


def test_it_is_deterministic(network, random_problems) -> None:
    problems = [network(40, seed) for seed in range(2)] + [random_problems(seed, items=10) for seed in range(3)]
    for problem in problems:
        budget = peak(problem, [0] * len(problem.items))[0] * 3 // 5
        assert solve(problem, budget, time_limit=20) == solve(problem, budget, time_limit=20)
