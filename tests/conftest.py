"""Set-up of every test: one known state of torch's generator, and two threads, so that timings and sums repeat."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Tests that draw numbers draw the same ones alone, together, and in any order."""
    torch.manual_seed(0)
