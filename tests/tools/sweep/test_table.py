"""A frontier on terminals that are narrow, plain, or colourful; and as a picture."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from xconv_fx.errors import UsageError
from xconv_fx.tools.sweep.picture import draw
from xconv_fx.tools.sweep.plot import Plot
from xconv_fx.tools.sweep.table import FrontierReport
from xconv_fx.units import format_size


def shown(renderable, width, **settings):
    file = io.TextIOWrapper(io.BytesIO(), encoding=settings.pop("encoding", "utf-8"))
    Console(file=file, width=width, legacy_windows=False, **settings).print(renderable)
    file.flush()
    return file.buffer.getvalue().decode()


@pytest.mark.parametrize("width", [30, 40, 60, 100, 160])
def test_no_line_is_longer_than_the_terminal(found, width):
    text = shown(FrontierReport(found), width)
    assert max(map(len, text.splitlines())) <= width
    assert all(format_size(point.peak) in text for point in found.points) or width < 40


def test_the_codecs_are_columns_where_there_is_room(found):
    assert "keep" in shown(FrontierReport(found), 120) and "keep" not in shown(FrontierReport(found), 60)


def test_ascii_is_enough(found):
    text = shown(FrontierReport(found), 80, encoding="ascii")
    assert text.isascii() and "*" in text


def test_no_color_is_respected(found, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in shown(FrontierReport(found), 100, force_terminal=True, color_system="truecolor")
    monkeypatch.delenv("NO_COLOR")
    assert "\x1b[3" in shown(FrontierReport(found), 100, force_terminal=True, color_system="truecolor")


def test_a_line_from_corner_to_corner():
    plot = Plot("t", [(0, 1), (1, 0)], ("a", "b"), ("0", "1"), height=4)
    assert shown(plot, 8, encoding="ascii").splitlines() == [
        "t",
        "1 |*   ",
        "  | *  ",
        "  |  * ",
        "0 |   *",
        "  +----",
        "   a  b",
    ]
    # A dot a column and row: the top left one and the bottom right one of the whole.
    lines = shown(plot, 8).splitlines()
    assert ord(lines[1][3]) & 0x01 and ord(lines[4][-1]) & 0x80


def test_a_picture(found, tmp_path):
    path = tmp_path / "frontier.png"
    draw(found, "net", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="cannot write"):
        draw(found, "net", str(tmp_path / "none" / "frontier.png"))


def test_without_matplotlib_it_is_said_what_to_install(found, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError) as raised:
        draw(found, "net", str(tmp_path / "frontier.png"))
    assert raised.value.hint == "pip install 'xconv-fx[plot]'"
