"""What the check of the first step costs: `python benchmarks/first_step.py` prints a table and keeps its records.

Two copies of a network are compiled under the same budget, one with `verify="off"` and one with the default. Steps are
interleaved: one that is not checked, one whose memory is measured (as the first after compiling is), and the one after
it, which only counts calls. "measured" and "after" are medians of the ratios to the unchecked step of the same round.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from harness import records
from harness.console import wide
from harness.subject import Subject
from nets import MAIN_JOB
from rich.table import Table

from xconv_fx.runtime.first_step import StepCheck
from xconv_fx.step.front_door import _watch

SOURCES = ("benchmarks/first_step.py",)
NETS = ("resnet", "vgg")
ABOUT = (
    "`python benchmarks/first_step.py` measures what that costs: the time of a step that is measured, and of the one",
    'after it, over that of a step under `verify="off"`, in networks of `benchmarks/nets.py`:',
)


@dataclass(frozen=True)
class Record:
    """Seconds of an unchecked step, and ratios to it of measured steps and of those after them."""

    net: str
    seconds: float
    measured: tuple[float, ...]
    after: tuple[float, ...]
    commit: str
    torch: str
    options: dict[str, Any]


def check_of(subject: Subject) -> StepCheck:
    """The check of a compiled model, whose steps have run."""
    (session,) = _watch(subject.run).sessions.values()
    return session.verifier.check


def compiled(net: str, budget: str, verify: str) -> Subject:
    """The network after three steps under the budget."""
    subject = Subject(MAIN_JOB[net])
    subject.compile({"mem_budget": budget, "codecs": "exact", "verify": verify})
    for _ in range(3):
        subject.step()
    return subject


def measure(net: str, budget: str, rounds: int, made_by: dict[str, Any]) -> Record:
    off, on = (compiled(net, budget, verify) for verify in ("off", "replan"))
    check = check_of(on)
    unchecked, measured, after = [], [], []
    for _ in range(rounds):
        unchecked.append(off.step())
        check.again()
        measured.append(on.step() / unchecked[-1])
        after.append(on.step() / unchecked[-1])
    check.stop()
    return Record(net, statistics.median(unchecked), tuple(measured), tuple(after), **made_by)


def measurements(nets: Sequence[str], budget: str, rounds: int) -> Iterator[Record]:
    options = {"budget": budget, "rounds": rounds, "threads": torch.get_num_threads()}
    made_by = records.made_by(options, *SOURCES)
    for net in nets:
        yield measure(net, budget, rounds, made_by)


def newest(results: Path) -> list[Record]:
    """What is known of each network."""
    return [Record(**data) for data in records.latest(results, "net").values()]


def readme(results: Path) -> str | None:
    """README's table of medians, with what it says; None before all networks are known."""
    found = {record.net: record for record in newest(results)}
    if not all(net in found for net in NETS):
        return None
    lines = [*ABOUT, "", "| network | a measured step | the one after it |", "|---|---|---|"]
    for net in NETS:
        cells = (f"{statistics.median(ratios):.2f}" for ratios in (found[net].measured, found[net].after))
        lines.append(f"| {net} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(found: Sequence[Record]) -> Table:
    rows = Table("network", "budget", "threads", "step", "measured", "after")
    for record in found:
        spread = [f"{statistics.median(r):.3f} ({min(r):.2f} to {max(r):.2f})" for r in (record.measured, record.after)]
        options = (record.options["budget"], str(record.options["threads"]))
        rows.add_row(record.net, *options, f"{1e3 * record.seconds:.0f} ms", *spread)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", nargs="*", choices=list(MAIN_JOB), default=list(NETS))
    parser.add_argument("--budget", default="70%")
    parser.add_argument("--rounds", type=int, default=25)
    records.add_arguments(parser, __file__)
    given = parser.parse_args()
    found = newest(given.results) if given.report else list[Record]()
    for record in [] if given.report else measurements(given.net, given.budget, given.rounds):
        records.append(given.results, asdict(record))
        found.append(record)
    wide(100).print(table(found))


if __name__ == "__main__":
    main()
