"""The table of `versions.py`: what is known of each version of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import records

HEADINGS = (
    "torch", "Python", "tests of", "passed", "failed", "skipped", "Inductor", "torch's memory budget, best",
    "xconv, exact, lowest",
)  # fmt: skip
TESTS = records.ROOT / "tests"


def readme(results: Path) -> str | None:
    """The table in Markdown; None where nothing is known."""
    found = records.read(results)
    if not found:
        return None
    versions = sorted({record["torch"] for record in found}, key=_order)
    rows = [_row(version, [record for record in found if record["torch"] == version]) for version in versions]
    lines = [f"| {' | '.join(cells)} |" for cells in (HEADINGS, *rows)]
    return "\n".join((lines[0], "|---" * len(HEADINGS) + "|", *lines[1:]))


def _order(version: str) -> tuple[list[int], str]:
    return [int(part) for part in version.split("+")[0].split(".") if part.isdecimal()], version


def _row(version: str, found: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    folders: dict[str, Mapping[str, int]] = {}
    peaks: Mapping[str, int | None] = {}
    for record in found:
        folders.update(record.get("folders", {}))
        peaks = record.get("peaks", peaks)
    counts = (sum(row[kind] for row in folders.values()) for kind in ("passed", "failed", "skipped"))
    pythons = dict.fromkeys(record["python"] for record in found)
    tested = ", ".join(sorted(folders)) if set(folders) < _folders() else "all"
    shown = (
        "-" if (peak := peaks.get(name)) is None else f"{peak / 1e6:.1f}" for name in ("inductor", "torch", "xconv")
    )
    return version, ", ".join(pythons), tested or "-", *map(str, counts), *shown


def _folders() -> set[str]:
    """The folders of `tests` that have tests, and `.` for those beside them."""
    return {
        path.parent.relative_to(TESTS).parts[0] if path.parent != TESTS else "." for path in TESTS.rglob("test_*.py")
    }
