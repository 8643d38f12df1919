"""Set-up of every test: one known state of torch's generator, and no calibration, so that plans and sums repeat."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _uncalibrated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Plans rest on the generic rates, whatever was measured on this machine, and are looked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XCONV_FX_CACHE", str(tmp_path_factory.mktemp("calibrations")))
        patch.setenv("XCONV_FX_PLAN_CACHE", "0")
        patch.setenv("XCONV_FX_VERIFY", "1")
        yield


@pytest.fixture(autouse=True)
def _as_alone() -> Iterator[None]:
    """A test draws the same numbers, and runs on as many threads, alone, together, and in any order."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Dynamo counts compilations per line of code, across models and tests: here it starts from none."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def saved_by() -> Callable[[Callable[[], Any]], tuple[list[torch.Tensor], Any]]:
    """`saved_by(forward)`: the distinct tensors that autograd holds after `forward`, and what it returned."""

    def run(forward: Callable[[], Any]) -> tuple[list[torch.Tensor], Any]:
        saved: list[torch.Tensor] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = forward()
        return list({tensor.data_ptr(): tensor for tensor in saved}.values()), out

    return run
