"""The package on several versions of torch: the suite, and peaks of one network, in an environment each.

    python benchmarks/versions.py --torch 2.12.1                    # builds .venv-2.12.1 with pip, runs all
    python benchmarks/versions.py --python .venv-2.12.1/bin/python  # in an environment that is there
    python benchmarks/versions.py --python PATH --suite "tests/hooks tests/ops" --skip peaks
    python benchmarks/versions.py --report                          # what is known

An environment has the test extra and the packages of requirements/nets.txt, and no other torch than it was made for.
The tests are counted by folder of `tests`: the newest record of a folder counts. Peaks are those that `peers.py`
measures of Inductor, of torch's `activation_memory_budget` at its best, and of xconv with exact codecs at the lowest
budget that it accepts. Records are of the sources' commit; what they say of another version is told by their own.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import records
from versions_report import readme

from xconv_fx.step.torch_version import TRIAL

NET = "vgg"
METHODS = ("inductor", "budget*", "xconv-exact")
SOURCES = ("benchmarks/versions.py", "tests")


def built(version: str, constraints: Path = records.ROOT / "constraints.txt") -> Path:
    """The interpreter of a new environment with this torch. Raises `CalledProcessError`."""
    home = records.ROOT / f".venv-{version}"
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    python = home / "bin" / "python"
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as others:
        others.write(
            "".join(f"{line}\n" for line in constraints.read_text().splitlines() if not line.startswith("torch=="))
        )
        others.flush()
        install = [str(python), "-m", "pip", "install", "-q", "-c", others.name]
        subprocess.run([*install, f"torch=={version}", "-e", ".[test,nets]"], check=True, cwd=records.ROOT)
        subprocess.run([*install, "--no-deps", "-r", "requirements/nets.txt"], check=True, cwd=records.ROOT)
    return python


def settings(python: Path, caches: str) -> dict[str, str]:
    """The environment's variables: its own programs first, caches of its own, one thread, and no trial before."""
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    own = {"PATH": path, "TORCHINDUCTOR_CACHE_DIR": caches, "OMP_NUM_THREADS": "1", TRIAL: "1"}
    return {**os.environ, **own}


def identity(python: Path) -> dict[str, str]:
    """The versions of torch and Python of an environment."""
    code = "import platform, torch; print(torch.__version__, platform.python_version())"
    found = subprocess.run([str(python), "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    torch, own = found.stdout.split()
    return {"torch": torch, "python": own}


def counted(report: Path) -> tuple[dict[str, dict[str, int]], list[str]]:
    """By folder of `tests`, how many passed, failed and were skipped; and the names of those that failed."""
    folders: dict[str, dict[str, int]] = defaultdict(lambda: {"passed": 0, "failed": 0, "skipped": 0})
    failures = []
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        result = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        parts = case.get("classname", "").split(".")
        folders[parts[1] if len(parts) > 2 else "."][result] += 1
        if result == "failed":
            failures.append(f"{case.get('classname')}.{case.get('name')}")
    return dict(folders), failures


def suite(python: Path, tests: Sequence[str]) -> dict[str, Any]:
    """What the tests say there. Raises `RuntimeError` if they cannot be run."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        report = Path(scratch) / "report.xml"
        command = [str(python), "-m", "pytest", "-q", f"--junitxml={report}", *tests]
        done = subprocess.run(command, cwd=records.ROOT, env=settings(python, scratch), check=False)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"{shlex.join(command)} ended with exit code {done.returncode}")
        folders, failures = counted(report)
    return {"folders": folders, "failures": failures}


def peaks(python: Path, net: str) -> dict[str, Any]:
    """Peaks in bytes of a network that `peers.py` knows. Raises `CalledProcessError`."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        results = Path(scratch) / "peers.jsonl"
        methods = [part for method in METHODS for part in ("--methods", method)]
        command = [str(python), "-W", "ignore", "benchmarks/peers.py", "--net", net, "--rounds", "1", "--draws", "1"]
        arguments = [*methods, "--results", str(results)]
        subprocess.run([*command, *arguments], cwd=records.ROOT, env=settings(python, scratch), check=True)
        (found,) = records.read(results)
    known = {name: row["peak"] for name, row in found["rows"].items() if row["peak"] is not None}
    torchs = [peak for name, peak in known.items() if name.startswith("budget")]
    rows = {"inductor": known.get("inductor"), "torch": min(torchs, default=None), "xconv": known.get("xconv-exact")}
    return {"net": net, "peaks": rows}


def arguments() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--torch", nargs="+", default=[], metavar="VERSION", help="build an environment for each")
    parse.add_argument("--python", nargs="+", default=[], type=Path, help="interpreters of environments that are there")
    parse.add_argument("--suite", default="tests", help="what pytest is given (default: tests)")
    parse.add_argument("--net", default=NET, help=f"the network whose peaks are measured (default: {NET})")
    parse.add_argument("--skip", action="append", choices=["suite", "peaks"], default=[])
    records.add_arguments(parse, __file__)
    return parse


def main() -> None:
    given = arguments().parse_args()
    interpreters = [] if given.report else [*map(built, given.torch), *(path.absolute() for path in given.python)]
    for python in interpreters:
        made_by = {**records.made_by({"suite": given.suite}, *SOURCES), **identity(python)}
        if "suite" not in given.skip:
            records.append(given.results, {**made_by, **suite(python, shlex.split(given.suite))})
        if "peaks" not in given.skip:
            records.append(given.results, {**made_by, **peaks(python, given.net)})
    print(readme(given.results) or "nothing is known")


if __name__ == "__main__":
    main()
