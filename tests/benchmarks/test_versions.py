"""The study of torch's versions: what tests said is counted by folder, and the newest record of a folder counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
REPORT = """<testsuites><testsuite tests="5">
<testcase classname="tests.hooks.test_aot" name="one"/>
<testcase classname="tests.hooks.test_aot" name="two"><failure message="no"/></testcase>
<testcase classname="tests.ops.test_fold" name="three"><skipped/></testcase>
<testcase classname="tests.tools.check.test_lock" name="four"><error message="no"/></testcase>
<testcase classname="tests.test_layers" name="five"/>
</testsuite></testsuites>"""


def study(code: str, *arguments: object) -> str:
    """What a program prints that finds the study's modules."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT / "benchmarks", check=True, capture_output=True, text=True).stdout


def test_tests_are_counted_by_folder(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    code = "import json, sys, pathlib, versions; print(json.dumps(versions.counted(pathlib.Path(sys.argv[1]))))"
    folders, failures = json.loads(study(code, report))
    assert folders == {
        "hooks": {"passed": 1, "failed": 1, "skipped": 0},
        "ops": {"passed": 0, "failed": 0, "skipped": 1},
        "tools": {"passed": 0, "failed": 1, "skipped": 0},
        ".": {"passed": 1, "failed": 0, "skipped": 0},
    }
    assert failures == ["tests.hooks.test_aot.two", "tests.tools.check.test_lock.four"]


def test_the_newest_record_of_a_folder_counts(tmp_path):
    results = tmp_path / "versions.jsonl"
    code = "import sys, pathlib, versions_report as report; print(report.readme(pathlib.Path(sys.argv[1])))"
    assert study(code, results) == "None\n"
    made_by = {"commit": "abc", "options": {}, "python": "3.11.7"}
    counts = [{"passed": passed, "failed": failed, "skipped": 1} for passed, failed in ((5, 2), (7, 0), (1, 0))]
    peaks = {"net": "vgg", "peaks": {"inductor": 100_000_000, "torch": None, "xconv": 40_040_000}}
    lines = (
        {"torch": "2.15.0", **made_by, "folders": {"hooks": counts[0]}},
        {"torch": "2.9.1+cpu", **made_by, **peaks},
        {"torch": "2.15.0", **made_by, "folders": {"hooks": counts[1], "ops": counts[2]}},
    )
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert study(code, results).splitlines()[2:] == [
        "| 2.9.1+cpu | 3.11.7 | - | 0 | 0 | 0 | 100.0 | - | 40.0 |",
        "| 2.15.0 | 3.11.7 | hooks, ops | 8 | 0 | 2 | - | - | - |",
    ]


def test_the_script_reports_what_is_known(tmp_path):
    command = [sys.executable, "versions.py", "--report", "--results", str(tmp_path / "none.jsonl")]
    done = subprocess.run(command, cwd=ROOT / "benchmarks", check=True, capture_output=True, text=True)
    assert done.stdout == "nothing is known\n"
