"""What compiling costs: `python benchmarks/compile_times.py` prints a table of CPU seconds, with ratios to Inductor's.

Every row is a process of its own that builds a network of `nets.py`, compiles it, and runs one training step: "cold"
with empty caches of Inductor and of ours, "warm" another one after that with the same. Seconds are CPU time of the
whole process and of the compilers that it starts, imports included, on one core. "lowest" asks for a budget of one byte
first, as people who do not know what fits do, and then compiles the budget that the refusal names.

Below stands where the seconds of the cold process went: Dynamo and running the step, AOTAutograd, what is ours
(analyses, plans, audits), Inductor's code generation, and the C++ compiler; and how often AOTAutograd traced. The
variants that a search compares are the batch at once, each number of slices, and another layout of volumes.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nets import PEER_NETS
from rich.console import Console
from rich.table import Table

BUDGETS = ("80%", "65%", "40%", "lowest")
PARTS = ("Dynamo, running", "AOTAutograd", "ours", "Inductor", "C++ compiler")


@dataclass(frozen=True)
class Cost:
    """CPU seconds of a process by part, and how often AOTAutograd traced; `refused` says why nothing was compiled."""

    parts: dict[str, float]
    traces: int
    refused: str = ""

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


class Clock:
    """Adds up the CPU time of functions by part, each without the functions that are called within it."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._inner: list[float] = [0.0]

    def watch(self, owner: Any, name: str, part: str) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def watched(*arguments: Any, **options: Any) -> Any:
            self.calls[name] += 1
            self._inner.append(0.0)
            start = time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                whole = time.process_time() - start
                self.spent[part] += whole - self._inner.pop()
                self._inner[-1] += whole

        setattr(owner, name, watched)


def one(net: str, budget: str) -> Cost:
    """What this process needs for one network under one budget ("inductor": plain `torch.compile`)."""
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
    torch.manual_seed(0)
    spec = PEER_NETS[net]
    model, (inputs, targets) = spec.build(), spec.batch()

    def step(**options: Any) -> None:
        torch._dynamo.reset()
        given = {"backend": "xconv", "options": options} if options else {}
        compiled = torch.compile(model, **given)
        spec.loss(compiled(inputs), targets).backward()

    refused = ""
    try:
        if budget == "inductor":
            step()
        elif budget != "lowest":
            step(mem_budget=budget)
        else:
            smallest = 1
            while not refused:
                try:
                    step(mem_budget=smallest)
                    break
                except BudgetInfeasibleError as error:
                    smallest = error.smallest
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


def rows(nets: list[str], budgets: list[str], repeats: int) -> Iterator[tuple[str, str, Cost, Cost]]:
    """Network, budget, and the costs of the cold and of the warm process: those of the median of `repeats`."""
    for net in nets:
        for budget in ("inductor", *budgets):
            pairs = []
            for _ in range(repeats):
                with tempfile.TemporaryDirectory() as folder:
                    pairs.append((measured(net, budget, Path(folder)), measured(net, budget, Path(folder))))
            cold, warm = (
                sorted(costs, key=lambda cost: cost.seconds)[repeats // 2] for costs in zip(*pairs, strict=True)
            )
            print(f"{net} {budget}: {cold.seconds:.1f} s cold, {warm.seconds:.1f} s warm", file=sys.stderr, flush=True)
            yield net, budget, cold, warm


def show(found: list[tuple[str, str, Cost, Cost]]) -> None:
    """Print the tables."""
    plain = {net: (cold, warm) for net, budget, cold, warm in found if budget == "inductor"}
    table = Table("network", "budget", "cold", "ratio", "warm", "ratio", "traces", *PARTS, "")
    for net, budget, cold, warm in found:
        parts = [f"{cold.parts[part]:.1f}" for part in PARTS]
        table.add_row(
            net, budget,
            f"{cold.seconds:.1f} s", f"{cold.seconds / plain[net][0].seconds:.2f}x",
            f"{warm.seconds:.1f} s", f"{warm.seconds / plain[net][1].seconds:.2f}x",
            str(cold.traces), *parts, cold.refused,
        )  # fmt: skip
    Console(width=180).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="*", default=list(PEER_NETS), choices=list(PEER_NETS))
    parser.add_argument("--budgets", nargs="*", default=list(BUDGETS))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--one", nargs=2, metavar=("NET", "BUDGET"), help="measure in this process, and print JSON")
    given = parser.parse_args()
    if given.one:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        cost = one(*given.one)
        print(json.dumps({"parts": cost.parts, "traces": cost.traces, "refused": cost.refused}))
        return
    show(list(rows(given.nets, given.budgets, given.repeats)))


if __name__ == "__main__":
    main()
