"""Models of several graphs: one budget for the step, shared by what each graph can give."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xconv_fx.errors import BudgetExceededWarning, BudgetInfeasibleError
from xconv_fx.measure import physical_peak
from xconv_fx.plan import Plan
from xconv_fx.plan.report import read_json

# Dynamo asks the inputs of a later graph for their gradients, and means to hide this itself.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def block(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(2, after), nn.ReLU())


class Two(nn.Module):
    """The first graph could take all of the budget: the second one needs as much."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(block(3, 8), block(8, 8))
        self.second = nn.Sequential(block(8, 8), block(8, 8), nn.Conv2d(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


class Four(nn.Module):
    """A small U: what the first graph returns is read by the last one, and its gradient waits for the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(block(3, 8), block(8, 8))
        self.middle = nn.Sequential(nn.MaxPool2d(2), block(8, 16))
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.out = nn.Sequential(block(16, 8), nn.Conv2d(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        torch._dynamo.graph_break()
        x = self.middle(skip)
        torch._dynamo.graph_break()
        x = self.up(x)
        torch._dynamo.graph_break()
        return self.out(torch.cat([skip, x], 1))


class Unit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = block(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Loop(nn.Module):
    """Dynamo compiles no loop with a break in it, but what it calls: graphs that run several times."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Unit() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.blocks:
            x = unit(x)
            torch._dynamo.graph_break()
        return x


def squares(y: Tensor) -> Tensor:
    return y.square().mean()


@dataclass(frozen=True)
class Trained:
    """A step of a compiled model: its plans, its measured peak in bytes, and its gradients."""

    plans: tuple[Plan, ...]
    peak: int
    gradients: list[Tensor]


def trained(net: nn.Module, x: Tensor, report: Path, **options: Any) -> Trained:
    torch._dynamo.reset()
    given = {"verify": "off", "report": report, **options}
    model: Any = torch.compile(net, backend="xconv", options=given)
    squares(model(x)).backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    resident = (x, *net.parameters(), *net.buffers())
    peak = physical_peak(lambda: squares(model(x)).backward(), resident=resident).bytes
    return Trained(read_json(report), peak, gradients)


def refused(net: nn.Module, x: Tensor, **options: Any) -> BudgetInfeasibleError:
    torch._dynamo.reset()
    with pytest.raises(BudgetInfeasibleError) as error:
        torch.compile(net, backend="xconv", options={"mem_budget": 1000, **options})(x)
    return error.value


def test_the_smallest_budget_is_one_that_all_graphs_meet(tmp_path: Path) -> None:
    """It is named before anything runs, and what is measured keeps it."""
    torch.manual_seed(0)
    net = Four()
    error = refused(net, X, slices=1)
    assert "planned together" in str(error)
    assert any("graph" in name for name, _ in error.consumers)
    found = trained(net, X, tmp_path / "plans.json", mem_budget=error.smallest, slices=1)
    assert len(found.plans) == len(list(net.children()))
    assert found.peak <= error.smallest


def test_a_percentage_is_of_what_all_graphs_take(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Two()
    squares(net(X)).backward()
    expected = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    found = trained(net, X, tmp_path / "plans.json", mem_budget="65%", codecs="exact")
    (budget,) = {plan.budget for plan in found.plans}
    (baseline,) = {plan.baseline_peak for plan in found.plans}
    assert budget == pytest.approx(0.65 * baseline, rel=0.01)
    assert found.peak <= budget
    for gradient, exact in zip(found.gradients, expected, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-3, atol=1e-5)
    assert all("planned together" in plan.notes[-1] for plan in found.plans)
    first = found.plans[0]
    assert first.saved_after < first.saved_before, "the first graph leaves room for the second"


def test_graphs_that_run_several_times_in_a_step_are_planned_for_that(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Loop(), torch.randn(4, 8, 32, 32)
    error = refused(net, x)
    found = trained(net, x, tmp_path / "plans.json", mem_budget=error.smallest)
    # Only the first block reads what needs no gradient: a graph of its own.
    assert sorted(plan.calls for plan in found.plans) == [1, 3]
    assert found.peak <= error.smallest


def test_a_budget_without_room_for_what_a_loss_may_keep_is_tried(tmp_path: Path) -> None:
    """Whether the step's own loss keeps it is measured; where steps are not measured, there is nothing to try."""
    torch.manual_seed(0)
    net, x = Loop(count=6), torch.randn(4, 8, 32, 32)
    error = refused(net, x)
    below = error.smallest - net(x).nbytes // 2
    assert refused(net, x, mem_budget=below, verify="off").smallest == error.smallest
    with pytest.warns(BudgetExceededWarning, match="no room for what a loss may keep"):
        found = trained(net, x, tmp_path / "plans.json", mem_budget=below, verify="warn")
    assert found.peak <= below


def test_a_model_that_is_not_run_ahead_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, seen = Two(), []
    net.second.register_forward_hook(lambda *_: seen.append(1))
    found = trained(net, X, tmp_path / "plans.json", mem_budget="90%")
    assert "one after another: hooks" in found.plans[0].notes[-1]
