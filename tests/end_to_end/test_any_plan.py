"""Whatever can be done to a compiled model can be done under every plan: the whole batch, slices, a preset, none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.compiled import Compile
from torch import Tensor, nn

from xconv_fx.errors import DoubleBackwardError

# What is done here takes more than a step of one call, which the first-step check would say.
PLANS: dict[str, dict[str, Any]] = {
    "whole": {"mem_budget": "99%", "codecs": "exact", "slices": 1, "verify": "off"},
    "sliced": {"mem_budget": "85%", "codecs": "exact", "slices": 4, "verify": "off"},
    "preset": {"codecs": "xconv"},
    "none": {},
}


class TwoHeads(nn.Module):
    """Two results of a sample each; the second one is often not used."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.first, self.second = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.first(h), self.second(h)


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TwoHeads().double()


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def taken(model: nn.Module) -> list[Tensor]:
    """The gradients, zeros where there are none; the model is left without."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return found


def retained(model: nn.Module, x: Tensor) -> list[Tensor]:
    first, second = model(x)
    first.mean().backward(retain_graph=True)
    (first.square().mean() + second.mean()).backward(retain_graph=True)
    second.square().mean().backward()
    return taken(model)


def of_the_input(model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(model(x)[0].square().mean(), x))


def one_result(model: nn.Module, x: Tensor) -> list[Tensor]:
    model(x)[1].square().mean().backward()
    return taken(model)


def some_inputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    (last,) = list(model.parameters())[-1:]
    model(x)[1].square().mean().backward(inputs=[last])
    return taken(model)


def hooked(model: nn.Module, x: Tensor) -> list[Tensor]:
    """A hook of a parameter sees the gradient of the whole batch, once."""
    calls: list[Tensor] = []
    handle = next(model.parameters()).register_hook(calls.append)
    model(x)[0].square().mean().backward()
    handle.remove()
    assert len(calls) == 1
    return [calls[0], *taken(model)]


def summed_in_a_loop(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Two forwards before the one backward of both."""
    sum(model(x * scale)[0].square().mean() for scale in (1, 2)).backward()  # type: ignore[union-attr]
    return taken(model)


USES = (retained, of_the_input, one_result, some_inputs, hooked, summed_in_a_loop)


@pytest.mark.parametrize("plan", PLANS)
def test_every_use_works_under_every_plan(compile_model: Compile, plan: str) -> None:
    eager = net()
    compiled = compile_model(copy.deepcopy(eager), **PLANS[plan]).model
    x = images().requires_grad_()
    for use in USES:
        expected, found = use(eager, x), use(compiled, x)
        if plan != "preset":
            torch.testing.assert_close(
                found, expected, rtol=1e-9, atol=1e-12, msg=lambda text, use=use: f"{use}: {text}"
            )
    (gradient,) = torch.autograd.grad(compiled(x)[0].square().mean(), x, create_graph=True)
    with pytest.raises(DoubleBackwardError, match=r"double backward.*model\._orig_mod"):
        gradient.square().sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), eager(x))


def dynamic(count: int) -> Tensor:
    x = images(count)
    torch._dynamo.mark_dynamic(x, 0)
    return x


@pytest.mark.parametrize(("plan", "make"), [("whole", images), ("whole", dynamic), ("none", dynamic)])
def test_batches_of_any_size_under_any_plan(compile_model: Compile, plan: str, make: Callable[[int], Tensor]) -> None:
    """Also of no samples, and where the user says that sizes change: each is planned by itself."""
    eager = net()
    compiled = compile_model(copy.deepcopy(eager), **PLANS[plan])
    for count in (8, 0, 6) if make is images else (8, 6):
        results = [one_result(model, make(count)) for model in (eager, compiled.model)]
        torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)
        assert count or not any(gradient.any() for gradient in results[1])
    assert compiled.plans
