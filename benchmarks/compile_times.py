"""What compiling costs: `python benchmarks/compile_times.py` prints a table of CPU seconds, with ratios to Inductor's.

Every row is a process of its own that builds a network of `nets.py`, compiles it, and runs one training step: "cold"
with empty caches of Inductor and of ours, "warm" another one after that with the same. Seconds are CPU time of the
whole process and of the compilers that it starts, imports included, on one core. "lowest" asks for a budget of one byte
first, as people who do not know what fits do, and then compiles the budget that the refusal names.

Further columns are where the seconds of the cold process went: Dynamo and running the step, AOTAutograd, what is ours
(analyses, plans, audits), Inductor's code generation, and the C++ compiler; and how often AOTAutograd traced. The
variants that a search compares are the batch at once, each number of slices, and another layout of volumes.

Each network and budget is a line of JSON in the results, of which `--report` and README show the newest:

    python benchmarks/compile_times.py                       # all there is: an hour on one core
    python benchmarks/compile_times.py --report              # measures nothing: what is known so far
    python benchmarks/compile_times.py --nets vgg --budgets 65% --results /tmp/compile.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness import records
from harness.clock import Clock
from harness.console import wide
from harness.lowest import at_lowest_budget
from harness.subject import Subject
from nets import PEER_NETS
from rich.table import Table

BUDGETS = ("80%", "65%", "40%", "lowest")
PARTS = ("Dynamo, running", "AOTAutograd", "ours", "Inductor", "C++ compiler")
PLAIN = "inductor"
SOURCES = ("benchmarks/compile_times.py",)
# README's rows.
SHOWN = {"65%": "65%", "lowest": "lowest, with the refusal that names it"}


@dataclass(frozen=True)
class Cost:
    """CPU seconds of a process by part, and how often AOTAutograd traced; `refused` says why nothing was compiled."""

    parts: dict[str, float]
    traces: int
    refused: str = ""

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Record:
    """The costs of cold processes and of the warm ones after them, one network under one budget."""

    net: str
    budget: str
    cold: tuple[Cost, ...]
    warm: tuple[Cost, ...]
    commit: str
    torch: str
    options: dict[str, Any]

    @staticmethod
    def from_json(data: dict[str, Any]) -> Record:
        costs = {when: tuple(Cost(**cost) for cost in data[when]) for when in ("cold", "warm")}
        return Record(**{**data, **costs})


def one(net: str, budget: str) -> Cost:
    """What this process needs for one network under one budget (`PLAIN`: plain `torch.compile`)."""
    import torch
    import torch._functorch.aot_autograd as aot
    from torch._inductor import compile_fx

    from xconv_fx.errors import BudgetInfeasibleError
    from xconv_fx.step import backend

    clock = Clock()
    clock.watch(aot, "create_aot_state", "AOTAutograd")
    clock.watch(aot, "aot_stage1_graph_capture", "AOTAutograd")
    clock.watch(aot, "aot_stage2_compile", "AOTAutograd")
    clock.watch(compile_fx, "_compile_fx_inner", "Inductor")
    clock.watch(backend, "_compile", "ours")
    subject = Subject(PEER_NETS[net])

    def step(budget: int | str) -> None:
        torch._dynamo.reset()
        subject.compile(None if budget == PLAIN else {"mem_budget": budget})
        subject.step()

    refused = ""
    try:
        if budget == "lowest":
            at_lowest_budget(step)
        else:
            step(budget)
    except BudgetInfeasibleError as error:
        refused = str(error).partition("\n")[0]
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    parts = {part: clock.spent[part] for part in PARTS[1:4]}
    parts["C++ compiler"] = children.ru_utime + children.ru_stime
    parts[PARTS[0]] = own.ru_utime + own.ru_stime - sum(clock.spent.values())
    return Cost(parts, clock.calls["aot_stage1_graph_capture"], refused)


def measured(net: str, budget: str, caches: Path) -> Cost:
    """The cost of a process of its own, with caches in this folder."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "XCONV_FX_CACHE": str(caches / "xconv"),
    }
    command = [sys.executable, "-W", "ignore", __file__, "--one", net, budget]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def middle(costs: Iterable[Cost]) -> Cost:
    """The one of the median of seconds."""
    ordered = sorted(costs, key=lambda cost: cost.seconds)
    return ordered[len(ordered) // 2]


def measurements(nets: list[str], budgets: list[str], repeats: int) -> Iterator[Record]:
    """Of each network by Inductor and under each budget."""
    made_by = records.made_by({"repeats": repeats}, *SOURCES)
    for net in nets:
        for budget in (PLAIN, *budgets):
            cold, warm = [], []
            for _ in range(repeats):
                with tempfile.TemporaryDirectory() as folder:
                    cold.append(measured(net, budget, Path(folder)))
                    warm.append(measured(net, budget, Path(folder)))
            taken = f"{middle(cold).seconds:.1f} s cold, {middle(warm).seconds:.1f} s warm"
            print(f"{net} {budget}: {taken}", file=sys.stderr, flush=True)
            yield Record(net, budget, tuple(cold), tuple(warm), **made_by)


def newest(results: Path) -> list[Record]:
    """What is known of each network and budget, in the order of networks."""
    found = map(Record.from_json, records.latest(results, "net", "budget").values())
    return sorted(found, key=lambda record: list(PEER_NETS).index(record.net))


@dataclass(frozen=True)
class Ratios:
    """CPU time over Inductor's, of the cold and of the warm process: medians."""

    cold: float
    warm: float


def ratios(found: Sequence[Record]) -> dict[tuple[str, str], Ratios]:
    """By network and budget."""
    plain = {record.net: record for record in found if record.budget == PLAIN}
    return {
        (record.net, record.budget): Ratios(
            middle(record.cold).seconds / middle(plain[record.net].cold).seconds,
            middle(record.warm).seconds / middle(plain[record.net].warm).seconds,
        )
        for record in found
        if record.net in plain
    }


def table(found: Sequence[Record]) -> Table:
    """All that is known."""
    rows = Table("network", "budget", "cold", "ratio", "warm", "ratio", "traces", *PARTS, "")
    over = ratios(found)
    for record in found:
        cold, warm, ratio = middle(record.cold), middle(record.warm), over[record.net, record.budget]
        rows.add_row(
            record.net, record.budget,
            f"{cold.seconds:.1f} s", f"{ratio.cold:.2f}x", f"{warm.seconds:.1f} s", f"{ratio.warm:.2f}x",
            str(cold.traces), *(f"{cold.parts[part]:.1f}" for part in PARTS), cold.refused,
        )  # fmt: skip
    return rows


def readme(results: Path) -> str | None:
    """README's table: smallest and largest ratios over all networks; None before all are known."""
    over = ratios(newest(results))
    if not all((net, budget) in over for net in PEER_NETS for budget in SHOWN):
        return None
    lines = ["| budget | first process | second process |", "|---|---|---|"]
    for budget, name in SHOWN.items():
        of_nets = [over[net, budget] for net in PEER_NETS]
        lines.append(f"| {name} | {_range([r.cold for r in of_nets])} | {_range([r.warm for r in of_nets])} |")
    return "\n".join(lines)


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.1f} to {max(values):.1f}"


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--nets", nargs="*", default=list(PEER_NETS), choices=list(PEER_NETS))
    parse.add_argument("--budgets", nargs="*", default=list(BUDGETS))
    parse.add_argument("--repeats", type=int, default=1)
    records.add_arguments(parse, __file__)
    parse.add_argument("--one", nargs=2, metavar=("NET", "BUDGET"), help="measure in this process, and print JSON")
    return parse


def main() -> None:
    given = parser().parse_args()
    if given.one:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        print(json.dumps(asdict(one(*given.one))))
        return
    found = newest(given.results) if given.report else list[Record]()
    for record in [] if given.report else measurements(given.nets, given.budgets, given.repeats):
        records.append(given.results, asdict(record))
        found.append(record)
    wide(180).print(table(found))


if __name__ == "__main__":
    main()
