"""`xconv fit` and `xconv bench` from a file of the user's: tables, JSON, exit codes."""

from __future__ import annotations

import json

import pytest

from xconv_fx.cli import main
from xconv_fx.cli.arguments import FAILED, INFEASIBLE, OK

NET = """
import torch
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1)
    )

def entropy(output, labels):
    return nn.functional.cross_entropy(output, labels)
"""
MODEL = ["net.py:build", "--input", "4x3x32x32"]
LOSS = ["--loss", "net.py:entropy", "--label", "4x32x32:int64"]


@pytest.fixture(autouse=True)
def project(project_of):
    return project_of("net", NET)


def test_fit(capsys):
    arguments = ["fit", *MODEL, *LOSS, "--budget", "3MB", "--codecs", "exact", "--json", "fit.json"]
    assert main(arguments) == OK
    captured = capsys.readouterr()
    assert "largest batch" in captured.out and "xconv, exact" in captured.out and captured.err == ""
    with open("fit.json") as file:
        found = json.load(file)
    inductor, exact = found["methods"]
    assert found["budget"] == 3_000_000 and inductor["method"] == "inductor"
    assert inductor["largest"]["size"] <= exact["largest"]["size"] == exact["beyond"]["size"] - 1


def test_fit_where_nothing_fits(capsys):
    assert main(["fit", *MODEL, "--budget", "10kB", "--codecs", "all"]) == INFEASIBLE
    assert "none" in capsys.readouterr().out


def test_bench(capsys):
    """The loss, which is compiled with the model, is part of the step."""
    assert main(["bench", *MODEL, *LOSS, "--budget", "65%", "--steps", "2", "--json", "-"]) == OK
    found = json.loads(capsys.readouterr().out)
    xconv = found["xconv"]
    # What no audit sees is a few kilobytes.
    assert xconv["audited"] <= found["budget"] and abs(xconv["measured"] - xconv["audited"]) < 20_000
    assert xconv["measured"] < found["inductor"]["measured"]
    assert abs(found["inductor"]["predicted"] / found["inductor"]["measured"] - 1) < 0.25
    assert xconv["seconds"] > 0 and found["inductor"]["audited"] is None


def test_bench_shows_a_table(capsys):
    assert main(["bench", *MODEL, "--budget", "70%", "--steps", "1"]) == OK
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("predicted", "audited", "measured", "inductor", "to spare", "noise"))


def test_bench_of_a_budget_that_cannot_be_met(capsys):
    assert main(["bench", *MODEL, "--budget", "10kB"]) == INFEASIBLE
    assert "smallest feasible budget" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["fit", *MODEL], "--budget 8GB"),
        (["fit", *MODEL, "--budget", "60%"], "--budget 8GB"),
        (["fit", *MODEL, "--budget", "1GB", "--multiple", "0"], "--multiple 16"),
        (["bench", *MODEL], "--budget 60%"),
        (["bench", *MODEL, "--budget", "1GB", "--steps", "none"], "--steps 5"),
    ],
)
def test_what_cannot_work_says_what_to_type(capsys, arguments, hint):
    assert main(arguments) == FAILED
    error = capsys.readouterr().err
    assert hint in error and "Traceback" not in error
