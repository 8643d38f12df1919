"""AOTAutograd traces a graph once, however many plans of it are tried."""

from __future__ import annotations

import pytest
import torch
import torch._functorch.aot_autograd as aot
from torch import nn

from xconv_fx.compiler import generate
from xconv_fx.errors import BudgetInfeasibleError


@pytest.fixture
def traces(monkeypatch):
    """The graphs that AOTAutograd traced so far."""
    found, trace = [], aot.aot_stage1_graph_capture
    monkeypatch.setattr(aot, "aot_stage1_graph_capture", lambda *given: found.append(given) or trace(*given))
    return found


def test_one_trace_for_all_attempts(traces, monkeypatch, fresh_dynamo):
    """Samples meet in batch norm: one variant is traced, for Inductor's own step, for cuts and for every attempt."""
    attempts, make = [], generate._Auditing
    monkeypatch.setattr(generate, "_Auditing", lambda *given: attempts.append(given) or make(*given))
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    model, x = nn.Sequential(*layers, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)), torch.randn(4, 3, 24, 24)
    with pytest.raises(BudgetInfeasibleError):
        torch.compile(model, backend="xconv", options={"mem_budget": "10%", "codecs": "exact"})(x)
    assert len(traces) == 1 and len(attempts) >= 2
