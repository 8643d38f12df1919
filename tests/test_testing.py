"""`assert_plan` and `within_budget`: what they accept, and what they say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from xconv_fx.errors import OptionError
from xconv_fx.testing import assert_plan, within_budget

X = (2, 3, 16, 16)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1))


def test_a_predicted_peak():
    (plan,) = assert_plan(net(), torch.randn(X), peak="1MB").plans
    assert_plan(net(), torch.randn(X), peak=plan.predicted_peak)
    with pytest.raises(AssertionError, match=r"predicted peak .* at [\w ]+ is over .*; held:\n +16.4 kB  [01], keep"):
        assert_plan(net(), torch.randn(X), peak=plan.predicted_peak - 1)


def test_a_budget_that_has_no_plan():
    deeper = nn.Sequential(net(), nn.SiLU(), nn.Conv2d(8, 2, 3, stride=2))
    assert_plan(deeper, torch.randn(X), mem_budget="95%")
    with pytest.raises(AssertionError, match="smallest feasible budget is"):
        assert_plan(deeper, torch.randn(X), mem_budget="10%")
    with pytest.raises(AssertionError, match=r"max_noise=0\.0: no plan within the budget"):
        assert_plan(deeper, torch.randn(X), mem_budget="95%", codecs="keep,quantize", slices=1, max_noise=0)


def test_mistakes_are_no_failed_assertions():
    with pytest.raises(OptionError, match="no such option"):
        assert_plan(net(), torch.randn(X), mem_bugdet="1GB")
    with pytest.raises(OptionError, match="peak='lots'"):
        assert_plan(net(), torch.randn(X), peak="lots")


def test_a_block_over_its_budget():
    x = torch.zeros(1000)
    with within_budget("12kB", x) as recording:
        x.exp()
    assert recording.peak.bytes == 8000
    with pytest.raises(AssertionError) as told, within_budget("7kB", x):
        x.exp()
    assert "peak 8.00 kB is 1.00 kB over the budget of 7.00 kB" in str(told.value)
    assert "aten::exp" in str(told.value) and "test_testing.py:" in str(told.value)


@pytest.mark.parametrize(("size", "device", "told"), [("lots", None, "budget='lots'"), ("1kB", "tpu", "device='tpu'")])
def test_a_budget_that_makes_no_sense(size, device, told):
    with pytest.raises(OptionError, match=told), within_budget(size, device=device):
        pass


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_plan_leaves_compiled_code_alone():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model, x = nn.Conv2d(3, 8, 3), torch.randn(2, 3, 8, 8)
    run = torch.compile(model, backend=backend)
    run(x)
    assert_plan(nn.Conv2d(3, 8, 3), x)
    run(x)
    assert len(compiled) == 1
