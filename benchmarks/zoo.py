"""The lowest peaks of many networks that nobody tuned for: xconv with exact codecs beside torch's own ways.

The networks are those of zoo_nets.py, float32 on CPU. Every method trains each in a process of its own, one at a time:
Inductor, its partitioner's `activation_memory_budget` from 0.8 to 0, checkpoints around blocks in eager and under
Inductor, nested checkpoints in eager, and xconv at the lowest budget that it finds, by asking for one byte and then for
what the refusal names. Nothing is timed but first steps, which compile: the number in the table is all of a method's
first steps, xconv's refused ones included, beside Inductor's.

Peaks are the allocator's (peers_subject.py says how); gradients are compared with plain eager's of the same network in
the same process, by the relative L2 distance of all parameters' gradients together, and eager's with float64's.

What was measured is a line of JSON for each method on each network, kept as soon as it is known. A method on a network
is not measured again while the sources are those of its record.

    python benchmarks/zoo.py                                # what is missing, minutes a network
    python benchmarks/zoo.py --net rrdb --methods 'xconv*'
    python benchmarks/zoo.py --report                       # trains nothing: what is known so far
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import sys
import time
from dataclasses import asdict

from harness import records
from harness.console import wide
from harness.lowest import at_lowest_budget
from harness.worker import MethodError, Worker
from peers_methods import Method
from peers_report import mb, show
from rich.console import Console
from zoo_nets import ZOO, ZooNet
from zoo_report import Row, known, remarks, table_of
from zoo_subject import ALL_CODECS, ZOO_METHODS, Animal

SOURCES = tuple(
    f"benchmarks/{name}.py"
    for name in (
        "peers_methods", "peers_subject", "zoo_subject", "zoo_nets", "zoo_classifiers", "zoo_dense", "zoo_volumes",
    )
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--net", action="append", choices=list(ZOO), help="a network (repeatable; default: all)")
    parse.add_argument("--methods", action="append", metavar="PATTERN", help="methods by name (repeatable; default: *)")
    parse.add_argument("--all-codecs", action="store_true", help="xconv with all its codecs as well")
    parse.add_argument("--timeout", type=float, default=1200, help="seconds for one answer of a method (default: 1200)")
    records.add_arguments(parse, __file__)
    return parse


def chosen_methods(patterns: list[str] | None, all_codecs: bool) -> list[Method]:
    """The methods whose names match, in order."""
    offered = {**ZOO_METHODS, **({ALL_CODECS.name: ALL_CODECS} if all_codecs else {})}
    wanted = patterns or ["*"]
    return [m for name, m in offered.items() if any(fnmatch.fnmatch(name, pattern) for pattern in wanted)]


def measured(net: ZooNet, method: Method, timeout: float) -> Row:
    """All that is known of a method on a network; what goes wrong is noted."""
    row = Row(net.name, method.name)
    first_step = functools.partial(_first_step, row, net, method, timeout)
    try:
        worker = at_lowest_budget(first_step)[1] if method.family == "xconv" else first_step(None)
    except MethodError as error:
        row.note, row.smallest = str(error), error.smallest
        return row
    try:
        peak = worker.ask("peak")
        row.peak, row.resident = peak.bytes, peak.resident
        row.graphs = worker.ask("graphs") if method.family == "xconv" else []
        row.gradient = asdict(worker.ask("error"))
    except MethodError as error:
        row.note = str(error)
    finally:
        worker.close()
    return row


def _first_step(row: Row, net: ZooNet, method: Method, timeout: float, budget: int | None) -> Worker:
    """A process that has compiled the network, under a budget if there is one, in seconds that the row gets."""
    row.asked += [] if budget is None else [budget]
    subject = functools.partial(Animal, net, method, budget)
    worker = Worker(subject, name=method.name, timeout=timeout, compiled=method.compiled)
    try:
        worker.ask("parameter_bytes")
        start = time.perf_counter()
        try:
            worker.ask("step")
        finally:
            row.seconds.append(time.perf_counter() - start)
    except MethodError:
        worker.close()
        raise
    return worker


def measure(chosen: argparse.Namespace) -> None:
    """Train what was not trained on these sources yet, and keep a record of each method on each network."""
    say = Console(stderr=True, log_path=False).log
    made_by = records.made_by({"threads": 1}, *SOURCES)
    # What sources say that differ from their commit may have changed since.
    kept = not made_by["commit"].endswith("-dirty")
    for name in chosen.net or list(ZOO):
        for method in chosen_methods(chosen.methods, chosen.all_codecs):
            before = records.latest(chosen.results, "net", "method", "commit")
            if kept and (name, method.name, made_by["commit"]) in before:
                continue
            row = measured(ZOO[name], method, chosen.timeout)
            records.append(chosen.results, {**made_by, "shape": ZOO[name].input_shape, **asdict(row)})
            say(f"{name}, {method.name}: {show(row.peak, mb)} MB, {sum(row.seconds):.0f} s {row.note}")


def main(arguments: list[str] | None = None) -> int:
    parse = parser()
    chosen = parse.parse_args(arguments)
    if not chosen_methods(chosen.methods, chosen.all_codecs):
        parse.error("--methods: no method has such a name")
    if not chosen.report:
        measure(chosen)
    console, found = wide(), known(chosen.results)
    console.print(table_of(found))
    for remark in remarks(found):
        console.print(remark, soft_wrap=True)
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
