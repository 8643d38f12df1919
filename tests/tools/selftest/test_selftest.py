"""`xconv selftest`: what it finds here is right, what is wrong is found, and how it is said."""

from __future__ import annotations

import json

import pytest
import torch

from xconv_fx.cli import main
from xconv_fx.cli.arguments import FAILED, OK
from xconv_fx.cli.selftest import OFF
from xconv_fx.device import workspace
from xconv_fx.errors import UsageError
from xconv_fx.ops import codec
from xconv_fx.tools.selftest import codecs, draws, gradients, groups, memory, operators, run, workspaces
from xconv_fx.tools.selftest.nets import LARGE, NETS
from xconv_fx.tools.selftest.result import Finding, Report, Result

# Raised by torch 2.13 itself, while it imports Inductor.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


def case(module, name):
    """The case of a group's module with this name."""
    return next(one for one in module.CASES if str(one) == name)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_test_has_a_name_of_its_own(device):
    names = [test.name for test in groups.tests(device)]
    assert len(set(names)) == len(names)
    assert list(dict.fromkeys(name.partition("/")[0] for name in names)) == [
        "operators", "workspaces", "slices", "seeds", "gradients", "memory", "codecs", "steps"
    ]  # fmt: skip


def test_the_large_networks_are_what_they_are_called():
    with torch.device("meta"):
        sizes = {net.name: sum(p.numel() for p in net.make().parameters()) for net in LARGE}
    assert sizes["resnet50"] == 25_557_032  # As in torchvision.


def test_the_command_on_a_cpu(capsys, tmp_path):
    """An operator, a slice's draws and a network, by the command line."""
    path = tmp_path / "selftest.json"
    names = ("operators/bitmask*", "workspaces/2d", "slices/again", "gradients/vgg-exact-float32")
    only = [part for name in names for part in ("--only", name)]
    assert main(["selftest", "--device", "cpu", "--json", str(path), *only]) == OK
    data = json.loads(path.read_text())
    assert data["off"] == [] and data["device"] == "cpu" and data["versions"]["torch"] == torch.__version__
    rows = {row["name"]: row for row in data["results"]}
    assert set(rows) >= {"operators/bitmask-2d-bool", *names[1:]}
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert rows["slices/again"]["numbers"]["slices that hold"] < 4
    out = capsys.readouterr().out
    assert "gradients/vgg-exact-float32" in out and f"{len(rows)} ok, 0 off, 0 left out" in out


def test_words_that_differ_are_off(monkeypatch):
    """A generated kernel that flips a bit."""
    case_ = case(operators, "quantize:4-2d-float32")
    table = codec._CODECS["quantize"]

    def compiled():
        def encode(case, x, seed):
            words, ranges = table.encode(x, seed, case.held)
            return words ^ (torch.arange(words.numel()).view(words.shape) == 5), ranges

        return encode, operators._decode

    monkeypatch.setattr(operators, "_compiled", compiled)
    found = operators.check(case_, "cpu")
    assert found.status == "off" and "of the words are not those of the CPU" in found.off


def test_a_workspace_above_the_rule_is_off(monkeypatch):
    monkeypatch.setattr(workspaces, "_taken", lambda func, args, device: 1 << 30)
    found = workspaces.check(workspaces.CASES[0], "cpu")
    assert found.off.startswith("the forward takes 1073741824 bytes") and workspace


def test_gradients_that_are_off(monkeypatch):
    monkeypatch.setattr(gradients.training, "compiled", lambda model, **_: lambda x: 1.01 * model(x))
    found = gradients.check(case(gradients, "vgg-exact-float32"), "cpu")
    assert found.off.startswith("gradients are off by 0.02")


def test_a_dropout_that_the_backward_does_not_know_is_off(monkeypatch):
    """Eagerly, and with another mask in the backward."""

    class Other(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * (torch.rand_like(x) > 0.5) * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * (torch.rand_like(gradient) > 0.5) * 2

    monkeypatch.setattr(draws.F, "dropout", lambda x, p=0.5, *_: Other.apply(x))
    monkeypatch.setattr(draws, "_budget", lambda *_: "60%")
    monkeypatch.setattr(draws.training, "compiled", lambda model, **_: model)
    monkeypatch.setattr(draws.xconv_fx, "plans", lambda _: (type("Plan", (), {"slices": 4, "held_slices": 1}),))
    assert "the backward has another dropout" in draws.check_slices("again", "cpu").off


def test_seeds_that_are_replayed_are_off(monkeypatch):
    """As a CUDA graph replays what was drawn on the host."""
    monkeypatch.setattr(draws.training, "compiled", lambda model, **_: model)
    assert "steps draw the same numbers" in draws.check_seeds("default", "cpu").off


def test_a_peak_over_the_audited_one_is_off(monkeypatch):
    plan = type("Plan", (), {"predicted_peak": 1000, "audited_peak": 1000, "measured_peak": 1000, "budget": 1000})
    monkeypatch.setattr(memory.training, "compiled", lambda model, **_: model)
    monkeypatch.setattr(memory.xconv_fx, "plans", lambda _: (plan,))
    assert "bytes more than was audited" in memory.check(NETS[1], "cpu").off


def test_an_error_is_a_finding_and_late_tests_are_left_out(monkeypatch):
    def fails() -> Finding:
        raise KeyError("a new board")

    rows = (groups.Test("one/first", fails), groups.Test("one/second", lambda: Finding(numbers={"bytes": 3})))
    monkeypatch.setattr(run, "tests", lambda device: rows)
    report = run.selftest("cpu")
    assert report.off == ("one/first",) and report.results[0].finding.off.startswith("KeyError: 'a new board' (fails:")
    assert report.results[1].finding == Finding(numbers={"bytes": 3})
    late = run.selftest("cpu", minutes=0)
    assert not late.off and {result.finding.status for result in late.results} == {"left out"}


def test_what_is_off_is_the_exit_code(monkeypatch, capsys):
    report = Report("cpu", {"torch": "2"}, (Result("one/first", Finding("wrong", numbers={"error": 0.25})),), 1.0)
    monkeypatch.setattr(run, "selftest", lambda *_: report)
    assert main(["selftest", "--device", "cpu", "--json", "-"]) == OFF
    data = json.loads(capsys.readouterr().out)
    assert data["off"] == ["one/first"]
    assert data["results"] == [
        {"name": "one/first", "status": "off", "seconds": 0.0, "off": "wrong", "numbers": {"error": 0.25}}
    ]


def test_usage_errors(capsys):
    for arguments in (["--only", "nothing"], ["--device", "cuda"], ["--minutes", "soon"], ["--device", "tpu"]):
        assert main(["selftest", *arguments]) == FAILED
    assert "one of operators, workspaces" in capsys.readouterr().err
    with pytest.raises(UsageError):
        run.selftest("cpu", ["gradients/nothing*"])


def test_codecs_are_timed_beside_a_copy(monkeypatch):
    monkeypatch.setitem(codecs.SIZES, "cpu", (2, 16, 16, 16))
    numbers = codecs.check(case(codecs, "bitmask"), "cpu").numbers
    assert numbers["payload"] == 2 * 16 * 16 * 16 // 8 and numbers["encode: share of a copy's bandwidth"] > 0
