"""What makes the command line pleasant: progress, narrow terminals, no colour, completion."""

from __future__ import annotations

import io
import re
import shutil
import subprocess

import pytest
from rich.console import Console

from xconv_fx.cli import COMMANDS, main
from xconv_fx.cli import status as status_module
from xconv_fx.cli.arguments import FAILED, OK
from xconv_fx.cli.completion import SHELLS
from xconv_fx.cli.status import status
from xconv_fx.progress import announce, doing, listening

NET = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1))
"""
PLAN = ["plan", "net.py:build", "--input", "2x3x16x16", "--budget", "90%"]


@pytest.fixture(autouse=True)
def project(project_of):
    return project_of("net", NET)


@pytest.fixture
def terminal(monkeypatch):
    """Standard error is an interactive terminal; what is written to it."""
    file = io.StringIO()
    monkeypatch.setattr(status_module, "Console", lambda **_: Console(file=file, force_terminal=True, width=80))
    monkeypatch.setenv("TERM", "xterm")
    return file


def test_an_interactive_terminal_shows_what_is_being_done(terminal, capsys):
    assert main([*PLAN, "--json", "-"]) == OK
    assert "planning graph 1" in terminal.getvalue()
    assert capsys.readouterr().out.startswith("[")


def test_a_status_is_what_was_announced_last(terminal):
    with status("first"):
        announce("second")
        with doing("third"):
            announce("fourth")
    announce("unheard")
    assert "unheard" not in terminal.getvalue()


def test_announcements_say_what_they_are_a_part_of():
    told = []
    with listening(told.append):
        announce("one")
        with doing("two"):
            announce("three")
        announce("four")
    assert told == ["one", "two", "two: three", "four"]


def test_without_a_terminal_it_is_quiet(capsys):
    with status("first"):
        announce("second")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("width", [30, 50, 80])
def test_narrow_terminals(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(PLAN) == OK
    assert max(map(len, capsys.readouterr().out.splitlines())) <= width


@pytest.mark.parametrize("colour", [True, False])
def test_no_color(capsys, monkeypatch, colour):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    assert main(PLAN) == OK
    assert bool(re.search(r"\x1b\[[\d;]*3\d", capsys.readouterr().out)) == colour


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_every_command(capsys, shell):
    assert main(["completion", shell]) == OK
    script = capsys.readouterr().out
    names = [module.__name__.rpartition(".")[2].replace("_", "-") for module in COMMANDS]
    assert [name for name in names if name not in script] == [] and "channels" in script


def test_bash_completes(capsys, tmp_path):
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    assert main(["completion", "bash"]) == OK
    (tmp_path / "xconv.bash").write_text(capsys.readouterr().out)

    def completed(*words: str) -> list[str]:
        line = " ".join(f"'{word}'" for word in ("xconv", *words))
        run = f"source ./xconv.bash; COMP_WORDS=({line}); COMP_CWORD={len(words)}; _shtab_xconv; echo ${{COMPREPLY[@]}}"
        return subprocess.run(["bash", "-c", run], capture_output=True, text=True, check=True).stdout.split()

    assert completed("sw") == ["sweep"]
    assert completed("fit", "--al") == ["--allocate", "--along"]
    assert completed("fit", "--along", "") == ["batch", "spatial"]


def test_a_shell_that_is_not_known(capsys):
    assert main(["completion", "fish"]) == FAILED
    assert "bash" in capsys.readouterr().err
