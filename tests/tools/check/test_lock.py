"""The lock file: what is written comes back, and equal records give equal bytes in a layout that diffs well."""

from __future__ import annotations

import json

import pytest

from xconv_fx.errors import UsageError
from xconv_fx.tools.check import lock


def test_records_come_back(record, worse, tmp_path):
    lock.write(tmp_path / "lock", lock.dumps({"a": record, "b": worse}, "2.13.0"))
    records, torch = lock.read(tmp_path / "lock")
    assert records == {"a": record, "b": worse} and torch == "2.13.0"
    assert lock.dumps(records, torch) == (tmp_path / "lock").read_text()


def test_a_residual_is_a_line_without_its_place_in_the_code(record):
    text = lock.dumps({"a": record}, "2.13.0")
    rows = [json.loads(line.rstrip(",")) for line in text.splitlines() if '"operation"' in line]
    assert [row["operation"] for row in rows] == ["convolution", "relu", "cat"]
    assert "net.py:7" not in text
    assert text.endswith("}\n") and json.loads(text)["checks"]["a"]["peak"] == record.peak


def test_no_file_is_no_records(tmp_path):
    assert lock.read(tmp_path / "lock") == ({}, "")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "torch": "", "checks": {"a": {}}}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "lock").write_text(text)
    with pytest.raises(UsageError) as told:
        lock.read(tmp_path / "lock")
    assert told.value.hint == "xconv check --update"
