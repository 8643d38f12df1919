"""xconv next to what torch offers for training in less memory: peak, step time, gradients and compile time.

Six networks (`PEER_NETS` in nets.py), float32 on CPU, each trained by every method of methods.py, which also says what
is measured and how. For xconv these are budgets of 90% to 20% of Inductor's measured peak, the lowest budget that is
feasible, the lowest with exact codecs alone, and, once the others are known, exactly the peak of the exact peer that
turned out lowest. A method that does not work, or a budget that no plan meets, is a row that says why.

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

    python benchmarks/peers.py --json peers.json --plot peers.png            # all there is: hours on one core
    python benchmarks/peers.py --net vgg --methods 'budget*' --methods 'xconv*' --rounds 5
    python benchmarks/peers.py --tiny --net convnext --rounds 2 --draws 2    # does everything run?

The plot, for which the extra `plot` installs matplotlib, can also be drawn from the JSON later: see plots.py.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import functools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from methods import AT_PEER, METHODS, PEER_NETS, Method, Subject, tiny
from rich.console import Console
from tables import NetReport, Row, as_json, predictions_table, summarise, summary_table, table_of
from worker import MethodError, Worker

# A lowest budget that the audit finds too low comes back higher; more than a few rounds would mean it never settles.
LOWEST_ROUNDS = 6


@dataclass(frozen=True)
class Settings:
    methods: tuple[Method, ...]
    rounds: int
    draws: int
    alive: int
    threads: int
    timeout: float
    say: Callable[[str], None]


class Comparison:
    """Trains one network by all methods. Inductor's process lives throughout; the others come and go in groups."""

    def __init__(self, name: str, settings: Settings, small: bool) -> None:
        self.net = tiny(PEER_NETS[name]) if small else PEER_NETS[name]
        self.settings = settings
        self.report = NetReport(name, self.net.input_shape)
        self.rows = self.report.rows
        self.workers: dict[str, Worker] = {}
        self.first_steps: dict[str, tuple[float, float]] = {}
        self.refused: int | None = None

    def run(self) -> NetReport:
        with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
            stack.callback(self._close_all)
            self.reference = str(Path(directory) / "gradients.pt")
            self._save_reference()
            self._measure(METHODS["inductor"])
            if self.rows["inductor"].peak is None:
                return self.report
            others = [method for method in self.settings.methods if method not in (METHODS["inductor"], AT_PEER)]
            for at in range(0, len(others), self.settings.alive):
                self._group(others[at : at + self.settings.alive])
            self._at_peer()
            self._finish("inductor")
        return self.report

    def _save_reference(self) -> None:
        """Plain autograd's gradients in float64, which all others are compared with."""
        worker = self._worker(METHODS["eager"], double=True)
        try:
            worker.ask("save_gradients", self.reference)
        finally:
            worker.close()

    def _worker(self, method: Method, budget: int | None = None, double: bool = False) -> Worker:
        chosen = self.settings
        subject = functools.partial(Subject, self.net, method, budget, torch.float64 if double else torch.float32)
        return Worker(
            subject,
            name=method.name,
            threads=chosen.threads,
            timeout=chosen.timeout,
            compiled=method.compiled,
        )

    def _group(self, methods: Iterable[Method]) -> None:
        """Methods whose processes are alive together and take turns."""
        for method in methods:
            self._measure(method)
        self._take_turns()
        for name in [name for name in self.workers if name != "inductor"]:
            self._finish(name)

    def _measure(self, method: Method) -> None:
        """Start a method, and measure all that needs no turns: its peak and its gradients."""
        row = self.rows[method.name] = Row(method)
        self.settings.say(f"{self.report.net}: {method.name}")
        try:
            worker = self._start(row)
        except MethodError as error:
            row.note, row.smallest = str(error), error.smallest
            return
        self.workers[method.name] = worker
        with self._noting(method.name):
            row.peak, row.resident = worker.ask("peak")
            if method.family == "xconv":
                row.predictions = worker.ask("predictions")
            row.gradient = worker.ask("gradient_error", self.reference, self.settings.draws)

    def _start(self, row: Row) -> Worker:
        """A process that has compiled its network, under the row's budget or the lowest that it finds."""
        method = row.method
        if method.family != "xconv":
            return self._first_step(method, None)
        if method is AT_PEER or method.share is not None:
            row.budget = row.budget or self._share(method)
            if self.refused is not None and row.budget < self.refused:
                raise MethodError("not tried: a larger budget was refused", self.refused)
            try:
                return self._first_step(method, row.budget)
            except MethodError as error:
                self.refused = error.smallest or self.refused
                raise
        row.budget = 1
        for _ in range(LOWEST_ROUNDS):
            try:
                return self._first_step(method, row.budget)
            except MethodError as error:
                if error.smallest is None:
                    raise
                row.budget = error.smallest
        raise MethodError(f"the smallest feasible budget was infeasible {LOWEST_ROUNDS} times", row.budget)

    def _share(self, method: Method) -> int:
        """The budget of a method at a share of Inductor's peak, or at the best peer's peak."""
        base = self.rows[self.report.best_peer or "inductor"] if method is AT_PEER else self.rows["inductor"]
        assert base.peak is not None, "nothing is started before Inductor has been measured"
        return base.peak if method.share is None else base.peak * method.share // 100

    def _first_step(self, method: Method, budget: int | None) -> Worker:
        worker = self._worker(method, budget)
        try:
            self.first_steps[method.name] = worker.ask("first_step")
        except MethodError:
            worker.close()
            raise
        return worker

    def _take_turns(self) -> None:
        """One untimed step each, then rounds of one step each, every round led by another process."""
        names = list(self.workers)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(self.settings.rounds + 1):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                with self._noting(name):
                    seconds[name].append(self.workers[name].ask("step"))
        for name in names:
            if len(seconds[name]) == self.settings.rounds + 1:
                self._note_times(self.rows[name], seconds)

    def _note_times(self, row: Row, seconds: dict[str, list[float]]) -> None:
        own = seconds[row.method.name][1:]
        row.seconds = statistics.median(own)
        row.slowdown = _ratio(own, seconds["inductor"][1:])
        if row.method.compiled:
            clock, processor = self.first_steps[row.method.name]
            row.compile_seconds = max(0.0, clock - row.seconds)
            row.compile_ratio = processor / self.first_steps["inductor"][1]
        if row.method is AT_PEER and self.report.best_peer in seconds:
            row.peer_slowdown = _ratio(own, seconds[self.report.best_peer][1:])

    def _at_peer(self) -> None:
        """xconv with exactly the memory of the best exact peer, in turns with it."""
        peers = [row for row in self.rows.values() if row.method.exact and row.method.family != "xconv" and row.peak]
        best = min(peers, key=lambda row: (row.peak, row.slowdown or float("inf")))
        self.report.best_peer = best.method.name
        if not any(method is AT_PEER for method in self.settings.methods):
            return
        again = best.method.name
        if again not in self.workers:
            self.settings.say(f"{self.report.net}: {again} again")
            with self._noting(again):
                self.workers[again] = self._first_step(best.method, None)
        self._measure(AT_PEER)
        self._take_turns()
        for name in [name for name in self.workers if name != "inductor"]:
            self._finish(name)

    def _finish(self, name: str) -> None:
        """Ask for what spoils a process for timing, and end it."""
        row, worker = self.rows[name], self.workers[name]
        with self._noting(name):
            grown = worker.ask("resident_growth")
            row.os_peak = None if grown is None or row.resident is None else row.resident + grown
        self.workers.pop(name).close()

    @contextlib.contextmanager
    def _noting(self, name: str) -> Iterator[None]:
        """A method that fails halfway keeps the numbers that it has, and its row says what happened."""
        try:
            yield
        except MethodError as error:
            self.rows[name].note = self.rows[name].note or str(error)

    def _close_all(self) -> None:
        for worker in self.workers.values():
            worker.close()


