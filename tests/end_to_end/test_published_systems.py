"""Published systems through the compiler: applied without a budget, audited against one."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.nets import Residual, gradients

import xconv_fx
from xconv_fx.errors import BudgetInfeasibleError, OptionError
from xconv_fx.measure import training_peak


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


def test_compiled_steps_note_the_gradients_of_samples(net, compile_model):
    model, x = net
    compiled, seen = compile_model(copy.deepcopy(model), codecs="actnn:L3", seed=0), xconv_fx.SampleGradients(16)
    scale = torch.linspace(0.5, 4, len(x))[:, None]
    for _ in range(2):
        with seen.batch(range(8, 16)):
            out = compiled.model(x)
            (out * scale).sum().backward()
    torch.testing.assert_close(seen.squares[8:], (scale.square() * out.shape[1])[:, 0])
    assert seen.squares[:8].isnan().all()
    assert any("shared out among the samples" in note for note in compiled.plan.notes)


def test_a_budget_is_kept_with_bits_by_sample(net, compile_model):
    model, x = net
    given = {"mem_budget": "60%", "codecs": "bitmask,quantize:2,quantize:4"}
    compiled = compile_model(copy.deepcopy(model), sample_bits=True, **given)
    gradients(compiled.model, x)
    assert any(choice.by_sample for choice in compiled.plan.choices)
    assert training_peak(compiled.model, x, lambda out: out.sum()).bytes <= compiled.plan.budget
    assert compiled.plan.audited_peak <= compiled.plan.budget
    other = compile_model(copy.deepcopy(model), **given)
    gradients(other.model, x)
    assert not any(choice.by_sample for choice in other.plan.choices)


def test_a_budget_is_audited(net, compile_model):
    model, x = net
    with pytest.raises(BudgetInfeasibleError, match="codecs='xconv' fixes how everything is held") as caught:
        compile_model(copy.deepcopy(model), codecs="xconv", mem_budget="1kB")(x)
    roomy = compile_model(copy.deepcopy(model), codecs="xconv", mem_budget=caught.value.smallest)
    gradients(roomy.model, x)
    assert roomy.plan.budget == caught.value.smallest >= roomy.plan.audited_peak
    with pytest.raises(OptionError, match=r"max_noise=0\.1: no plan within"):
        compile_model(copy.deepcopy(model), codecs="xconv", max_noise=0.1)(x)
