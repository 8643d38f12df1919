"""A budget that is lost because Dynamo runs code eagerly is said, whatever the way to it; others are left alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import device_thread
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xconv_fx import SampleGradients, hooks
from xconv_fx.errors import BudgetLostWarning
from xconv_fx.ops import sample_gradients
from xconv_fx.runtime import unplanned
from xconv_fx.runtime.session import LOST
from xconv_fx.runtime.unplanned import Watch, planned

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

BUDGET = 3_000_000


def images(size: int = 16, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))


def compiled(model: Any, backend: str = "xconv", **options: Any) -> Callable[..., Any]:
    ours = {"mem_budget": BUDGET, "codecs": "exact", **options} if backend == "xconv" else None
    return torch.compile(model, backend=backend, options=ours)


def hooked() -> nn.Module:
    model = net()
    model[2].register_full_backward_hook(lambda module, inputs, outputs: None)
    return model


class Loop(nn.Module):
    """A loop over blocks with a break in it, in which Dynamo cannot resume."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 1), nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x).relu()
            if x.mean().item() > 1e9:
                x = x / 2
        return x


def averaging() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=None), nn.ReLU(), nn.Conv2d(8, 8, 3))


def disabled() -> nn.Module:
    model = net()
    return nn.Sequential(model[0], torch._dynamo.disable(nn.Sequential(model[1], model[2])))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (hooked, r"part of Sequential ran eagerly, .*Convolution.* in 0, 2, .*Dynamo gave up .*backwards hooks"),
        (Loop, r"part of Loop .* in blocks\.0, blocks\.1, stem, .*Dynamo gave up forward \(test_unplanned.py:\d+\)"),
        (averaging, r"NativeBatchNorm.*Dynamo gave up batchnorm\.py:\d+ for: .*item"),
        (disabled, r"Dynamo gave up .*disable"),
    ],
)
def test_frames_that_dynamo_gives_up_are_named_once(make: Callable[[], nn.Module], message: str) -> None:
    call = compiled(make())
    with pytest.warns(BudgetLostWarning, match="xconv: mem_budget is not kept: .*" + message) as seen:
        for _ in range(3):
            call(images()).mean().backward()
    assert len(seen) == 1


def test_other_backends_and_calls_without_a_budget_are_left_alone() -> None:
    compiled(hooked(), "eager")(images()).mean().backward()
    compiled(hooked(), mem_budget=None)(images()).mean().backward()
    with torch.no_grad():
        compiled(hooked())(images())


def test_stances_are_named() -> None:
    call = compiled(net())
    with torch.compiler.set_stance("force_eager"), pytest.warns(BudgetLostWarning, match="stance 'force_eager'"):
        call(images()).mean().backward()


STATE: dict[str, Any] = {}


def whole_step() -> Tensor:
    """A step whose frame holds no tensors, so that Dynamo leaves it alone; its backward is over when it returns."""
    STATE["optimiser"].zero_grad()
    loss = STATE["model"](STATE["x"]).square().mean()
    loss.backward()
    return loss.detach()


def test_a_whole_step_that_runs_eagerly_is_said() -> None:
    model = net()
    STATE.update(model=model, x=images(), optimiser=torch.optim.SGD(model.parameters(), 0.1))
    call = compiled(whole_step)
    with pytest.warns(BudgetLostWarning, match="differentiated inside of the call"):
        for _ in range(3):
            call()


def test_the_recompile_limit_is_said_and_plans_are_marked() -> None:
    call = compiled(net())
    with torch._dynamo.config.patch(recompile_limit=1):
        call(images()).mean().backward()
        (plan,) = hooks.call_behind(call).xconv_session.plans
        assert LOST not in plan.notes
        with pytest.warns(BudgetLostWarning, match="recompile limit.*What would work: .*recompile_limit above"):
            call(images(12)).mean().backward()
    (plan,) = hooks.call_behind(call).xconv_session.plans
    assert LOST in plan.notes


class Broken(nn.Module):
    """Two parts that are planned one by one, and a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.unused = net(), nn.Conv2d(8, 4, 1), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.first(x)
        torch._dynamo.graph_break()
        return {"result": self.last(x)}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_planned_models_are_silent_and_looked_at_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    call = compiled(Broken(), verify="off")
    with warnings.catch_warnings():
        warnings.simplefilter("error", BudgetLostWarning)
        call(images())["result"].mean().backward()
        monkeypatch.setattr(Watch, "_look", lambda *arguments: pytest.fail("looked at again"))
        with torch.no_grad():
            call(images())
        for _ in range(2):
            call(images())["result"].mean().backward()


def test_nothing_is_kept_from_call_to_call() -> None:
    watch = Watch(None, lambda x: x)
    before = len(unplanned._local.spans)
    for _ in range(3):
        watch.run((torch.ones(1),), {})
        with planned():
            torch.ones(1)
    assert len(unplanned._local.spans) == before


def test_what_a_checkpoint_runs_again_sees_what_its_first_run_saw():
    """Also where the backward runs in a thread of its own, as on CUDA."""
    seen, asked = SampleGradients(2), []
    seen.squares[:] = torch.tensor([1.0, 3.0])

    def compiled(x: torch.Tensor) -> torch.Tensor:
        asked.append(sample_gradients.weights(len(x), x.device).tolist())
        return x.sin()

    x = torch.randn(2, 3, requires_grad=True)
    with seen.batch([0, 1]):
        device_thread.backward(checkpoint(unplanned.graph(compiled), x, use_reentrant=False).sum())
    assert asked == [[1, 3], [1, 3]]
