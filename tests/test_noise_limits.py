"""Limits of what is predicted: constraints of the search, with defaults that protect learning. Nothing is compiled."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from xconv_fx.compiler.candidates import at_least
from xconv_fx.cost_model.solver import Infeasible
from xconv_fx.errors import BudgetInfeasibleError, OptionError
from xconv_fx.options import PROTECTION, UNSET, NoiseLimits, Options
from xconv_fx.plan import Plan
from xconv_fx.step.explain import explain

X = torch.randn(4, 3, 32, 32)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for before, after in ((3, 16), (16, 16)):
        parts += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*parts, nn.Conv2d(16, 4, 1))


@functools.cache
def plan(budget: int | str, **options: object) -> Plan:
    (found,) = explain(net(), X, mem_budget=budget, **options).plans
    return found


@functools.cache
def smallest(**options: object) -> BudgetInfeasibleError:
    with pytest.raises(BudgetInfeasibleError) as caught:
        plan("1kB", **options)
    return caught.value


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        ({}, PROTECTION),
        ({"max_noise": None}, NoiseLimits()),
        ({"max_layer_noise": None}, NoiseLimits()),
        ({"max_noise": "none"}, NoiseLimits()),
        ({"max_noise": 0.5}, NoiseLimits(noise=0.5)),
        ({"max_layer_noise": 0.5}, NoiseLimits(layer=0.5)),
        ({"codecs": "actnn:L3"}, NoiseLimits()),
        ({"probes": 8}, NoiseLimits()),
    ],
)
def test_what_holds_when_nothing_is_given(given, limits):
    options = Options.parse(given)
    assert options.noise_limits == limits
    assert options.protected == (limits == PROTECTION)
    assert options.given_limits() == {name: limit for name, limit in given.items() if isinstance(limit, float)}
    assert Options().max_noise is UNSET


def test_by_default_no_budget_drowns_a_gradient():
    protected, free = smallest(), smallest(max_noise=None)
    assert free.smallest < protected.smallest
    assert any("max_noise=None lifts" in note for note in protected.notes)
    assert not any("max_noise" in note for note in free.notes)
    lowest = plan(protected.smallest)
    assert lowest.noise <= PROTECTION.noise and lowest.noisiest[1] <= PROTECTION.layer
    lifted = plan(free.smallest, max_noise=None)
    assert max(lifted.noise, lifted.noisiest[1]) > 1
    with pytest.raises(BudgetInfeasibleError, match="max_noise=None"):
        plan(free.smallest)


def test_a_superset_of_codecs_needs_no_larger_budget():
    budgets = [smallest(codecs=codecs).smallest for codecs in ("all", "exact,quantize:4", "exact")]
    assert budgets == sorted(budgets)


def test_the_budget_that_an_error_names_has_a_plan_however_little_time_the_solver_has(monkeypatch):
    def stopped(*_: object, **__: object) -> None:
        raise Infeasible(budget=0, smallest=0, choice=(), step=0, bound=0)

    budget = smallest(codecs="exact").smallest
    monkeypatch.setattr("xconv_fx.compiler.candidates.solve", stopped)
    assert plan.__wrapped__(budget, codecs="exact").predicted_peak <= budget


def test_a_limit_of_noise_finds_the_plans_that_keep_it():
    """What is preferred has more noise; a plan that has less is found, and the least is what an error names."""
    budget = smallest(codecs="exact,quantize").smallest * 11 // 10
    preferred = plan(budget, codecs="exact,quantize", max_noise=None, prefer="speed")
    quietest = plan(budget, codecs="exact,quantize", max_noise=None, prefer="exact")
    assert quietest.noise < preferred.noise
    limit = (quietest.noise + preferred.noise) / 2
    assert plan(budget, codecs="exact,quantize", max_noise=limit, prefer="speed").noise <= limit
    layer = plan(budget, codecs="exact,quantize", max_layer_noise=quietest.noisiest[1] * 1.01, prefer="speed")
    assert layer.noisiest[1] <= quietest.noisiest[1] * 1.01 < preferred.noisiest[1]
    if quietest.noise:
        with pytest.raises(OptionError, match=rf"max_noise.*less than {at_least(quietest.noise)}"):
            plan(budget, codecs="exact,quantize", max_noise=quietest.noise / 2)


def test_a_limit_of_time_is_kept_at_the_price_of_noise():
    budget = smallest(codecs="exact,quantize").smallest * 11 // 10
    exact = plan(budget, codecs="exact,quantize", prefer="exact")
    seconds = plan(budget, codecs="exact,quantize", prefer="speed").time
    assert seconds < exact.time
    with pytest.raises(OptionError, match=r"max_slowdown=0\.0: no plan within the budget"):
        plan(budget, codecs="exact,quantize", prefer="exact", max_slowdown=0.0)


@pytest.mark.parametrize("value", [1e-9, 0.0032, 0.0999, 1.0, 2.35, 1234.5])
def test_a_limit_that_an_error_names_is_kept(value):
    assert value <= float(at_least(value)) <= value * 1.11


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reserve": 1000}, "reserve=1000: without mem_budget"),
        ({"sample_bits": True}, "sample_bits=True: without mem_budget"),
        ({"codecs": "quantize:4"}, "codecs=.*without mem_budget nothing is planned"),
        ({"codecs": "all,fixed"}, "codecs=.*or a preset"),
        ({"codecs": "actnn:L1", "reserve": 1000}, "reserve=1000"),
    ],
)
def test_what_would_do_nothing_without_a_budget_is_refused(options, words):
    with pytest.raises(OptionError, match=words):
        explain(net(), X, **options)


@pytest.mark.parametrize(
    "options",
    [{"codecs": "exact"}, {"codecs": "all"}, {"prefer": "speed"}, {"max_noise": 0.0}, {"max_slowdown": 0.0}],
)
def test_what_a_step_without_compression_keeps_is_no_error(options):
    Options.parse(options).check_effect()


def test_slices_without_a_budget_are_run():
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1))
    (found,) = explain(model, X, slices=2).plans
    assert (found.slices, found.held_slices, found.noise, found.budget) == (2, 2, 0, None)
    assert {choice.codec for choice in found.choices} == {"keep"}
    with pytest.raises(OptionError, match="slices=3: write one of 2, 4"):
        explain(model, X, slices=3)
    with pytest.raises(OptionError, match="slices=2: the batch cannot be sliced"):
        explain(net(), X, slices=2)
