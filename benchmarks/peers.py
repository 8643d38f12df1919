"""xconv next to what torch offers for training in less memory: peak, step time, gradients and compile time.

Six networks (`PEER_NETS` in nets.py), float32 on CPU, each trained by every method of peers_methods.py; what is
measured and how is in peers_subject.py. For xconv these are budgets of 90% to 20% of Inductor's measured peak, the
lowest budget that is feasible, the lowest with exact codecs alone, and, once the others are known, exactly the peak of
the exact peer that turned out lowest. A method that does not work, or a budget that no plan meets, is a row that says
why.

Every method trains in a process of its own, and at most one of them computes at a time. Step times come from rounds in
which each process of a group takes one step, Inductor always among them: `time` is the median over the rounds of a step
over Inductor's step of the same round, so a slow spell of the machine falls on both. `compile` is the first step less a
steady one, by the clock; `/ Inductor` compares the processor time of first steps, which a busy machine leaves alone.

The columns:

    peak          MB of physical peak, from the allocator's events; `added` is what is above parameters, buffers, inputs
    OS            the same peak as the operating system saw it: resident memory, with scratchpads and fragmentation
    time          of a step, relative to Inductor's
    error         of the gradient of a convolution's weight, relative L2, median over the convolutions
    bias          error of the mean of the draws over what unbiased noise alone would leave: 1, or sqrt(draws) if it is
                  all bias. Empty where there is no error but rounding

Last come the predictions: of peaks before anything was generated, by the audit, and of step times, for which
`xconv profile-machine --threads 1` should have been run on the machine.

A percentage below a budget that was refused is not tried again: its row repeats the smallest feasible budget. The
lowest budgets are found by asking for one byte, then for what the refusal named.

Each network is a line of JSON with all that was measured, the commit of the sources, the version of torch and the
options; files of results can be concatenated. The newest line of each network that has all methods at full size is what
`--report` and README's table show.

    python benchmarks/peers.py                                              # all there is: hours on one core
    python benchmarks/peers.py --report --plot benchmarks/peers.png         # trains nothing: what is known so far
    python benchmarks/peers.py --net vgg --methods 'budget*' --methods 'xconv*' --rounds 5
    python benchmarks/peers.py --tiny --net convnext --rounds 2 --draws 2 --results /tmp/tiny.jsonl  # does it all run?

The plot needs matplotlib, which the extra `plot` installs.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Iterator
from pathlib import Path

from harness import records
from harness.console import wide
from harness.worker import MethodError
from nets import PEER_NETS
from peers_comparison import Comparison, Settings
from peers_methods import AT_PEER, METHODS, Method
from peers_report import NetReport, newest, predictions_table, summarise, summary_table, table_of, within_budgets
from rich.console import Console

# Of a run, kept in its records.
OPTIONS = ("methods", "rounds", "draws", "alive", "threads", "tiny")
SOURCES = (
    "benchmarks/peers_methods.py", "benchmarks/peers_subject.py", "benchmarks/peers_comparison.py",
)  # fmt: skip


def chosen_methods(patterns: list[str] | None) -> tuple[Method, ...]:
    """The methods whose names match, in the order of the table. Raises `ValueError` if a pattern matches none."""
    everything = {**METHODS, AT_PEER.name: AT_PEER}
    for pattern in patterns or []:
        if not fnmatch.filter(everything, pattern):
            raise ValueError(f"--methods: {pattern!r} matches none of {', '.join(everything)}")
    wanted = [any(fnmatch.fnmatch(name, pattern) for pattern in patterns or ["*"]) for name in everything]
    return tuple(method for method, want in zip(everything.values(), wanted, strict=True) if want)


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--net", action="append", choices=list(PEER_NETS), help="a network (repeatable; default: all)")
    parse.add_argument("--methods", action="append", metavar="PATTERN", help="methods by name (repeatable; default: *)")
    parse.add_argument("--rounds", type=int, default=9, help="timed steps of each method (default: 9)")
    parse.add_argument("--draws", type=int, default=16, help="gradients of each method with noise (default: 16)")
    parse.add_argument("--alive", type=int, default=4, help="processes at a time besides Inductor's (default: 4)")
    parse.add_argument("--threads", type=int, default=1, help="of each process (default: 1)")
    parse.add_argument("--timeout", type=float, default=3600, help="seconds for one answer of a method (default: 3600)")
    parse.add_argument("--tiny", action="store_true", help="the smallest inputs: checks that everything runs")
    records.add_arguments(parse, __file__)
    parse.add_argument("--plot", type=Path, metavar="PNG", help="draw peak against time and against gradient error")
    return parse


def main(arguments: list[str] | None = None) -> int:
    parse = parser()
    chosen = parse.parse_args(arguments)
    try:
        methods = chosen_methods(chosen.methods)
    except ValueError as error:
        parse.error(str(error))
    if min(chosen.rounds, chosen.draws, chosen.alive, chosen.threads) < 1:
        parse.error("--rounds, --draws, --alive and --threads must be at least 1")
    console, reports = wide(), list[NetReport]()
    for report in newest(chosen.results) if chosen.report else measured(chosen, methods):
        console.print(table_of(report))
        reports.append(report)
    if not reports:
        print(f"{chosen.results}: no networks were measured", file=sys.stderr)
        return 1
    console.print(summary_table([summarise(report) for report in reports]))
    console.print(predictions_table(reports))
    console.print(f"{within_budgets(reports)}.", soft_wrap=True)
    if chosen.plot:
        from peers_plot import draw

        draw(reports, chosen.plot)
    return 0


def measured(chosen: argparse.Namespace, methods: tuple[Method, ...]) -> Iterator[NetReport]:
    """Compare on one network after the other, and keep each in the results."""
    aside = Console(stderr=True, log_path=False)
    settings = Settings(
        methods, chosen.rounds, chosen.draws, chosen.alive, chosen.threads, chosen.timeout, say=aside.log
    )
    options = {name: getattr(chosen, name) for name in OPTIONS}
    made_by = records.made_by(options, *SOURCES)
    for name in chosen.net or list(PEER_NETS):
        try:
            report = Comparison(name, settings, chosen.tiny).run()
        except MethodError as error:
            # Without the reference there is nothing to compare with; the other networks still can be.
            aside.log(f"{name}: {error}")
            continue
        records.append(chosen.results, {**made_by, **report.to_record()})
        yield report


if __name__ == "__main__":
    sys.exit(main())
