"""Published systems through the compiler: applied without a budget, audited against one."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import Residual, gradients

from xconv_fx.errors import BudgetInfeasibleError, OptionError


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Residual(), torch.randn(8, 3, 32, 32)


def test_a_preset_needs_no_budget(net, compile_model):
    model, x = net
    exact = gradients(copy.deepcopy(model), x)
    compiled = compile_model(copy.deepcopy(model), codecs="actnn:L3", seed=0)
    found = gradients(compiled.model, x)
    plan = compiled.plan
    assert {choice.codec for choice in plan.choices} <= {"quantize", "recompute", "bitmask"}
    assert plan.budget is None and plan.audited_peak < plan.baseline_peak
    assert any(note.startswith("codecs as in actnn:L3") for note in plan.notes)
    torch.testing.assert_close(found["head.bias"], exact["head.bias"])
    assert 0.01 < (found["stem.weight"] - exact["stem.weight"]).norm() / exact["stem.weight"].norm() < 2


def test_a_budget_is_audited(net, compile_model):
    model, x = net
    with pytest.raises(BudgetInfeasibleError, match="codecs='xconv' fixes how everything is held") as caught:
        compile_model(copy.deepcopy(model), codecs="xconv", mem_budget="1kB")(x)
    roomy = compile_model(copy.deepcopy(model), codecs="xconv", mem_budget=caught.value.smallest)
    gradients(roomy.model, x)
    assert roomy.plan.budget == caught.value.smallest >= roomy.plan.audited_peak
    with pytest.raises(OptionError, match=r"max_noise=0\.1: no plan within"):
        compile_model(copy.deepcopy(model), codecs="xconv", max_noise=0.1)(x)
