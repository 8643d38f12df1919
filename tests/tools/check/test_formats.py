"""What each format says of a regression: the numbers, the layer, the place in the code."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from xconv_fx.cli import check as command
from xconv_fx.tools.check import formats
from xconv_fx.tools.check.compare import Result, compare
from xconv_fx.tools.check.config import Tolerance


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("GITHUB_WORKSPACE", "/src")


@pytest.fixture
def results(record, worse):
    """A regression, an improvement, an unchanged check and one that cannot be compared."""
    return [
        compare("bad", record, worse, Tolerance()),
        compare("good", worse, record, Tolerance()),
        compare("same", record, record, Tolerance()),
        Result("new", problem="not in the lock file", record=record),
    ]


def test_text(results):
    shown = formats.text(results)
    bad, good = shown.split("good: ok")
    assert bad.startswith("bad: grew")
    rows = [line.split() for line in bad.splitlines()]
    assert ["lowest", "feasible", "budget", "800", "kB", "900", "kB", "+12%"] in rows
    assert ["act", "ReLU()", "SiLU()"] in rows
    assert ["act", "(net.py:8)", "4x8x16x16", "bitmask", "->", "keep", "0.00", "->", "0.03", "+31.7", "kB"] in rows
    assert "1 more that the backward reads otherwise" in bad
    assert "same: ok\nnew: failed\n  not in the lock file\n  try: xconv check --update\n" in good
    assert "\x1b" not in shown and "\n\n\n" not in shown


def test_residuals_that_are_only_read_otherwise(record, worse):
    from dataclasses import replace

    read = replace(record, residuals=(worse.residuals[0], *record.residuals[1:]))
    shown = formats.text([compare("net", record, read, Tolerance())])
    assert "norm -> nonlinear norm" in shown


def test_json(results):
    data = json.loads(formats.as_json(results))
    assert data["failed"] and [check["failed"] for check in data["checks"]] == [True, False, False, True]
    assert data["checks"][0]["layers"] == [{"name": "act", "before": "ReLU()", "after": "SiLU()"}]
    assert data["checks"][0]["residuals"][0]["after"]["line"] == "/src/net.py:8"
    assert data["checks"][0]["numbers"] == [
        {"name": "lowest feasible budget", "unit": "B", "before": 800000, "after": 900000, "regressed": True}
    ]


def test_github_annotations(results):
    bad, good, new = formats.github(results).splitlines()
    assert bad.startswith(
        "::error file=net.py,line=8,title=xconv check bad::lowest feasible budget 800 kB -> 900 kB%0A"
    )
    assert "layer act: ReLU() -> SiLU()" in bad
    assert good.startswith("::notice ") and new.startswith("::error title=xconv check new::not in the lock file")


def test_github_escapes_what_would_end_a_property():
    line = formats.github([Result("a:b,c", problem="50%\nof it")])
    assert line == "::error title=xconv check a%3Ab%2Cc::50%25%0Aof it\n"


def test_junit(results):
    suite = ElementTree.fromstring(formats.junit(results))
    assert (suite.get("tests"), suite.get("failures")) == ("4", "2")
    assert [case.get("name") for case in suite if case.find("failure") is not None] == ["bad", "new"]
    failure = suite[0].find("failure")
    assert failure.get("message") == "lowest feasible budget 800 kB -> 900 kB" and "SiLU()" in failure.text


def test_choices_are_the_formats():
    assert set(command.FORMATS) == set(formats.FORMATS)
    assert Path(command.__file__).name == "check.py"
