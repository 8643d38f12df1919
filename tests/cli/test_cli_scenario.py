"""`xconv plan` for a device that is not there: flags in, a plan or a line that says what to type out."""

from __future__ import annotations

import json

import pytest

from xconv_fx.cli import main
from xconv_fx.cli.arguments import FAILED, OK

NET = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 2, 1)
    )
"""
PLAN = ["plan", "net.py:build", "--input", "4x3x32x32"]
PARAMETERS = 4 * (16 * 27 + 16 + 16 * 144 + 16 + 2 * 16 + 2)


@pytest.fixture(autouse=True)
def project(project_of):
    return project_of("net", NET)


def test_a_gpu_that_is_not_there(capsys):
    flags = ["--gpu", "l4", "--amp", "fp16", "--channels-last", "--optimizer", "adamw", "--budget", "95%"]
    assert main([*PLAN, *flags]) == OK
    shown = " ".join(capsys.readouterr().out.split())
    assert "l4 of 24.0 GB: the peak leaves 24.0 GB free" in shown
    assert "is the state of adamw" in shown and "the data sheet's (l4) rates" in shown
    assert "on cuda:0" in shown and "traced without a GPU" in shown and "cuDNN's workspaces are assumed" in shown


def test_json_says_what_was_planned_for(capsys):
    assert main([*PLAN, "--gpu", "h100", "--optimizer", "momentum", "--json", "-"]) == OK
    (plan,) = json.loads(capsys.readouterr().out)
    assert (plan["gpu"], plan["gpu_memory"], plan["optimizer"]) == ("h100", 80_000_000_000, "momentum")
    assert PARAMETERS <= plan["optimizer_bytes"] <= PARAMETERS + 6 * 512


def test_a_peak_beyond_the_gpu(capsys):
    assert main(["plan", "net.py:build", "--input", "64x3x2048x2048", "--gpu", "t4"]) == OK
    assert "t4 of 16.0 GB: the peak exceeds it by" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message", "hint"),
    [
        (["--gpu", "h10"], "--gpu 'h10'", "did you mean 'h100'"),
        (["--gpu", "a100", "--device", "cpu"], "--gpu 'a100'", "leave out the device, or the GPU"),
        (["--device", "gpu"], "--device 'gpu'", "write one of cpu, cuda"),
        (["--amp", "fp16", "--device", "cpu"], "--amp 'fp16'", "write bf16, or plan for the device cuda"),
        (["--gpu", "v100", "--amp", "bf16"], "--amp 'bf16'", "a v100 has no bfloat16 arithmetic; write fp16"),
        (["--optimizer", "lion"], "--optimizer 'lion'", "write one of sgd, momentum, adam, adamw"),
    ],
)
def test_what_cannot_be_planned_for(capsys, project, flags, message, hint):
    """Said before the user's file is run."""
    (project / "net.py").write_text("raise SystemExit('must not run')")
    assert main([*PLAN, *flags]) == FAILED
    error = capsys.readouterr().err
    assert f"error: {message} cannot be planned for" in error and hint in error and "Traceback" not in error