def _ratio(mine: list[float], theirs: list[float]) -> float | None:
    """Median over the rounds; None if one of the two did not last."""
    return statistics.median(m / t for m, t in zip(mine, theirs, strict=True)) if len(mine) == len(theirs) else None


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
    parse.add_argument("--json", metavar="PATH", help="write everything measured, after each network")
    parse.add_argument("--plot", metavar="PATH", help="draw peak against time and against gradient error as PNG")
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
    console, aside = Console(width=None if sys.stdout.isatty() else 170), Console(stderr=True, log_path=False)
    settings = Settings(
        methods, chosen.rounds, chosen.draws, chosen.alive, chosen.threads, chosen.timeout, say=aside.log
    )
    reports: list[NetReport] = []
    for name in chosen.net or list(PEER_NETS):
        try:
            reports.append(Comparison(name, settings, chosen.tiny).run())
        except MethodError as error:
            # Without the reference there is nothing to compare with; the other networks still can be.
            aside.log(f"{name}: {error}")
            continue
        console.print(table_of(reports[-1]))
        if chosen.json:
            Path(chosen.json).write_text(as_json(reports, vars(chosen)))
    console.print(summary_table([summarise(report) for report in reports]))
    console.print(predictions_table(reports))
    if chosen.plot:
        from plots import draw

        draw(json.loads(as_json(reports, vars(chosen))), chosen.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
