"""What calls allocate, kept on disk for other processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from xconv_fx.device import known_scratch, scratch

aten = torch.ops.aten


@pytest.fixture
def another_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Forgets what this process knows, as often as it is called; the cache is on, in a folder of the test's."""
    monkeypatch.setenv("XCONV_FX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XCONV_FX_PLAN_CACHE", "1")

    def begin() -> None:
        scratch._measured.cache_clear()
        known_scratch._lines.cache_clear()

    begin()
    yield begin
    begin()


def _call(rows: int = 6) -> tuple[Any, Any]:
    return aten.linalg_inv_ex.default, scratch.signature((torch.empty(3, rows, rows),))


def _forbid_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(*_: Any) -> int:
        raise AssertionError("the call was made")

    monkeypatch.setattr(scratch, "_made", made)


def test_another_process_makes_no_call_that_is_known(another_process: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = scratch.measured(*_call())
    assert found, "an inversion takes scratch"
    another_process()
    _forbid_calls(monkeypatch)
    assert scratch.measured(*_call()) == found
    # Of another size nothing is known, and no call can be made here.
    assert scratch.measured(*_call(7)) is None


def test_other_settings_are_other_calls(another_process: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch.measured(*_call())
    another_process()
    _forbid_calls(monkeypatch)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert scratch.measured(*_call()) is None
    torch.set_num_threads(threads)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    another_process()
    assert scratch.measured(*_call()) is None


def test_lines_that_make_no_sense_are_passed_over(another_process: Any) -> None:
    found = scratch.measured(*_call())
    file = known_scratch.path()
    line = file.read_text()
    file.write_bytes(b'\xff\n["half a li\n{}\n3\n["key", "four"]\n["key", -1]\n["key", true]\n' + line.encode())
    another_process()
    assert known_scratch._lines(file) and scratch.measured(*_call()) == found
    assert len(known_scratch._lines(file)) == 1


def test_a_call_that_cannot_be_made_is_tried_by_every_process(another_process: Any) -> None:
    assert scratch.measured(aten.linalg_inv_ex.default, scratch.signature((torch.empty(3, 6, 5),))) is None
    assert not known_scratch.path().exists()


def test_operators_of_this_package(another_process: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions are kept for the same source; nothing of others, which change with the package."""
    xconv = torch.ops.xconv
    known_scratch.keep(xconv.pack_mask.default, (), 8)
    assert not known_scratch.path().exists()
    known_scratch.keep(xconv.volume_weight_gradient.default, (), 8)
    assert known_scratch.look_up(xconv.volume_weight_gradient.default, ()) == 8
    monkeypatch.setattr(known_scratch, "_source", lambda: "another")
    assert known_scratch.look_up(xconv.volume_weight_gradient.default, ()) is None


def test_a_cache_that_is_off(another_process: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XCONV_FX_PLAN_CACHE", "0")
    scratch.measured(*_call())
    assert not known_scratch.path().exists()


def test_a_folder_that_cannot_be_written_to(another_process: Any, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert scratch.measured(*_call())
