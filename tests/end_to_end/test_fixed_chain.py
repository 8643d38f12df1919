"""Fixed point through the compiler: what is held, and that generated kernels give the gradients of the graphs."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.nets import gradients
from torch import nn

BITS = 4


def block(before: int) -> list[nn.Module]:
    return [nn.Conv2d(before, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]


def chain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*block(3), *block(16), *block(16), nn.Conv2d(16, 4, 3, padding=1))


@pytest.fixture(scope="module")
def inputs():
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def relative_errors(found, exact):
    return {name: ((found[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact}


def test_a_chain_holds_one_payload_for_three_tensors(compile_tightly, inputs):
    model = chain()
    exact = gradients(copy.deepcopy(model), inputs)
    compiled = compile_tightly(model, inputs, codecs=f"fixed:{BITS}")
    found = gradients(compiled.model, inputs)
    plan = compiled.plan
    assert plan.saved_after <= 0.16 * plan.saved_before
    payloads = [choice for choice in plan.choices if choice.codec == "fixed"]
    assert len(payloads) == 3 and all(choice.bits == BITS for choice in payloads)
    errors = relative_errors(found, exact)
    # Nothing that they pass through reads a code: the loss, ReLU's mask, the shift of the last norm.
    assert errors["7.bias"] < 1e-5 and errors["9.bias"] < 1e-5
    weights = [error for name, error in errors.items() if name.endswith("weight")]
    assert 0.001 < max(weights) < 0.3
