"""A CUDA device that is not there, for all tests of this folder; without triton or g++ they are skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from helpers.fake_cuda import FakeCuda, shim


@pytest.fixture(scope="session")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeCuda]:
    """The device, whose answers all processes of a test run share."""
    if reason := shim.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.getbasetemp()
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with FakeCuda(shared / "fake_cuda") as device:
        yield device
