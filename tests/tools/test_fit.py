"""The largest size that fits: the search, and whether what it names really trains in the budget."""

from __future__ import annotations

import sys

import pytest
import torch

from xconv_fx.errors import BudgetInfeasibleError, OptionError, UsageError
from xconv_fx.measure import training_peak
from xconv_fx.tools.fit import Trial, fit, resized, search
from xconv_fx.tools.workload import Workload

NET = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1),
    )
"""


@pytest.fixture
def workload(tmp_path, monkeypatch):
    (tmp_path / "fitted.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    torch._dynamo.reset()
    yield Workload("fitted.py:build", ("2x3x64x64",))
    sys.modules.pop("xconv_plan_fitted", None)
    torch._dynamo.reset()


def trials(largest, step=1, fixed=0):
    """A size needs 10 bytes, and all of them `fixed` ones."""
    seen = []

    def trial(size):
        assert size % step == 0 and size > 0 and size not in seen
        seen.append(size)
        needs = fixed + 10 * size
        return Trial(size, size <= largest, needs, (fixed + 10 * largest) / needs)

    return trial, seen


@pytest.mark.parametrize("step", [1, 16])
@pytest.mark.parametrize("fixed", [0, 500, 100_000])
@pytest.mark.parametrize("start", [1, 7, 100])
@pytest.mark.parametrize("largest", [0, 1, 2, 5, 63, 64, 65, 1000])
def test_the_search_ends_at_neighbours(largest, start, fixed, step):
    trial, seen = trials(largest * step, step, fixed)
    found = search(trial, "m", start * step, step)
    assert (found.largest.size if found.largest else 0) == largest * step
    assert found.beyond.size == (largest + 1) * step
    assert found.plans == len(seen) <= 30


def test_a_proportion_needs_few_plans():
    trial, seen = trials(37)
    search(trial, "m", 4, 1)
    # Doubled beyond it, then the size in proportion and its neighbour.
    assert seen == [4, 8, 16, 32, 64, 37, 38]


def test_what_it_names_trains_in_the_budget_and_the_next_does_not(workload):
    budget = 9_000_000
    inductor, exact = fit(workload, budget, codecs="exact")
    assert inductor.largest.size < exact.largest.size

    def peak(size):
        torch._dynamo.reset()
        model = workload.model()
        with torch.no_grad():
            model = model.to_empty(device="cpu")
            for parameter in model.parameters():
                parameter.normal_(std=0.1)
        compiled = torch.compile(model, backend="xconv", options={"mem_budget": budget, "codecs": "exact"})
        return training_peak(compiled, torch.randn(size, 3, 64, 64), torch.Tensor.mean).bytes

    assert peak(exact.largest.size) <= budget
    assert exact.beyond.size == exact.largest.size + 1
    with pytest.raises(BudgetInfeasibleError):
        peak(exact.beyond.size)


def test_all_codecs_train_no_less_and_sizes_are_multiples(workload):
    found = fit(workload, 12_000_000, along="spatial", multiple=32)
    sizes = [row.largest.size for row in found]
    assert [row.method for row in found] == ["inductor", "xconv, exact", "xconv, all"]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] and all(size % 32 == 0 for size in sizes)
    assert all(row.largest.needs <= 12_000_000 < row.beyond.needs for row in found)
    assert found[1].largest.noise == 0


def test_nothing_fits(workload):
    assert [row.largest for row in fit(workload, 10_000, codecs="all")] == [None, None]


def test_limits_are_no_less_than_the_budget(workload):
    (_, quiet) = fit(workload, 9_000_000, codecs="quantize", max_noise=1e-9)
    (_, loud) = fit(workload, 9_000_000, codecs="quantize")
    assert quiet.largest.size < loud.largest.size and quiet.largest.noise <= 1e-9
    with pytest.raises(OptionError):
        fit(workload, 9_000_000, codecs="none")


def test_labels_grow_with_their_inputs():
    given = Workload("net.py:build", ("2x3x64x48", "2x7"), "net.py:loss", ("2x64x64:int64", "2:int64"))
    larger = resized(given, "batch", 5)
    assert larger.inputs == ("5x3x64x48:float32", "5x7:float32")
    assert larger.labels == ("5x64x64:int64", "5:int64")
    finer = resized(given, "spatial", 96)
    assert finer.inputs == ("2x3x96x96:float32", "2x7:float32")
    assert finer.labels == ("2x96x96:int64", "2:int64")


@pytest.mark.parametrize(
    ("inputs", "along", "message"),
    [(("net.py:batch",), "batch", "names a callable"), (("2x7",), "spatial", "no input has spatial")],
)
def test_what_has_no_size_to_vary(inputs, along, message):
    with pytest.raises(UsageError, match=message):
        fit(Workload("net.py:build", inputs), 10**9, along)
