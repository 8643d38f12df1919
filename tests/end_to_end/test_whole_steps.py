"""The budget of a whole step: losses, several calls, code between graphs, DDPOptimizer's graphs, and the check."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.compiled import Compile, Compiled
from torch import Tensor, nn
from torch.nn import functional as F

from xconv_fx.errors import BudgetExceededWarning, BudgetLostWarning
from xconv_fx.measure import physical_peak


def block(width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(2, width), nn.ReLU())


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *block(), *block(), nn.Conv2d(8, 2, 1))


def images(count: int = 4, size: int = 24) -> Tensor:
    return torch.randn(count, 3, size, size)


def measured(compiled: Compiled, step: Callable[[], object], *inputs: Tensor) -> int:
    """The peak of a step that begins without gradients, by the profiler."""
    compiled.model.zero_grad()
    found = physical_peak(step, resident=[*inputs, *compiled.model.parameters(), *compiled.model.buffers()])
    compiled.model.zero_grad()
    return found.bytes


def budget_of(compiled: Compiled) -> int:
    (budget,) = {plan.budget for plan in compiled.plans}
    assert budget is not None
    return budget


def heavy(y: Tensor) -> Tensor:
    """A loss of many full-size tensors."""
    return torch.stack([(F.interpolate(y, scale_factor=2) - k).square().mean() for k in range(4)]).sum()


def test_a_heavy_loss_is_measured_and_planned_for(compile_model: Compile, caplog: pytest.LogCaptureFixture) -> None:
    x, eager = images(), net()
    compiled = compile_model(copy.deepcopy(eager), mem_budget=860_000)

    def step() -> None:
        heavy(compiled(x)).backward()

    step()
    (before,) = compiled.plans
    assert before.measured_peak is not None and before.measured_peak > budget_of(compiled)
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "planned again with reserve=" in line
    for _ in range(2):  # Compiled anew, and measured.
        compiled.model.zero_grad()
        step()
    (after,) = compiled.plans
    assert after.measured_peak is not None and after.measured_peak <= budget_of(compiled)
    heavy(eager(x)).backward()
    for mine, theirs in zip(compiled.model.parameters(), eager.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert (mine.grad - theirs.grad).norm() < 0.5 * theirs.grad.norm()
    assert measured(compiled, step, x) == after.measured_peak <= budget_of(compiled)


def test_what_no_plan_can_give_is_said_with_what_would_work(compile_model: Compile) -> None:
    x = images()
    compiled = compile_model(net(), mem_budget=600_000, codecs="exact")
    heavy(compiled(x)).backward()
    with pytest.warns(BudgetExceededWarning, match="no plan keeps it within mem_budget=600 kB. .*mem_budget='"):
        heavy(compiled(x)).backward()
    compiled.model.zero_grad()
    heavy(compiled(x)).backward()
    assert compiled.plans[0].measured_peak is not None


@pytest.mark.parametrize("given", [True, False])
def test_views_of_one_encoder(compile_model: Compile, given: bool) -> None:
    views = [images() for _ in range(3)]
    encoder = nn.Sequential(*net(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    compiled = compile_model(encoder, mem_budget=700_000, codecs="exact", **({"calls": 3} if given else {}))

    def step() -> None:
        torch.stack([compiled(view) for view in views]).var(0).sum().backward()

    if given:
        step()
    else:
        with pytest.warns(BudgetExceededWarning, match="ran 3 times before the backward.* calls=3; planned") as seen:
            step()
        assert {warning.filename for warning in seen} == {__file__}
        compiled.model.zero_grad()
        step()
    assert compiled.plan.calls == 3
    assert measured(compiled, step, *views) <= 700_000


class Between(nn.Module):
    """Uncompiled code between two graphs that holds what the backward does not need compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))

    @torch._dynamo.disable
    def between(self, x: Tensor) -> Tensor:
        for _ in range(6):
            x = x.sin() * x
        return x


def test_what_uncompiled_code_holds_is_measured(compile_model: Compile) -> None:
    x = images(2)
    compiled = compile_model(Between(), mem_budget=400_000, codecs="exact", verify="warn")

    def step() -> None:
        compiled(x).square().mean().backward()

    with pytest.warns(BudgetLostWarning, match="Between ran eagerly"):
        step()  # Its second graph is compiled when the first has run.
    compiled.model.zero_grad()
    with pytest.warns(BudgetExceededWarning, match="option reserve='"):
        step()
    assert all(plan.measured_peak == measured(compiled, step, x) for plan in compiled.plans)


class Normalising(nn.Module):
    """Two graphs: the first has no backward, and a mask that only the loss reads is an argument of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = F.avg_pool2d((x - 0.45) / 0.225, 2)
        torch._dynamo.graph_break()
        return self.body(x), mask


def test_arguments_that_no_planned_graph_reads_are_in_the_budget(compile_model: Compile) -> None:
    """Large images, which the planned graph does not read, and a mask: all of it is known before the step runs."""
    x, mask = images(4, 64), torch.rand(4, 2, 32, 32)
    compiled = compile_model(Normalising(), mem_budget="90%", codecs="exact", verify="warn")

    def step() -> None:
        y, weights = compiled(x, mask)
        (y.square() * weights).mean().backward()
        compiled.model.zero_grad()

    for _ in range(3):
        step()
    found = measured(compiled, step, x, mask)
    assert compiled.plan.measured_peak == found <= budget_of(compiled)
    assert compiled.plan.fixed_bytes > x.nbytes + mask.nbytes


class Whole(nn.Module):
    """Dynamo leaves an `nn.Sequential` in DistributedDataParallel to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.fixture
def process_group(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 1000)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


# Whichever step of a program is the first to see gradients of 1x1 kernels: their strides may be written in two ways.
@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides:UserWarning")
@pytest.mark.usefixtures("process_group")
def test_graphs_of_ddp_share_the_budget(compile_model: Compile) -> None:
    x, model = images(4), Whole()
    alone = compile_model(copy.deepcopy(model), mem_budget=640_000, codecs="exact")
    alone(x).square().mean().backward()
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model), bucket_cap_mb=0.002)
    compiled = compile_model(wrapped, mem_budget=640_000, codecs="exact")

    def step() -> None:
        compiled(x).square().mean().backward()

    step()
    assert len(compiled.plans) > 1
    assert all("planned together" in plan.notes[-1] for plan in compiled.plans)
    held = [plan.fixed_bytes for plan in compiled.plans]
    assert held == sorted(held) and held[0] < held[-1], "what earlier graphs hold counts"
    for mine, theirs in zip(compiled.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    assert measured(compiled, step, x) <= 640_000


def test_gradients_of_several_inputs_are_in_the_budget(compile_tightly: Compile) -> None:
    """The backward of each call leaves its input's, when its residuals are gone already."""
    inputs = [torch.randn(8, 16, 24, 24).requires_grad_() for _ in range(3)]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    compiled = compile_tightly(model, inputs[0], calls=3, slices=4, codecs="exact")

    def step() -> None:
        for x in inputs:
            x.grad = None
        sum(compiled(x).square().mean() for x in inputs).backward()

    step()
    assert measured(compiled, step, *inputs) <= budget_of(compiled)
