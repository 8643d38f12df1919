"""`explain`: the plan that training would start from, without generating code or touching memory."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from torch import nn

from xconv_fx.errors import BudgetInfeasibleError, OptionError, UnsupportedModelError
from xconv_fx.explain import explain

# Raised by torch 2.13 itself, while it imports Inductor.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

X = (2, 3, 16, 16)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))


@pytest.fixture(autouse=True)
def no_code(monkeypatch):
    """Generating code is an error."""
    from torch._inductor.graph import GraphLowering

    def refuse(*_: object) -> None:
        raise AssertionError("explain must not generate code")

    monkeypatch.setattr(GraphLowering, "codegen", refuse)
    torch._dynamo.reset()


def test_without_a_budget():
    (plan,) = explain(net(), torch.randn(X)).plans
    assert plan.budget is None and plan.audited_peak is None
    assert plan.predicted_peak == plan.baseline_peak > plan.fixed_bytes > 0
    assert {choice.codec for choice in plan.choices} <= {"keep"}


def test_with_a_budget():
    (plan,) = explain(net(), torch.randn(X), mem_budget="90%").plans
    assert plan.predicted_peak <= plan.budget < plan.baseline_peak
    assert [choice.codec for choice in plan.choices] == ["quantize"]
    (exact,) = explain(net(), torch.randn(X), mem_budget="100%", codecs="exact").plans
    assert exact.noise == 0


def test_a_model_on_the_meta_device_has_the_same_plan():
    with torch.device("meta"):
        model = net()
    (there,) = explain(model, torch.empty(X, device="meta"), mem_budget="90%").plans
    torch._dynamo.reset()
    (here,) = explain(net(), torch.randn(X), mem_budget="90%").plans
    assert (there.choices, there.predicted_peak, there.budget) == (here.choices, here.predicted_peak, here.budget)


def test_every_graph_of_a_broken_trace_has_a_plan():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = net(), nn.Conv2d(8, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(torch.relu(x))

    explanation = explain(Broken(), torch.randn(X))
    assert len(explanation.plans) == 2
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(explanation)
        shown = console.export_text()
    assert "graph 1 of 2" in shown and "graph 2 of 2" in shown


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    explain(model, torch.randn(X), mem_budget="100%")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_errors_have_their_own_types():
    with pytest.raises(BudgetInfeasibleError, match="smallest feasible"):
        explain(net(), torch.randn(X), mem_budget=1)
    with pytest.raises(OptionError, match="no such option"):
        explain(net(), torch.randn(X), mem_bugdet="1GB")
    with pytest.raises(ValueError, match="loss='cross'"):
        explain(net(), torch.randn(X), loss="cross")
    with pytest.raises(UnsupportedModelError, match="requires a gradient"):
        explain(net().requires_grad_(False), torch.randn(X))
