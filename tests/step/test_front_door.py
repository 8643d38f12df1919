"""`xconv_fx.compile`: a budget that holds or an error; `plans` and `report` say what was made of it."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch._higher_order_ops import while_loop

import xconv_fx
from xconv_fx.errors import BudgetLostError, OptionError, UnsupportedModelError, UsageError

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

BUDGET = 3_000_000


def images(size: int = 16) -> Tensor:
    return torch.randn(2, 3, size, size)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))


class Breaking(nn.Module):
    """Breaks between its layers, and runs the last one eagerly when told so."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.eager = net(), False

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        torch._dynamo.graph_break()
        return torch.compiler.disable(self.body[2].forward)(x) if self.eager else x


def test_what_is_wrong_is_said_at_the_call() -> None:
    with pytest.raises(OptionError, match="mem_bugdet='8GB': no such option"):
        xconv_fx.compile(net(), mem_bugdet="8GB")
    with pytest.raises(OptionError, match="mem_budget='60': so few bytes hold nothing; write '60%'"):
        xconv_fx.compile(net(), "60")
    with pytest.raises(OptionError, match="reserve=1000000: without mem_budget"):
        xconv_fx.compile(net(), reserve="1MB")
    with pytest.raises(OptionError, match="mem_budget='8 bananas'"):
        xconv_fx.compile(net(), "8 bananas")
    with pytest.raises(OptionError, match="model=3: write a module"):
        xconv_fx.compile(3)  # type: ignore[type-var]
    with torch.compiler.set_stance("force_eager"), pytest.raises(BudgetLostError, match="stance 'force_eager'"):
        xconv_fx.compile(net(), BUDGET)


def test_what_is_not_compiled_is_named() -> None:
    other = torch.compile(net(), backend="eager")
    for ask in (xconv_fx.plans, xconv_fx.report):
        with pytest.raises(UsageError, match=r"Sequential was not compiled with this backend: .*xconv_fx\.compile"):
            ask(net())
        with pytest.raises(UsageError, match="OptimizedModule was not compiled with this backend"):
            ask(other)
        with pytest.raises(UsageError, match="run a training step first"):
            ask(xconv_fx.compile(net(), BUDGET))


def test_copies_compile_for_themselves() -> None:
    model = net()
    compiled = xconv_fx.compile(model, BUDGET)
    compiled(images()).mean().backward()
    for made in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        with pytest.raises(UsageError, match="run a training step first"):
            xconv_fx.plans(made)
        torch.testing.assert_close(made.state_dict(), compiled.state_dict())
    made(images()).mean().backward()
    assert xconv_fx.plans(made)[0].budget == BUDGET
    assert len(xconv_fx.plans(compiled)) == 1


class Counting(nn.Module):
    """A counter of float64 without dimensions, of which Dynamo loses what is added."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.register_buffer("steps", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        return self.conv(x) / (1 + 0.1 * self.steps)


def test_changes_that_dynamo_loses_are_an_error() -> None:
    model = Counting()
    with pytest.raises(UnsupportedModelError, match=r"steps.*Dynamo loses what the model changes in place.*\+="):
        xconv_fx.compile(model)(images())
    assert model.steps == 0
    model.steps = model.steps.float()  # type: ignore[assignment]
    xconv_fx.compile(model)(images())
    assert model.steps == 1


class Layers(nn.Module):
    """Two layers, between which a value decides."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (nn.Conv2d(before, 8, 3, padding=1) for before in (3, 8))


class Deciding(Layers):
    """Goes one of two ways."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        return torch.cond(x.mean() > 0, lambda y: self.last(y), lambda y: y.sin(), (y,))


def test_branches_run_as_inductor_runs_them_and_are_not_planned() -> None:
    model = Deciding()
    for sign in (-1.0, 1.0):
        x = images().abs() * sign
        y = model.first(x).relu()
        y = model.last(y) if sign > 0 else y.sin()
        wanted = torch.autograd.grad(y.square().mean(), model.first.weight)
        found = torch.autograd.grad(xconv_fx.compile(model)(x).square().mean(), model.first.weight)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    with pytest.raises(UnsupportedModelError, match=r"torch\.cond: .*without options"):
        xconv_fx.compile(model, BUDGET)(images())


class Looping(Layers):
    """A loop, in what is not differentiated."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        with torch.no_grad():
            _, weight = while_loop(lambda i, _: i < 3, lambda i, z: (i + 1, z * 0.5 + 1), (torch.tensor(0), y.detach()))
        return self.last(y * weight)


def test_loops_by_values_are_audited_for_one_run() -> None:
    model, x = Looping(), images()
    weight = model.first(x).relu().detach()
    for _ in range(3):
        weight = weight * 0.5 + 1
    wanted = torch.autograd.grad(model.last(model.first(x).relu() * weight).square().mean(), model.first.weight)
    compiled = xconv_fx.compile(model, BUDGET)
    found = torch.autograd.grad(compiled(x).square().mean(), model.first.weight)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    assert any("decides by values" in note for note in xconv_fx.plans(compiled)[0].notes)


def test_plans_and_reports() -> None:
    """One compilation: the module is torch's, and the report's; a size more than the limit is an error."""
    model = net()
    compiled = xconv_fx.compile(model, BUDGET, recompile_limit=1)
    assert compiled.state_dict().keys() == {f"_orig_mod.{name}" for name in model.state_dict()}
    compiled(images()).mean().backward()
    (plan,) = xconv_fx.plans(compiled)
    assert plan.budget == BUDGET and plan.audited_peak is not None
    assert xconv_fx.plans(nn.Sequential(compiled, nn.ReLU())) == (plan,), "also of a part"
    text = str(xconv_fx.report(compiled))
    assert "3.00 MB: fits" in text
    console = Console(width=100)
    with console.capture() as captured:
        console.print(xconv_fx.report(compiled))
    assert "3.00 MB: fits" in captured.get()
    with pytest.raises(UnsupportedModelError, match=r"recompile limit.*recompile_limit"):
        compiled(images(12))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_breaks_and_lost_budgets_are_errors() -> None:
    with pytest.raises(UnsupportedModelError, match=r"one graph: .*graph_break.*fullgraph=False"):
        xconv_fx.compile(Breaking(), BUDGET)(images())
    model = Breaking()
    model.eager = True
    compiled = xconv_fx.compile(model, BUDGET, fullgraph=False)
    for _ in range(2):
        with pytest.raises(BudgetLostError, match=r"ran eagerly, .*Convolution in body\.2"):
            compiled(images())


def test_graphs_without_a_backward_are_said() -> None:
    weight = torch.zeros(3)
    add = xconv_fx.compile(lambda: weight.add_(1), BUDGET)
    add()
    assert weight.tolist() == [1, 1, 1] and xconv_fx.plans(add) == ()
    assert "nothing is planned" in str(xconv_fx.report(add))
    plain = torch.compile(net(), backend="xconv")
    with torch.no_grad():
        plain(images())
    assert xconv_fx.plans(plain) == ()


def test_the_function_is_not_hidden_by_the_module() -> None:
    code = """
import xconv_fx, xconv_fx.report, sys
from xconv_fx.report import read_json
assert not isinstance(xconv_fx.report, type(sys)) and xconv_fx.plan.report.read_json is read_json
"""
    subprocess.run([sys.executable, "-c", code], check=True)
