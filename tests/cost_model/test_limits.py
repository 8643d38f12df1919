from __future__ import annotations

import math

import pytest

from xconv_fx.cost_model.greedy import Table
from xconv_fx.cost_model.limits import Limits
from xconv_fx.cost_model.memory import Item, Option, Problem, peak
from xconv_fx.cost_model.program import RELATIVE_GAP, Answer, Program
from xconv_fx.cost_model.solver import TIE, Infeasible, OverLimits, minimum_peak, solve

LIMITS = (
    Limits(noise=0.0),
    Limits(noise=0.2),
    Limits(layer=0.1),
    Limits(layer=0.0),
    Limits(noise=0.5, layer=0.2),
    Limits(seconds=0.8),
    Limits(noise=0.3, layer=0.15, seconds=1.0),
)


def taken(problem: Problem, choice: tuple[int, ...]) -> tuple[float, float, float]:
    """Noise of the plan, of its noisiest layer, and seconds."""
    options = [item.options[o] for item, o in zip(problem.items, choice, strict=True)]
    layers: dict[str, float] = {}
    for option in options:
        for layer, noise in option.layers:
            layers[layer] = layers.get(layer, 0.0) + noise
    return math.fsum(o.noise for o in options), max(layers.values(), default=0.0), math.fsum(o.time for o in options)


def keeps(problem: Problem, choice: tuple[int, ...], limits: Limits) -> bool:
    wanted = (limits.noise, limits.layer, limits.seconds)
    return all(
        limit is None or found <= limit * (1 + 1e-6)
        for found, limit in zip(taken(problem, choice), wanted, strict=True)
    )


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("seed", range(6))
def test_it_finds_what_enumeration_finds_within_the_limits(random_problems, choices, seed, limits) -> None:
    problem = random_problems(seed)
    table = [(peak(problem, choice)[0], taken(problem, choice)[0]) for choice in choices(problem)
             if keeps(problem, choice, limits)]  # fmt: skip
    smallest = min(table)[0]
    lowest = minimum_peak(problem, limits=limits)
    assert keeps(problem, lowest.choice, limits)
    assert lowest.bound <= smallest <= lowest.peak <= smallest * (1 + RELATIVE_GAP)
    for budget in (smallest, smallest + 20, smallest + 60):
        quietest = min(noise for top, noise in table if top <= budget)
        plan = solve(problem, budget, limits=limits)
        assert keeps(problem, plan.choice, limits)
        assert plan.peak <= budget
        assert plan.noise <= quietest * (1 + TIE) * (1 + RELATIVE_GAP) + 1e-12
        assert plan.bound <= quietest + 1e-12
    with pytest.raises(Infeasible) as caught:
        solve(problem, smallest - 1, limits=limits)
    assert caught.value.smallest == lowest.peak


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("seed", range(4))
def test_without_highs_the_greedy_plan_keeps_the_limits(random_problems, legal, monkeypatch, seed, limits) -> None:
    nothing = Answer(None, -math.inf, infeasible=False)
    monkeypatch.setattr(Program, "cheapest", lambda *args, **kwargs: nothing)
    monkeypatch.setattr(Program, "lower_peak", lambda *args, **kwargs: nothing)
    problem = random_problems(seed, items=12, steps=40)
    lowest = minimum_peak(problem, limits=limits)
    plan = solve(problem, lowest.peak, limits=limits, tradeoff=0.1)
    for found in (lowest.choice, plan.choice):
        assert legal(problem, found)
        assert keeps(problem, found, limits)


@pytest.mark.parametrize("seed", range(4))
def test_rounded_relaxations_are_brought_within_the_limits(random_problems, seed, monkeypatch) -> None:
    """Whatever HiGHS answers, here the noisiest of everything, the plan keeps the limits."""
    problem = random_problems(seed, items=8)
    noisiest = [max(range(len(item.options)), key=lambda o: item.options[o].noise) for item in problem.items]
    monkeypatch.setattr(Program, "cheapest", lambda *args, **kwargs: Answer(list(noisiest), -math.inf, False))
    limits = Limits(noise=0.3, layer=0.1)
    lowest = minimum_peak(problem, limits=limits)
    assert keeps(problem, solve(problem, lowest.peak, limits=limits).choice, limits)


def test_several_small_noises_add_up_in_one_layer() -> None:
    """Two residuals of one layer, each within the limit: only one of them may be in codes."""
    coded = Option("codes", ((0, 0, 10),), noise=0.06, layers=(("stem", 0.06),))
    items = tuple(Item(name, (Option("keep", ((0, 0, 100),)), coded)) for name in "ab")
    problem = Problem((0,), items)
    assert solve(problem, 110, limits=Limits(layer=0.1)).peak == 110
    with pytest.raises(Infeasible) as caught:
        solve(problem, 20, limits=Limits(layer=0.1))
    assert caught.value.smallest == 110
    assert solve(problem, 20, limits=Limits(layer=0.12)).peak == 20


def test_what_must_be_noisy_is_over_the_limits_whatever_the_budget() -> None:
    problem = Problem((0,), (Item("a", (Option("probe", ((0, 0, 1),), noise=3.0),)),))
    with pytest.raises(OverLimits):
        solve(problem, 10**6, limits=Limits(noise=1.0))
    assert solve(problem, 10**6, limits=Limits(noise=3.0)).noise == 3.0


def test_no_limits_are_no_rows(random_problems) -> None:
    table = Table(random_problems(0))
    assert table.caps.shape[0] == 0
    assert table.permitted.all()


@pytest.mark.parametrize("name", ["noise", "layer", "seconds"])
def test_a_negative_limit_is_an_error(name) -> None:
    with pytest.raises(ValueError, match=f"{name}: -1"):
        Limits(**{name: -1})
