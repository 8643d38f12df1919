"""Writes README's tables: what stands between the markers of a table is what the records of its study say.

    python benchmarks/readme_tables.py            # write
    python benchmarks/readme_tables.py --check    # exit with 1 if README says anything else

A table is left as it is before there are records of all its rows.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import compile_times
import fidelity_report
import first_step
import peers_readme
import plan_times
import versions_report
from fidelity_training import METHODS

HERE = Path(__file__).parent
MARKED = re.compile(
    r"^(?P<indent> *)<!-- benchmarks/readme_tables\.py (?P<name>.+?) -->\n(?P<table>.*?)^ *<!-- end -->$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Source:
    """Where a table comes from: its records, and what makes it of them, None while some are missing."""

    records: str
    table: Callable[[Path], str | None]


def _scores(bf16: bool) -> Callable[[Path], str | None]:
    methods = [name for name, method in METHODS.items() if method.bf16 == bf16]

    def table(results: Path) -> str | None:
        records = fidelity_report.read(results)
        return fidelity_report.scores(records, methods) if records else None

    return table


TABLES = {
    "peers": Source("peers.jsonl", peers_readme.readme),
    "fidelity float32": Source("fidelity.jsonl", _scores(bf16=False)),
    "fidelity bfloat16": Source("fidelity.jsonl", _scores(bf16=True)),
    "compile_times": Source("compile_times.jsonl", compile_times.readme),
    "plan_times": Source("plan_times.jsonl", plan_times.readme),
    "first_step": Source("first_step.jsonl", first_step.readme),
    "versions": Source("versions.jsonl", versions_report.readme),
}


def rewritten(text: str, folder: Path) -> str:
    """The text with its tables as the records in the folder say. Raises `ValueError` unless each is marked once."""
    if sorted(found := [match["name"] for match in MARKED.finditer(text)]) != sorted(TABLES):
        raise ValueError(f"tables that are marked: {', '.join(found)}; tables that there are: {', '.join(TABLES)}")

    def write(match: re.Match[str]) -> str:
        source = TABLES[match["name"]]
        table = source.table(folder / source.records)
        if table is None:
            return match[0]
        first, *_, last = match[0].splitlines()
        return "\n".join((first, *(match["indent"] + line for line in table.splitlines()), last))

    return MARKED.sub(write, text)


def main() -> int:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--check", action="store_true", help="write nothing; exit with 1 if anything would be written")
    parse.add_argument("--readme", type=Path, default=HERE.parent / "README.md")
    parse.add_argument("--records", type=Path, default=HERE, help="their folder (default: that of this script)")
    given = parse.parse_args()
    before = given.readme.read_text()
    try:
        after = rewritten(before, given.records)
    except ValueError as error:
        parse.error(str(error))
    if not given.check:
        given.readme.write_text(after)
        return 0
    changes = difflib.unified_diff(before.splitlines(), after.splitlines(), "README", "records", lineterm="", n=0)
    print("\n".join(changes))
    return int(after != before)


if __name__ == "__main__":
    sys.exit(main())
