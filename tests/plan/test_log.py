"""The logger: what TORCH_LOGS turns on, in a process of its own because torch reads it while being imported."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from xconv_fx.codec_spec import CodecSpec
from xconv_fx.plan import Choice, Plan
from xconv_fx.plan.log import log, publish

PLAN = Plan(
    "cpu", None, 10, 5, "mm", 0, (Choice("relu", "net.act", "relu", (2, 2), "float32", (), CodecSpec("keep"), 16, 16),)
)

SCRIPT = """
{first}
from xconv_fx.plan.log import log, publish
from xconv_fx.plan import Plan
log.debug("a debug message")
publish(Plan.from_json({plan!r}))
"""


def _run(first: str, **environment: str) -> str:
    code = SCRIPT.format(first=first, plan=PLAN.to_json())
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCH")}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, check=True)
    return done.stderr


@pytest.mark.parametrize("first", ["import torch", "import xconv_fx"])
def test_torch_logs_shows_the_plan_and_debug_messages(first):
    stderr = _run(first, TORCH_LOGS="+xconv_fx")
    assert "a debug message" in stderr and "net.act" in stderr
    assert stderr.count("net.act") == 1


def test_without_torch_logs_nothing_is_printed():
    assert _run("import torch") == ""


def test_torch_trace_gets_the_plan_as_an_artifact(tmp_path):
    _run("import torch", TORCH_TRACE=str(tmp_path))
    (trace,) = tmp_path.iterdir()
    assert '"name": "xconv_plan"' in trace.read_text() and '"net.act"' in trace.read_text()


def test_python_logging_works_too(caplog):
    with caplog.at_level(logging.INFO, logger="xconv_fx"):
        publish(PLAN)
    assert "net.act" in caplog.text and caplog.records[0].name == log.name
