"""`xconv sweep` from a file of the user's: plots and table, files, exit codes."""

from __future__ import annotations

import json

import pytest

from xconv_fx.cli import main
from xconv_fx.cli.arguments import FAILED, INFEASIBLE, OK

NET = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1)
    )
"""
SWEEP = ["sweep", "net.py:build", "--input", "4x3x16x16", "--points", "3", "--slices", "1"]


@pytest.fixture(autouse=True)
def project(project_of):
    return project_of("net", NET)


def test_plots_and_table(capsys, project):
    files = ["--html", "f.html", "--png", "f.png", "--json", "f.json"]
    assert main([*SWEEP, *files]) == OK
    captured = capsys.readouterr()
    assert "extra time of a step" in captured.out and "exact" in captured.out
    # Not interactive: nothing but the result.
    assert captured.err == ""
    assert "net.py:build, 4x3x16x16" in (project / "f.html").read_text()
    assert (project / "f.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((project / "f.json").read_text())["points"]) == 3


def test_json_alone_goes_to_standard_output(capsys):
    assert main([*SWEEP, "--json", "-"]) == OK
    budgets = [point["budget"] for point in json.loads(capsys.readouterr().out)["points"]]
    assert len(budgets) == 3 and budgets[-1] is None


def test_a_budget_that_has_no_plan(capsys):
    assert main([*SWEEP, "--budget", "1kB"]) == INFEASIBLE
    assert "1.00 kB cannot be met" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [(["--points", "1"], "--points 10"), (["--html", "none/f.html"], "--html"), (["--budget", "8XB"], "8XB")],
)
def test_what_cannot_work_says_what_to_type(capsys, wrong, hint):
    assert main([*SWEEP, *wrong]) == FAILED
    error = capsys.readouterr().err
    assert hint in error and "Traceback" not in error


def test_progress_is_announced_in_order():
    from xconv_fx.cli import parser
    from xconv_fx.cli.arguments import workload
    from xconv_fx.progress import listening
    from xconv_fx.tools.sweep.frontier import frontier

    told: list[str] = []
    with listening(told.append):
        workload(parser().parse_args(SWEEP)).ask(frontier, points=3, slices=1)
    assert told[0] == "tracing graph 1" and told[-1] == "planning for budget 2 of 2"
