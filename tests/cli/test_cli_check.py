"""`xconv check` with the real planner: regressions in the example's network are caught, named, and accepted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xconv_fx.cli import main
from xconv_fx.cli.arguments import FAILED, OK
from xconv_fx.cli.check import GREW

EXAMPLE = Path(__file__).parents[2] / "examples" / "ci"
CHECKS = """
tolerance = "1%"
[check.small]
target = "net.py:UNet(width=8)"
inputs = ["2x3x32x32"]
budget = "80%"
codecs = "bitmask,quantize"
"""


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """The example's network with one small check, in the current directory."""
    (tmp_path / "net.py").write_text((EXAMPLE / "net.py").read_text())
    (tmp_path / "xconv.toml").write_text(CHECKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    yield tmp_path
    sys.modules.pop("xconv_plan_net", None)
    torch._dynamo.reset()


def edit(project: Path, *changes: tuple[str, str]) -> None:
    """Change the network's source, as a commit would."""
    source = (project / "net.py").read_text()
    for before, after in changes:
        assert before in source
        source = source.replace(before, after)
    (project / "net.py").write_text(source)
    sys.modules.pop("xconv_plan_net", None)


def test_a_skip_connection_and_an_activation_are_caught(project, capsys):
    assert main(["check"]) == FAILED
    assert "no lock file" in capsys.readouterr().err
    assert main(["check", "--update"]) == OK
    first = (project / "xconv.lock").read_text()
    assert str(project) not in first
    capsys.readouterr()

    # The image itself goes to the decoder as well.
    edit(project, ("(2 * width, width)\n        self.head", "(2 * width + 3, width)\n        self.head"))
    edit(project, ("skip = self.encoder(x)", "image, skip = x, self.encoder(x)"), ("(skip, x)", "(skip, x, image)"))
    assert main(["check", "--format", "json"]) == GREW
    (check,) = json.loads(capsys.readouterr().out)["checks"]
    assert {"peak without a budget", "lowest feasible budget"} <= {
        n["name"] for n in check["numbers"] if n["regressed"]
    }
    assert [layer["name"] for layer in check["layers"]] == ["decoder.0"]
    grown = max(
        (r for r in check["residuals"] if r["before"]), key=lambda r: r["after"]["bytes"] - r["before"]["bytes"]
    )
    assert (grown["before"]["shape"], grown["after"]["shape"]) == ("2x16x32x32", "2x19x32x32")
    assert grown["after"]["operation"] == "cat" and grown["after"]["line"].startswith(f"{project}/net.py:")
    assert main(["check", "--update"]) == OK and main(["check", "--tolerance", "0"]) == OK
    assert capsys.readouterr().out == "small: ok\nsmall: ok\n"

    edit(project, ("nn.ReLU()", "nn.Softplus()"))
    assert main(["check"]) == GREW
    shown = capsys.readouterr().out
    assert "small: grew" in shown and "middle.2   ReLU()  Softplus(" in shown


def test_the_lock_file_is_the_same_from_every_process(project):
    """Hash seeds, threads, a calibration and the directory differ; the bytes do not."""
    environment = {**os.environ, "XCONV_FX_CACHE": str(project / "cache")}
    command = [sys.executable, "-m", "xconv_fx.cli", "check", "--update", "--config", str(project / "xconv.toml")]
    (project / "elsewhere").mkdir()
    runs = [
        subprocess.Popen(
            [*command, "--lock", str(project / f"lock{seed}")],
            env={**environment, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads},
            cwd=project / folder,
            stdout=subprocess.PIPE,
        )
        for seed, threads, folder in (("1", "1", "."), ("2", "2", "elsewhere"))
    ]
    assert [run.communicate()[0] for run in runs] == [b"small: ok\n"] * 2
    assert (project / "lock1").read_bytes() == (project / "lock2").read_bytes()


def test_what_cannot_be_compared(project, capsys):
    (project / "net.py").write_text("import torch\nbuild = lambda: torch.nn.Conv2d(3, 4, 3)\n")
    one = '[check.{}]\ntarget = "net.py:build"\ninputs = ["2x3x8x8"]\n'
    (project / "xconv.toml").write_text(one.format("a"))
    assert main(["check", "--update"]) == OK
    lock = (project / "xconv.lock").read_text()

    (project / "xconv.toml").write_text(one.format("a") + one.format("b"))
    assert main(["check", "b"]) == GREW
    assert "b: failed\n  not in the lock file\n  try: xconv check --update" in capsys.readouterr().out
    assert main(["check", "b", "--update"]) == OK
    assert json.loads((project / "xconv.lock").read_text())["checks"].keys() == {"a", "b"}

    (project / "xconv.toml").write_text(one.format("a").replace("2x3", "4x3"))
    assert main(["check"]) == GREW
    shown = capsys.readouterr().out
    assert "a: failed\n  configured otherwise than" in shown and "b: failed\n  in the lock file, but not in" in shown

    (project / "xconv.toml").write_text(one.format("a") + 'budget = "1kB"\n')
    assert main(["check", "--update"]) == GREW
    assert "mem_budget=1.00 kB cannot be met: the smallest feasible budget is" in capsys.readouterr().out
    assert json.loads((project / "xconv.lock").read_text())["checks"]["a"] == json.loads(lock)["checks"]["a"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["smal"], ["no check 'smal'", "did you mean 'small'"]),
        (["--tolerance", "lots"], ["--tolerance 'lots' is no tolerance", "'1%'"]),
        (["--config", "none.toml"], ["cannot read none.toml"]),
        (["--format", "xml"], ["'text', 'json', 'github', 'junit'"]),
    ],
)
def test_mistakes_are_told_what_to_type_next(capsys, arguments, told):
    assert main(["check", *arguments]) == FAILED
    error = capsys.readouterr().err
    for text in told:
        assert text in error


def test_a_directory_without_a_configuration(project, capsys):
    (project / "xconv.toml").unlink()
    assert main(["check"]) == FAILED
    error = capsys.readouterr().err
    assert "no xconv.toml here or above" in error and "[check.NAME]" in error


def test_a_model_that_fails_is_told_with_its_check(project, capsys):
    (project / "xconv.toml").write_text(CHECKS.replace("UNet(width=8)", "UNett"))
    assert main(["check", "--update"]) == FAILED
    assert "error: check small: net.py has no 'UNett'" in capsys.readouterr().err


def test_the_examples_lock_file_belongs_to_its_configuration():
    """Whether the numbers are right is what `xconv check` itself says, in `.ci/run`."""
    from xconv_fx.tools.check import config, lock

    records, _ = lock.read(EXAMPLE / "xconv.lock")
    checks = config.read(EXAMPLE / "xconv.toml").checks
    assert {check.name: dict(check.written) for check in checks} == {n: r.step for n, r in records.items()}
