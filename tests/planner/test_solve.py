"""Plans of small nets: baselines, budgets in per cent, the smallest feasible one, fixed probes."""

from __future__ import annotations

import pytest
import torch
from helpers.tracing import Traced, trace
from torch import nn

from xconv_fx.compiler import pipeline
from xconv_fx.errors import BudgetInfeasibleError, OptionError
from xconv_fx.options.budget import MemoryLimit


def conv(before, after):
    return nn.Conv2d(before, after, 3, padding=1)


@pytest.fixture(scope="module")
def traced() -> Traced:
    layers = [conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 8)]
    return trace(nn.Sequential(*layers), torch.randn(2, 3, 16, 16))


def planned(traced, **options):
    plan = traced.job(**options).plan
    assert plan is not None
    return plan


def codecs(plan):
    return {choice.residual: choice.codec for choice in plan.choices}


def test_without_a_budget_everything_is_kept(traced):
    plan = planned(traced)
    assert set(codecs(plan).values()) == {"keep"}
    assert plan.predicted_peak == plan.baseline_peak
    assert (plan.budget, plan.noise, plan.time, plan.audited_peak) == (None, 0, 0, None)


def test_an_ample_budget_changes_nothing_but_the_budget(traced):
    plan = planned(traced, mem_budget="1GB")
    assert set(codecs(plan).values()) == {"keep"}
    assert plan.predicted_peak == plan.baseline_peak < plan.budget == 10**9


@pytest.mark.parametrize("percent", [100, 90, 80])
def test_per_cents_are_of_the_baseline(traced, percent):
    plan = planned(traced, mem_budget=f"{percent}%")
    assert plan.budget == MemoryLimit.smallest_for(plan.baseline_peak).budget * percent // 100
    assert plan.predicted_peak <= plan.budget


def test_less_memory_costs_noise_or_time(traced):
    plans = [planned(traced, mem_budget=f"{percent}%") for percent in (100, 90, 80)]
    costs = [plan.time + 10 * plan.noise for plan in plans]
    assert costs == sorted(costs) and costs[0] == 0 < costs[-1]
    exact = planned(traced, mem_budget="90%", codecs="exact")
    assert exact.noise == 0 < exact.time


def test_an_infeasible_budget_names_the_smallest_and_the_consumers(traced):
    with pytest.raises(BudgetInfeasibleError) as raised:
        planned(traced, mem_budget="1kB")
    error = raised.value
    assert error.budget == 1000
    sizes = [size for _, size in error.consumers]
    assert 2 < len(sizes) <= 5 and sizes == sorted(sizes, reverse=True) and sizes[-1] > 0
    labels = [label for label, _ in error.consumers]
    assert "parameters, buffers and inputs" in labels
    assert any(label.startswith("gradients and transients at ") for label in labels)
    assert sum(sizes) <= error.smallest
    assert planned(traced, mem_budget=error.smallest).predicted_peak <= error.smallest
    with pytest.raises(BudgetInfeasibleError, match="cannot be met") as again:
        planned(traced, mem_budget=error.smallest - 1)
    assert again.value.smallest == error.smallest


def test_a_reserve_is_left_free(traced):
    plan = planned(traced, mem_budget="100%", reserve="10kB")
    assert plan.predicted_peak <= plan.budget - 10_000
    with pytest.raises(BudgetInfeasibleError) as without:
        planned(traced, mem_budget=1)
    with pytest.raises(BudgetInfeasibleError) as reserved:
        planned(traced, mem_budget=1, reserve="10kB")
    assert reserved.value.smallest == pytest.approx(without.value.smallest + 10_000, abs=11)


def test_fixed_probes_are_used_whatever_the_budget(traced):
    for budget in ("1GB", "80%"):
        plan = planned(traced, probes={"5": 16}, mem_budget=budget)
        (choice,) = (choice for choice in plan.choices if choice.codec == "probe" and choice.layer == "4")
        assert (choice.probes, choice.kind, choice.bits, choice.means) == (16, "fold", None, True)


def test_probes_for_every_layer(traced):
    plan = planned(traced, probes=8, codecs=["probe:gaussian", "bitmask"], mem_budget="1GB")
    probed = [choice for choice in plan.choices if choice.codec == "probe"]
    assert {(choice.probes, choice.kind, choice.means) for choice in probed} == {(8, "gaussian", False)}
    assert {choice.layer for choice in probed} == {"2", "4"}


def test_probes_for_an_unknown_layer_are_an_error(traced):
    with pytest.raises(OptionError, match=r"probes='6'.*the layers are 3, 5"):
        planned(traced, probes={"6": 16}, mem_budget="1GB")


def test_corrections_make_the_plan_smaller(traced):
    planning = traced.planning(mem_budget="90%")
    before = planned(traced, mem_budget="90%")
    corrections = {"forward": 2000, "loss": 2000, "backward": 2000}
    job = pipeline.plan(planning.analysed, planning.planning, planning.options, corrections=corrections)
    assert job.plan.budget is not None
    # The budget is of the corrected baseline, and the corrections are in the prediction.
    assert job.plan.baseline_peak == before.baseline_peak + 2000
    assert job.plan.predicted_peak == max(job.phase_peaks.values()) <= job.plan.budget


def test_nonlinear_residuals_are_noted():
    traced = trace(nn.Sequential(conv(3, 8), nn.SiLU(), conv(8, 8)), torch.randn(2, 3, 16, 16))
    (note,) = planned(traced).notes
    assert note.startswith("0: convolution is read nonlinearly by the backward")


def test_a_layer_that_cannot_use_the_probes_is_named():
    """The sigmoid's own backward reads the second convolution's input."""
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Sigmoid(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))
    plan = planned(trace(net, torch.randn(4, 3, 24, 24)), probes=64, mem_budget="1GB")
    (note,) = (note for note in plan.notes if "not held as probes" in note)
    assert note.startswith("2: its input sigmoid is not held as probes")
    assert any(choice.codec == "probe" for choice in plan.choices)


def test_each_of_the_layers_that_read_a_tensor_may_be_named():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.wide, self.shortcut = conv(3, 8), conv(8, 8), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            x = self.stem(x).relu()
            return self.wide(x) + self.shortcut(x)

    traced = trace(Block(), torch.randn(2, 3, 16, 16))
    for probes, count in (({"wide": 16}, 16), ({"shortcut": 8}, 8), ({"wide": 16, "shortcut": 8}, 16)):
        (choice,) = (choice for choice in planned(traced, probes=probes, mem_budget="1GB").choices if choice.readers)
        assert (choice.codec, choice.probes, set(choice.readers)) == ("probe", count, {"wide", "shortcut"})
