"""`xconv doctor`: a machine that works, and each way in which it may not."""

from __future__ import annotations

import json

import pytest
import torch

from xconv_fx import hooks
from xconv_fx.cli import main
from xconv_fx.cli.arguments import OK
from xconv_fx.cli.doctor import BROKEN
from xconv_fx.cost_model.device import DEVICES
from xconv_fx.hooks.private_parts import Fault, Private
from xconv_fx.step.trial import Trial
from xconv_fx.tools import doctor


def findings(capsys, *arguments: str, code: int) -> dict[str, dict[str, str]]:
    """What `xconv doctor --json` finds, by name."""
    assert main(["doctor", "--json", *arguments]) == code
    data = json.loads(capsys.readouterr().out)
    assert data["works"] == (code == OK)
    return {finding["name"]: finding for finding in data["findings"]}


def test_this_machine_trains(capsys):
    found = findings(capsys, code=OK)
    assert {name: item["status"] for name, item in found.items()} == {
        "python": "ok",
        "torch": "ok",
        "hooks": "ok",
        "backend": "ok",
        "compiler": "ok",
        "caches": "ok",
        "cuda": "note",
        "rates": "note",
        "planning": "ok",
        "training": "ok",
    }
    assert torch.__version__ in found["torch"]["detail"]
    assert found["rates"]["fix"] == "xconv profile-machine"


@pytest.fixture
def quick(monkeypatch):
    """Neither plans nor trains."""
    fine = doctor.Finding("planning", doctor.OK, "")
    monkeypatch.setattr(doctor, "_planning", lambda: fine)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("found", "statuses"),
    [
        (Trial(1e-4, 100, 80, audited=1000, measured=1010), ("ok", "ok")),
        (Trial(1e-4, 100, 80, audited=1000, measured=1100), ("broken", "note")),
        (Trial(1e-2, 100, 80, audited=1000, measured=1000), ("broken", "broken")),
    ],
)
def test_a_gpu_is_trained_on(capsys, monkeypatch, found, statuses):
    asked = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "a board")
    monkeypatch.setattr("xconv_fx.device.rates.spec", lambda kind: DEVICES[kind])
    monkeypatch.setattr("xconv_fx.step.trial.train_a_step", lambda device: asked.append(device) or found)
    main(["doctor", "--json"])
    rows = {row["name"]: row["status"] for row in json.loads(capsys.readouterr().out)["findings"]}
    assert asked == ["cpu", "cuda"] and (rows["training"], rows["training on cuda"]) == statuses


@pytest.mark.usefixtures("quick")
def test_another_torch(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XCONV_FX_CACHE", str(tmp_path))
    monkeypatch.setattr("xconv_fx.hooks.version.TESTED", ("2.99",))
    found = findings(capsys, "--quick", code=OK)["hooks"]
    assert found["status"] == "note" and "this version was not tested" in found["detail"]


@pytest.mark.usefixtures("quick")
def test_a_torch_without_what_is_needed(capsys, monkeypatch):
    gone = Fault(Private("torch._dynamo", "reset", "hooks/dynamo.py"), "is not there")
    monkeypatch.setattr(hooks, "probe", lambda: (gone,))
    found = findings(capsys, "--quick", code=BROKEN)
    assert "hooks/dynamo.py: torch._dynamo.reset is not there" in found["hooks"]["detail"]
    assert found["hooks"]["fix"] == "pip install 'torch>=2.12,<2.16'" and "training" not in found


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("compiler", ["/nowhere/g++", "false"])
def test_no_compiler(capsys, monkeypatch, compiler):
    monkeypatch.setattr(hooks, "cpp_compiler", lambda: compiler)
    assert findings(capsys, "--quick", code=BROKEN)["compiler"]["status"] == "broken"


@pytest.mark.usefixtures("quick")
def test_a_cache_that_cannot_be_written(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XCONV_FX_CACHE", str(tmp_path / "file"))
    found = findings(capsys, "--quick", code=BROKEN)["caches"]
    assert str(tmp_path / "file") in found["detail"] and found["fix"].startswith("XCONV_FX_CACHE=DIR")


def test_a_check_that_raises_is_a_finding(capsys, monkeypatch):
    def planning() -> None:
        raise KeyError("a new torch")

    monkeypatch.setattr(doctor, "_planning", planning)
    assert main(["doctor", "--quick"]) == BROKEN
    shown = capsys.readouterr()
    assert "broken  KeyError: 'a new torch'" in shown.out and "planning: xconv doctor --debug" in shown.out
    assert shown.err == ""
    main(["doctor", "--quick", "--debug"])
    assert "Traceback" in capsys.readouterr().err
