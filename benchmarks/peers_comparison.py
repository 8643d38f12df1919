"""How `peers.py` compares methods on one network: which processes are alive, and who takes a step when."""

from __future__ import annotations

import contextlib
import functools
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from harness.lowest import at_lowest_budget
from harness.worker import MethodError, Worker
from nets import PEER_NETS
from peers_methods import AT_PEER, METHODS, Method
from peers_report import NetReport, Row
from peers_subject import Peer


@dataclass(frozen=True)
class Settings:
    """Of a comparison: `alive` processes at a time besides Inductor's, and seconds until an answer is given up."""

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
        self.net = PEER_NETS[name].tiny() if small else PEER_NETS[name]
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
        subject = functools.partial(Peer, self.net, method, budget, torch.float64 if double else torch.float32)
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
            peak = worker.ask("peak")
            row.peak, row.resident = peak.bytes, peak.resident
            if method.family == "xconv":
                row.predictions = worker.ask("predictions")
            row.gradient = worker.ask("gradient_noise", self.reference, self.settings.draws)

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
        return at_lowest_budget(functools.partial(self._under, row))[1]

    def _under(self, row: Row, budget: int) -> Worker:
        row.budget = budget
        return self._first_step(row.method, budget)

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
