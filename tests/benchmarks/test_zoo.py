"""The zoo's networks are what they say they are, and its report says what its records say; processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MADE_BY = {"commit": "abc", "torch": "2", "options": {"threads": 1}}
PLAN = {"foreseen": 1.01, "audited_peak": 40_000_000}


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def row(method: str, peak: int | None, **known: Any) -> str:
    """A record of a method on RRDB, of which 10 MB are parameters and the like."""
    empty = {"asked": [], "seconds": [1.5], "gradient": None, "graphs": [], "smallest": None, "note": ""}
    record = {"net": "rrdb", "method": method, "peak": peak, "resident": 10_000_000, **empty, **known}
    return json.dumps({**MADE_BY, **record}) + "\n"


def test_every_network_builds_and_has_its_blocks():
    done = script("zoo_nets.py")
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert len(names) == len(set(names)) == 23 and {"rrdb", "wave_unet", "conv_lstm", "convnext"} <= set(names)


def test_the_best_peer_and_what_went_wrong_are_reported(tmp_path):
    records = tmp_path / "zoo.jsonl"
    off = {"whole": 0.5, "worst": 0.9, "worst_name": "first.weight"}
    lines = (
        row("inductor", 90_000_000, gradient=off),
        row("checkpoint", 70_000_000),
        row("checkpoint", 50_000_000),
        row("budget0.0", None, note="MethodError: no such thing"),
        row(
            "xconv-exact",
            41_000_000,
            asked=[1, 40_000_000],
            seconds=[3.0, 4.0],
            graphs=[PLAN, {**PLAN, "foreseen": 0.9}],
        ),
    )
    records.write_text("".join(lines))
    done = script("zoo.py", "--report", "--results", records)
    assert done.returncode == 0, done.stderr
    for text in ("50.0 (40.0)", "0.820", "0.775", "0.900", "0.976", "7 / 2 s"):
        assert text in done.stdout
    assert "rrdb, xconv-exact: 1,000,000 bytes over its budget" in done.stdout
    assert "rrdb, inductor: gradient off by 5.0e-01, worst first.weight" in done.stdout
    assert "rrdb, budget0.0: MethodError: no such thing" in done.stdout


def test_without_records_there_is_nothing_to_report(tmp_path):
    assert script("zoo.py", "--report", "--results", tmp_path / "none.jsonl").returncode == 1


def test_a_pattern_that_names_no_method_is_refused():
    done = script("zoo.py", "--methods", "xconv-cheapest")
    assert done.returncode == 2 and "no method has such a name" in done.stderr
