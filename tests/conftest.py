"""Set-up of every test: one known state of torch's generator, and no calibration, so that plans and sums repeat."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _uncalibrated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Plans rest on the generic rates, whatever was measured on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XCONV_FX_CACHE", str(tmp_path_factory.mktemp("calibrations")))
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Tests that draw numbers draw the same ones alone, together, and in any order."""
    torch.manual_seed(0)
