"""The frontier is what single plans say, whatever its points share; memory over the step adds up to their peaks."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from xconv_fx.errors import BudgetInfeasibleError, OptionError
from xconv_fx.step.explain import explain
from xconv_fx.tools.sweep import data
from xconv_fx.tools.sweep.frontier import frontier


class Broken(nn.Module):
    """Two graphs: the trace breaks between its parts."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(torch.relu(x))


def sliceable() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1))


def test_points_ascend_from_the_lowest_budget_to_none(found):
    budgets = [point.budget for point in found.points]
    assert budgets[-1] is None and budgets[:-1] == sorted(budgets[:-1]) and len(budgets) == 5
    assert all(point.peak <= point.budget for point in found.points[:-1])
    costs = [point.slowdown + 10 * point.noise for point in found.points]
    assert costs == sorted(costs, reverse=True) and costs[0] > 0 and costs[-1] == 0


def test_below_the_lowest_budget_there_is_no_plan(found, net, images):
    with pytest.raises(BudgetInfeasibleError):
        explain(net(), images, mem_budget=found.points[0].budget * 99 // 100, slices=1)


@pytest.mark.parametrize("index", [0, 2])
def test_a_point_is_the_plan_that_is_made_for_its_budget_alone(found, index, net, images):
    point = found.points[index]
    (alone,) = explain(net(), images, mem_budget=point.budget, slices=1).plans
    (shared,) = point.plans
    assert alone.choices == shared.choices
    assert (alone.predicted_peak, alone.noise, alone.time) == (point.peak, point.noise, point.time)


def test_the_model_is_traced_once(monkeypatch, net, images):
    from xconv_fx.compiler import capture

    runs = []
    monkeypatch.setattr(capture, "analyse", lambda joint, _run=capture.analyse: runs.append(joint) or _run(joint))
    torch._dynamo.reset()
    few = frontier(net(), images, points=2, slices=1)
    traces = len(runs)
    many = frontier(net(), images, points=9, slices=1)
    assert len(few.points) == 2 and len(many.points) == 9
    assert len(runs) - traces == traces


def test_slices_of_the_batch(images):
    torch._dynamo.reset()
    found = frontier(sliceable(), images, points=3, codecs="exact")
    lowest = found.points[0]
    assert lowest.slices > 1 and lowest.noise == 0 and lowest.time > 0
    assert max(lowest.memory[0].total) == lowest.peak


def test_graphs_share_a_budget(net, images):
    torch._dynamo.reset()
    found = frontier(Broken(net()), images, points=4)
    assert {len(point.plans) for point in found.points} == {2} and len(found.points) >= 3
    for point in found.points[:-1]:
        assert all(plan.predicted_peak <= point.budget for plan in point.plans)
    torch._dynamo.reset()
    alone = explain(Broken(net()), images, mem_budget=found.points[1].budget).plans
    assert [plan.fixed_bytes for plan in alone] == [plan.fixed_bytes for plan in found.points[1].plans]


def test_memory_over_the_step_reaches_the_predicted_peak_where_the_plan_says(found):
    for point in found.points:
        (memory,), (plan,) = point.memory, point.plans
        assert max(memory.total) == plan.predicted_peak
        assert memory.labels[memory.total.index(plan.predicted_peak)] == plan.peak_at
        assert memory.fixed == plan.fixed_bytes and min(memory.rest) >= 0
        assert [name for name, _ in memory.phases] == ["forward", "loss", "backward"]
        at_loss = dict(memory.phases)["loss"]
        held = sum(size for loads in memory.residuals for first, last, size in loads if first <= at_loss <= last)
        assert held == plan.saved_after


def test_few_columns_keep_the_peak(found):
    from xconv_fx.tools.sweep import memory

    phases = ("forward",) * 500 + ("loss",) + ("backward",) * 900
    runs = memory._runs(phases, 100)
    assert [step for run in runs for step in run] == list(range(1401)) and len(runs) <= 102
    assert all(len({phases[step] for step in run}) == 1 for run in runs)


def test_the_budget_that_is_asked_for_is_among_the_points(net, images):
    torch._dynamo.reset()
    found = frontier(net(), images, points=3, slices=1, mem_budget="90%")
    assert len(found.points) == 4 and not found.missed
    assert found.points[found.selected].budget == found.wanted
    missed = frontier(net(), images, points=3, slices=1, mem_budget=1000)
    assert missed.missed and missed.left_out == ("1.00 kB cannot be met",)


def test_one_point_is_refused(net, images):
    with pytest.raises(OptionError, match="2 or more"):
        frontier(net(), images, points=1)


def test_json_has_every_point_and_plan(found):
    text = data.to_json(found)
    points = json.loads(text)["points"]
    assert [point["budget"] for point in points] == [point.budget for point in found.points]
    assert all(len(point["plans"]) == 1 and point["plans"][0]["choices"] for point in points)
