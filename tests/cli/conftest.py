"""Projects of a user: a directory with a file of networks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture
def project_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Makes a directory with one file the current one; nothing of it stays imported or compiled."""
    written: list[str] = []

    def make(name: str, source: str, columns: int = 100) -> Path:
        (tmp_path / f"{name}.py").write_text(source)
        written.append(f"xconv_plan_{name}")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "path", list(sys.path))
        torch._dynamo.reset()
        return tmp_path

    yield make
    for module in written:
        sys.modules.pop(module, None)
    torch._dynamo.reset()
