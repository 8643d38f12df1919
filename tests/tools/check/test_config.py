"""The configuration: where it is found, what it may say, and what every mistake in it is told."""

from __future__ import annotations

import pytest

from xconv_fx.errors import UsageError
from xconv_fx.options import Options
from xconv_fx.options.statistics import Statistics
from xconv_fx.tools.check import config
from xconv_fx.tools.check.config import Tolerance

CHECK = '[check.net]\ntarget = "net.py:build"\ninputs = ["4x3x16x16"]\n'


def read(tmp_path, text, name="xconv.toml"):
    (tmp_path / name).write_text(text)
    return config.read(tmp_path / name)


def test_a_file_of_its_own(tmp_path):
    options = 'budget = "60%"\nloss = "sum"\ngpu = "t4"\noptimizer = "adam"\n'
    settings = read(tmp_path, f'tolerance = "2%"\n{CHECK}{options}')
    (check,) = settings.checks
    assert (settings.lock, settings.tolerance) == (tmp_path / "xconv.lock", Tolerance(share=0.02))
    assert (check.workload.target, check.workload.inputs, check.workload.loss) == (
        "net.py:build",
        ("4x3x16x16",),
        "sum",
    )
    assert check.options == {"mem_budget": "60%", "gpu": "t4", "optimizer": "adam"}


def test_statistics_lie_beside_the_file(tmp_path):
    (tmp_path / "stats.json").write_text(Statistics({}, 3).to_json())
    (check,) = read(tmp_path, CHECK + 'stats = "stats.json"\n').checks
    assert Options.parse(check.options).stats == Statistics({}, 3)
    assert check.written["stats"] == "stats.json"


def test_a_table_of_pyproject(tmp_path):
    text = '[project]\nname = "x"\n[tool.xconv]\nlock = "memory.lock"\n' + CHECK.replace("[", "[tool.xconv.", 1)
    settings = read(tmp_path, text, "pyproject.toml")
    assert settings.lock == tmp_path / "memory.lock" and settings.checks[0].name == "net"


def test_the_nearest_file_is_found(tmp_path):
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    (tmp_path / "xconv.toml").write_text(CHECK)
    (tmp_path / "a" / "pyproject.toml").write_text('[project]\nname = "none of ours"\n')
    assert config.find(below) == tmp_path / "xconv.toml"


@pytest.mark.parametrize(
    ("given", "tolerance"),
    [("1%", Tolerance(share=0.01)), ("5MB", Tolerance(bytes=5_000_000)), (0, Tolerance()), ("0", Tolerance())],
)
def test_tolerances(given, tolerance):
    assert Tolerance.parse(given, "--tolerance") == tolerance


MISTAKES = [
    ("", ["lists nothing to check", "[check.NAME]"]),
    ("check = 3\n", ["lists nothing to check"]),
    ("[check.net\n", ["is no TOML"]),
    ('tolerence = "1%"\n' + CHECK, ["unknown key 'tolerence'", "did you mean 'tolerance'"]),
    ('tolerance = "-1%"\n' + CHECK, ["tolerance = '-1%' is no tolerance", "'5MB'"]),
    ("lock = 3\n" + CHECK, ["lock = 3 is no path"]),
    (CHECK + 'buget = "60%"\n', ["check.net has an unknown key 'buget'", "did you mean 'budget'"]),
    (CHECK + 'budget = "lots"\n', ["check.net: budget = 'lots'", "'8GB'"]),
    (CHECK + 'codecs = "exakt"\n', ["check.net: codecs = 'exakt'", "did you mean 'exact'"]),
    (CHECK + 'stats = "none.json"\n', ["check.net: stats = ", "none.json': cannot be read", "xconv calibrate"]),
    (CHECK + 'gpu = "h1000"\n', ["check.net: gpu = 'h1000'", "did you mean 'h100'"]),
    (CHECK + 'device = "cpu"\ngpu = "t4"\n', ["check.net: gpu = 't4'", "a GPU is not a CPU"]),
    (CHECK + "loss = 3\n", ["check.net: loss = 3", 'loss = "mean"']),
    (CHECK + "allocate = 1\n", ["check.net: allocate = 1", "allocate = true"]),
    ('[check.net]\ntarget = "net.py:build"\n', ["check.net has no inputs"]),
    ('[check.net]\ninputs = ["4x3"]\n', ["check.net has no target"]),
    ('[check.net]\ntarget = "n:b"\ninputs = [4]\n', ["inputs = [4] is no list of strings"]),
]


@pytest.mark.parametrize(("text", "told"), MISTAKES)
def test_mistakes_are_told_what_to_write(tmp_path, text, told):
    with pytest.raises(UsageError) as error:
        read(tmp_path, text)
    for part in told:
        assert part in f"{error.value} {error.value.hint}"


def test_checks_by_name(tmp_path):
    settings = read(tmp_path, CHECK + CHECK.replace("check.net", "check.other"))
    assert [check.name for check in settings.chosen([])] == ["net", "other"]
    assert [check.name for check in settings.chosen(["other"])] == ["other"]
    with pytest.raises(UsageError, match="no check 'ohter'") as error:
        settings.chosen(["ohter"])
    assert "did you mean 'other'" in error.value.hint
