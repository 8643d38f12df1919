"""Records of measurements: lines of JSON, each with the commit of the sources, the version of torch and the options.

Files of records can be concatenated. Where several records are about one thing, the last counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
# What every study depends on; other commits leave its records valid.
SHARED = (
    "xconv_fx", "passes", "cost_model", "requirements", "constraints.txt", "benchmarks/nets.py", "benchmarks/harness",
)  # fmt: skip


def beside(script: str) -> Path:
    """Where a script keeps its records if nothing else is said."""
    return Path(script).with_suffix(".jsonl")


def add_arguments(parse: argparse.ArgumentParser, script: str) -> None:
    """Of a script that keeps records: where they are, and whether they are only shown."""
    parse.add_argument("--results", type=Path, default=beside(script), help="JSON lines (default: beside the script)")
    parse.add_argument("--report", action="store_true", help="print what is known; measures nothing")


def source_commit(*sources: str) -> str:
    """The last commit of `SHARED` and these, "-dirty" if they were changed since; "unknown" outside of a clone."""
    paths = (*SHARED, *sources)
    try:
        commit = _git("log", "-1", "--format=%h", "--", *paths)
        return commit + ("-dirty" if _git("status", "--porcelain", "--", *paths) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    found = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def made_by(options: Mapping[str, Any], *sources: str) -> dict[str, Any]:
    """What every record says of itself besides what was measured: commit, torch and options."""
    return {"commit": source_commit(*sources), "torch": torch.__version__, "options": dict(options)}


def append(path: Path, record: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """In order; none if there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def latest(path: Path, *names: str) -> dict[Any, dict[str, Any]]:
    """The last record of each thing that these names tell apart, of those that have them; by one name its value, by
    several a tuple."""
    whole = [row for row in read(path) if row.keys() >= set(names)]
    return {row[names[0]] if len(names) == 1 else tuple(row[name] for name in names): row for row in whole}
