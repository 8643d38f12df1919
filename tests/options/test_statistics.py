"""Statistics of a model as a file, and as the option `stats`."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from torch import nn

from xconv_fx.errors import OptionError
from xconv_fx.options import Options
from xconv_fx.options.statistics import Fold, LayerStatistics, Layout, Spread, Statistics, parse

FOLDS = (Fold(2.0, 1.1, ((2, 1.2), (4, 1.3))), Fold(8.0, 0.9, ((2, 1.0), (4, 1.1))))
LAYOUT = Layout(((8, 1e-5), (2, 0.1)), FOLDS, FOLDS[:1])
CONV = LayerStatistics(
    (4, 3, 3, 3), 8, {"contiguous": LAYOUT, "channels_last": Layout(((2, 0.2),))}, 2.0, 1.5, 1.2, 0.3, 4.0,
    Spread(1.0, 0.2, 0.01), Spread(0.6, 0.1, 0.01), replays=(("1", ((2, 0.4), (4, 0.03))),),
    fixed=(("1", ((2, 0.2), (4, 0.01), (8, 1e-4))),),
)  # fmt: skip
NORM = LayerStatistics(
    (4,), 8, {"contiguous": LAYOUT}, 1.0, travel=0.1, reaches=(("0", 0.05),), squares=(("0", 0.01),),
    fixed=(("0", ((2, 0.1), (4, 0.002), (8, 1e-5))),),
)  # fmt: skip
STATS = Statistics({"0": CONV, "1": NORM}, 2)


def model(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))


def test_files(tmp_path):
    path = tmp_path / "stats.json"
    STATS.save(path)
    assert Statistics.from_json(path.read_text()) == STATS
    assert Statistics.from_json(path.read_text()).to_json() == path.read_text()
    assert parse(path) == parse(str(path)) == parse(STATS) == STATS and parse(None) is None
    assert STATS.sgd == 4.0


BROKEN = {
    "nothing": "",
    "a list": "[]",
    "a plan": '{"choices": []}',
    "another format": STATS.to_json().replace('"format": 2', '"format": 99'),
    "an earlier format": STATS.to_json().replace('"format": 2', '"format": 1'),
    "a field more": STATS.to_json().replace('"energy"', '"energies"'),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_statistics_is_refused(tmp_path, what):
    path = tmp_path / "stats.json"
    path.write_text(BROKEN[what])
    with pytest.raises(OptionError, match=r"xconv calibrate --output FILE") as caught:
        Options.parse({"stats": path})
    assert caught.value.option == "stats" and caught.value.value == str(path)


@pytest.mark.parametrize("value", [3, "", "missing.json"])
def test_options_that_name_no_file(value):
    with pytest.raises(OptionError, match="xconv calibrate"):
        Options.parse({"stats": value})


def test_another_models_statistics_are_refused():
    STATS.check(model())
    with pytest.raises(
        OptionError, match="'0': another model's: its weight is 5x3x3x3, and was 4x3x3x3 when measured;"
    ):
        STATS.check(model(5))
    with pytest.raises(OptionError, match=r"'1': another model's: the model has no such layer.*xconv calibrate"):
        STATS.check(nn.Sequential(nn.Conv2d(3, 4, 3)))


def test_caches_tell_statistics_apart():
    other = Statistics({"0": dataclasses.replace(CONV, energy=2.1), "1": NORM}, 2)
    prints = {Options.parse({"stats": stats}).fingerprint() for stats in (None, STATS, other)}
    assert len(prints) == 3
    assert Options.parse({"stats": STATS}).fingerprint() in prints
    hash(Options.parse({"stats": STATS}))


def test_what_reaches_other_layers_grows_with_products_of_errors():
    assert NORM.reached(0.0) == NORM.reaches == (("0", 0.05),) and CONV.reached(1.0) == ()
    assert NORM.reached(2.0) == (("0", pytest.approx(0.07)),)


def test_layouts_are_found_by_order():
    assert CONV.layout((0, 2, 3, 1)) is CONV.layouts["channels_last"]
    assert CONV.layout((0, 1, 2, 3)) is CONV.layout((0, 1, 2)) is LAYOUT
    assert NORM.layout((0, 2, 3, 1)) is LAYOUT, "the only one there is"


def test_what_the_package_exports_is_loaded_when_asked_for():
    code = (
        "import sys, xconv_fx\n"
        "assert 'torch' not in sys.modules and 'calibrate' in dir(xconv_fx)\n"
        "from xconv_fx import Statistics, calibrate, gradient_check\n"
        "assert callable(calibrate) and callable(gradient_check) and Statistics.__name__ == 'Statistics'\n"
        "try: xconv_fx.calibrat\n"
        "except AttributeError as error: assert 'calibrat' in str(error)\n"
        "else: raise AssertionError"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
