"""Gradients of the compiled `zoo` against plain autograd: equal with exact codecs, equal in the mean with the others.

The statistical criterion. A draw's error of one parameter's gradient is projected on a few fixed random directions; the
mean of n independent draws, over its standard error, is close to normal when the estimate is unbiased. Of the some
hundred such z, one exceeds 4.5 by chance once in a thousand runs (Student's t with 63 degrees of freedom; the draws are
seeded, so a run repeats). A bias of half a standard deviation of one draw gives |z| = 4 on average with 64 draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers.nets import NETS, gradients
from torch import Tensor, nn

from xconv_fx.errors import BudgetInfeasibleError
from xconv_fx.plan.report import read_json

# Raised by torch 2.13 itself, while it imports Inductor.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

ZOO = NETS["zoo"]
DRAWS, DIRECTIONS, LARGEST_Z = 64, 4, 4.5

# Codecs and probes, and the codec that the plan must then use.
APPROXIMATE = {
    "quantize": ({"codecs": ["quantize:4", "bitmask"]}, "quantize"),
    "probe": ({"codecs": ["probe:fold", "bitmask"], "probes": 16, "mem_budget": "1GB"}, "probe"),
}


def within_budget(model: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    """The compiled model at `mem_budget`, or the smallest that it compiles for: each error says what to try next."""
    budget = options.pop("mem_budget", 1)
    for _ in range(5):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="xconv", options={"mem_budget": budget, **options})
        try:
            compiled(x)
        except BudgetInfeasibleError as error:
            assert error.smallest > budget
            budget = error.smallest
        else:
            return compiled
    raise AssertionError(f"the smallest budget is infeasible again and again, at last {budget} bytes")


@dataclass(frozen=True)
class Draws:
    """The output of the forward, and every parameter's gradient in `DRAWS` steps, under one set of codecs."""

    output: Tensor
    gradients: list[dict[str, Tensor]]
    codecs: list[str]


@pytest.fixture(scope="module")
def draws(tmp_path_factory) -> dict[str, Draws]:
    found = {}
    for case, (options, _) in APPROXIMATE.items():
        report = tmp_path_factory.mktemp(case) / "plan.json"
        x, model = ZOO.inputs(), within_budget(ZOO.build(), ZOO.inputs(), seed=0, report=str(report), **options)
        output = model(x).detach()
        (plan,) = read_json(report)
        steps = [gradients(model, x) for _ in range(DRAWS)]
        found[case] = Draws(output, steps, [choice.codec for choice in plan.choices])
    return found


def test_exact_codecs_at_the_smallest_budget():
    x = ZOO.inputs(dtype=torch.float64)
    expected = gradients(ZOO.build(dtype=torch.float64), x)
    found = gradients(within_budget(ZOO.build(dtype=torch.float64), x, codecs="exact"), x)
    assert found.keys() == expected.keys()
    scale = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        # A bias in front of a normalisation has a gradient of rounding errors alone: it is held to the largest one's.
        error = (found[name] - gradient).norm()
        assert error <= 1e-9 * gradient.norm() + 1e-13 * scale, f"{name}: {error / gradient.norm():.1e}"


@pytest.mark.parametrize("case", APPROXIMATE)
def test_approximate_gradients_are_right_in_the_mean(case, draws):
    exact = gradients(ZOO.build(), ZOO.inputs())
    scale = max(float(gradient.norm()) for gradient in exact.values())
    assert draws[case].codecs.count(APPROXIMATE[case][1]) >= 2, "the plan must use what this test is about"
    noisy = 0
    for name, gradient in exact.items():
        errors = torch.stack([(draw[name] - gradient).flatten().double() for draw in draws[case].gradients])
        noisy += bool(errors.std(0).norm() > 1e-3 * gradient.norm() > 1e-6 * scale)
        # What the order of float32 sums may make; of the largest gradient, because some are rounding errors alone.
        rounding = 1e-6 * (float(gradient.norm()) + scale)
        assert z_scores(errors, rounding).abs().max() < LARGEST_Z, name
    assert noisy >= 2


def z_scores(errors: Tensor, rounding: float) -> Tensor:
    """Mean error over its standard error, for every direction, with an error of `rounding` allowed for."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(errors.shape[1], DIRECTIONS, generator=generator, dtype=torch.float64)
    along = errors @ (directions / directions.norm(dim=0))
    return along.mean(0) / (along.var(0) / len(errors) + rounding**2).sqrt()


def test_the_forward_does_not_depend_on_the_codecs(draws):
    assert torch.equal(draws["quantize"].output, draws["probe"].output)
