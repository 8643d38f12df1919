"""Budgets that are refused name one that works, and what works for some codecs works for more of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from xconv_fx.compiler.candidates import Variant
from xconv_fx.compiler.comparison import Comparison
from xconv_fx.compiler.feedback import Corrections, Feedback
from xconv_fx.errors import BudgetInfeasibleError
from xconv_fx.options.budget import MemoryLimit


class Mixing(nn.Module):
    """Samples meet, so there are no slices, and little to save without noise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(0.7 * h + 0.3 * h.flip(0))


X = torch.randn(4, 3, 24, 24)


def gradients(model: nn.Module) -> Tensor:
    model.zero_grad()
    model(X).square().mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def normed() -> nn.Sequential:
    """A network of which exact codecs save something."""
    torch.manual_seed(0)
    body = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
    ]
    return nn.Sequential(*body, nn.ReLU(), nn.Conv2d(8, 2, 1))


def smallest(network: nn.Module | None = None, **options: object) -> int:
    wanted = {**options, "mem_budget": "1kB", "verify": "off"}
    model = torch.compile(network or Mixing(), backend="xconv", options=wanted)
    with pytest.raises(BudgetInfeasibleError) as caught:
        model(X)
    return caught.value.smallest


@pytest.fixture(scope="module")
def exact() -> int:
    """The smallest feasible budget of exact codecs."""
    torch._dynamo.reset()
    return smallest(codecs="exact")


def test_the_budget_that_an_error_names_compiles_and_larger_ones_do(compile_model, exact):
    for budget in (exact, exact + 1000):
        torch._dynamo.reset()
        compiled = compile_model(Mixing(), codecs="exact", mem_budget=budget, verify="off")
        compiled(X)
        assert compiled.plan.audited_peak < compiled.plan.budget == budget


def test_the_plain_step_is_feasible_although_it_is_predicted_not_to_be(compile_model, monkeypatch):
    """Where every way is ruled out, the plain step is generated before its budget is refused."""
    whole = compile_model(Mixing(), codecs="exact", mem_budget="100%", verify="off")
    whole(X)
    torch._dynamo.reset()
    monkeypatch.setattr("xconv_fx.compiler.plain_step.FAR", 0.0)
    monkeypatch.setattr("xconv_fx.compiler.plain_step.DOUBT", -1.0)
    monkeypatch.setattr(Comparison, "candidates", lambda self, feedback: [])
    monkeypatch.setattr(Comparison, "lowest", lambda self, *_: None)
    plain = compile_model(
        Mixing(), codecs="keep", mem_budget=MemoryLimit.smallest_for(whole.plan.audited_peak).budget, verify="off"
    )
    plain(X)
    assert plain.plan.audited_peak == whole.plan.audited_peak and plain.plan.noise == 0


@pytest.mark.parametrize("count", [2, 3, 6])
def test_no_number_of_slices_is_lower_than_what_is_named(count):
    """Of a batch of six, three slices may be lower than two and than six."""

    def least(**options: object) -> int:
        torch._dynamo.reset()
        torch.manual_seed(0)
        body = [nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.GELU()]
        net = nn.Sequential(*body, nn.MaxPool2d(2), nn.Conv2d(8, 4, 3, padding=1))
        call = torch.compile(net, backend="xconv", options={"mem_budget": 1000, "codecs": "exact", **options})
        with pytest.raises(BudgetInfeasibleError) as caught:
            call(torch.randn(6, 3, 20, 20))
        return caught.value.smallest

    assert least() <= least(slices=count)


def test_more_codecs_are_never_noisier(compile_model, exact):
    """Where exact codecs fit, what is allowed besides adds no noise to what prefers none."""
    assert smallest(codecs="all") <= exact
    torch._dynamo.reset()
    model = Mixing()
    wanted = gradients(copy.deepcopy(model))
    compiled = compile_model(model, codecs="all", prefer="exact", mem_budget=exact, verify="off")
    found = gradients(compiled.model)
    assert compiled.plan.noise == 0
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()


@dataclass(frozen=True)
class Short(Feedback):
    """What audits found, had they found every plan short of so many bytes."""

    missing: int = 0

    def corrections(self, variant: Variant) -> Corrections:
        return dict.fromkeys(("forward", "loss", "backward"), self.missing)


def test_an_exact_way_is_tried_before_a_noisy_one_is_taken(compile_model, monkeypatch):
    """Audits may have ruled out exact ways by what other plans were short of: what is lowest of them is generated."""
    budget = smallest(normed(), codecs="exact")
    torch._dynamo.reset()
    monkeypatch.setattr("xconv_fx.compiler.search.NOTHING_FOUND", Short(missing=budget // 8))
    compiled = compile_model(normed(), codecs="all", prefer="exact", mem_budget=budget * 101 // 100, verify="off")
    compiled(X)
    assert compiled.plan.attempts == 2 and compiled.plan.noise == 0


def test_slices_without_a_budget(compile_model):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    wanted = gradients(copy.deepcopy(model))
    compiled = compile_model(model, slices=2)
    assert torch.allclose(gradients(compiled.model), wanted, rtol=1e-4, atol=1e-6)
    assert (compiled.plan.slices, compiled.plan.noise, compiled.plan.budget) == (2, 0, None)
