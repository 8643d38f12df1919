"""What is allowed for losses, beside what they take."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from xconv_fx.planner.loss import KEPT, LOSS_COPIES, Ends, bytes_in_loss

# Left to the first-step check.
MORE = {"focal", "dice + focal", "kl_div", "ssim", "l1 + ssim"}


@pytest.fixture(scope="module")
def benchmark() -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / "losses.py"
    spec = importlib.util.spec_from_file_location("losses_benchmark", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ordinary_losses_take_what_is_allowed_for(benchmark: Any, dtype: torch.dtype) -> None:
    measured = {name: benchmark.measure(loss, dtype) for name, loss in benchmark.LOSSES.items() if name not in MORE}
    # In units of the result; the loss itself is a few bytes.
    found = {name: (round(between, 3), round(kept, 3)) for name, (between, kept) in measured.items()}
    assert {name for name, (between, kept) in found.items() if between > 1 + LOSS_COPIES or kept > KEPT} == set()
    assert max(between for between, _ in found.values()) == 1 + LOSS_COPIES, "and no more is"
    assert max(kept for _, kept in found.values()) == KEPT


def nodes(*tensors: tuple[tuple[int, ...], torch.dtype]) -> list[fx.Node]:
    graph = fx.Graph()
    made = []
    with FakeTensorMode():
        for shape, dtype in tensors:
            node = graph.call_function(torch.ops.aten.relu.default, ())
            node.meta["val"] = torch.empty(shape, dtype=dtype)
            made.append(node)
    return made


def test_losses_widen_halves_and_further_code_does_not() -> None:
    result, gradient = nodes(((4, 5), torch.bfloat16), ((4, 5), torch.bfloat16))
    assert bytes_in_loss(result) == 80
    assert Ends.of([result, result], [gradient], goes_on=False) == Ends(80, 80, LOSS_COPIES * 80, KEPT * 80)
    assert Ends.of([result], [gradient], goes_on=True) == Ends(40, 40, 40, 0)


def test_several_calls_have_several_ends() -> None:
    assert Ends(1, 2, 3, 4).times(3) == Ends(3, 6, 9, 12)
