"""`xconv calibrate`: what it measures and writes, plans that read it, and what it refuses."""

from __future__ import annotations

import json

import pytest

from xconv_fx.cli import main
from xconv_fx.cli.arguments import FAILED, OK
from xconv_fx.options.statistics import Statistics

NET = """
import torch
from torch import nn

def build(width=8):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )

def batches(size=4):
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randn(size, 3, 16, 16, generator=generator), torch.randint(0, 2, (size,), generator=generator)

def wrong(): return [(torch.randn(4, 1, 16, 16), torch.zeros(4, dtype=torch.int64))]
def alone(): return torch.randn(2, 4, 3, 16, 16)
def number(): return 3
def inputs(): return torch.ones(4, 3, 16, 16)
def loss(output, label): return nn.functional.cross_entropy(output, label)
"""
DATA = ["--data", "net.py:batches", "--loss", "net.py:loss"]


@pytest.fixture(autouse=True)
def project(project_of):
    return project_of("net", NET)


def test_a_file_that_plans_read(project, capsys):
    assert main(["calibrate", "net.py:build", *DATA, "--batches", "2", "--output", "stats.json"]) == OK
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if line[1:2].isdigit()] == ["0", "1", "3", "7"]
    assert "measured on 2 batches; plans read it with --stats stats.json" in out and "random" not in out
    found = Statistics.from_json((project / "stats.json").read_text())
    assert found.batches == 2 and found.layers["0"].samples == 4

    plan = ["plan", "net.py:build", "--input", "4x3x16x16", "--budget", "70%", "--json", "-"]
    plan += ["--codecs", "quantize,bitmask", "--slices", "1"]
    assert main([*plan, "--stats", "stats.json"]) == OK
    (measured,) = json.loads(capsys.readouterr().out)
    assert measured["measured"] and measured["noise"] > 0 and measured["layers"]
    assert main(plan) == OK
    (prior,) = json.loads(capsys.readouterr().out)
    assert not prior["measured"] and [name for name, _ in prior["layers"]]

    plan[1] = "net.py:build(width=9)"
    assert main([*plan, "--stats", "stats.json"]) == FAILED
    assert "'0': another model's: its weight is 9x3x3x3, and was 8x3x3x3" in capsys.readouterr().err


def test_shapes_are_filled_with_random_numbers_and_told_so(capsys):
    arguments = ["net.py:build", "--input", "4x3x16x16", "--loss", "net.py:loss", "--label", "4:int64"]
    assert main(["calibrate", *arguments, "--batches", "1", "--output", "random.json"]) == OK
    assert "inputs were random numbers" in capsys.readouterr().out
    assert main(["calibrate", "net.py:build", "--input", "net.py:inputs", "--output", "-"]) == OK
    found = capsys.readouterr().out
    assert Statistics.from_json(found).batches == 2
    again = ["calibrate", "net.py:build", "--input", "net.py:inputs", "--output", "-", "--seed"]
    assert main([*again, "0"]) == OK and capsys.readouterr().out == found
    assert main([*again, "1"]) == OK and capsys.readouterr().out != found


MISTAKES = [
    (["--output", "s.json"], ["neither --data nor --input", "--data FILE.py:callable"]),
    ([*DATA, "--input", "4x3x16x16", "--output", "s.json"], ["both --data and --input"]),
    ([*DATA], ["--output", "xconv calibrate --help"]),
    ([*DATA, "--output", "s.json", "--batches", "none"], ["--batches 'none'", "--batches 2"]),
    ([*DATA, "--output", "s.json", "--seed", "-1"], ["--seed '-1'", "--seed 0"]),
    (
        [*DATA, "--output", "missing/s.json"],
        ["--output 'missing/s.json': there is no directory 'missing'", "--output stats.json"],
    ),
    (["--data", "net.py:batchs", "--output", "s.json"], ["no 'batchs'", "'batches'"]),
    (["--data", "net.py:wrong", *DATA[2:], "--output", "s.json"], ["Sequential failed on --data net.py:wrong"]),
    (["--data", "net.py:alone", *DATA[2:], "--output", "s.json"], ["batches: one is a tensor", "not a pair"]),
    (["--data", "net.py:number", "--output", "s.json"], ["net.py:number gives nothing to iterate over", "yield such"]),
]


@pytest.mark.parametrize(("arguments", "told"), MISTAKES, ids=lambda value: " ".join(value)[-40:])
def test_mistakes_are_told_what_to_type_next(capsys, arguments, told):
    assert main(["calibrate", "net.py:build", *arguments]) == FAILED
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ")
    for text in told:
        assert text in captured.err


def test_a_file_that_holds_no_statistics(project, capsys):
    (project / "stats.json").write_text("{}")
    assert main(["plan", "net.py:build", "--input", "4x3x16x16", "--stats", "stats.json"]) == FAILED
    assert "--stats 'stats.json'" in capsys.readouterr().err


def test_the_former_name_still_works(capsys):
    assert main(["calibrate-model", "net.py:build", "--output", "stats.json"]) == FAILED
    err = capsys.readouterr().err
    assert "xconv calibrate-model is now xconv calibrate" in err and "neither --data nor --input given" in err
