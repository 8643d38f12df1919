"""Does training under a memory budget learn what exact training learns? Six tasks on real data, by every method.

Tasks are in fidelity_tasks.py, methods in fidelity_training.py: exact training by Inductor from five seeds, and from
three of the same seeds xconv at 60% and 40% of Inductor's measured peak and at its lowest feasible budget, every
published preset at its own memory, and bfloat16. For one seed all methods start from the same parameters and take the
same number of steps through the same batches.

Each task and method trains in a process of its own, one at a time. A finished run is a line of JSON, and is not run
again while the commit is the same: the last one that touched the sources on which results depend. A method that is
refused or fails is a line that says why; `--retry` tries it again. Files of results can be concatenated.

    python benchmarks/fidelity.py                                           # all there is: hours on one core
    python benchmarks/fidelity.py --task generation --method 'xconv*' --seeds 1
    python benchmarks/fidelity.py --quick --results /tmp/quick.jsonl        # two steps each: does everything run?
    python benchmarks/fidelity.py --report fidelity.md --plot fidelity.png  # trains nothing: what is known so far

Needs the extra `nets` and requirements/nets.txt, and `plot` for the plot; what the columns mean is in
fidelity_report.py. Step times are processor time, of runs that did not take turns: peers.py measures them better.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import fidelity_report
import torch
from fidelity_report import Record
from fidelity_tasks import STUDIES
from fidelity_training import METHODS, Method, Run, Trainer
from harness.console import wide
from harness.records import append, beside, source_commit
from harness.worker import MethodError, Worker

from xconv_fx.plan.report import duration
from xconv_fx.units import format_size

QUICK_STEPS = 2
# Results depend on these besides what every study depends on; other commits leave them valid.
SOURCES = (
    "examples/_data.py", "examples/brain_unet3d.py", "examples/mnist_resnet.py", "benchmarks/fidelity_tasks.py",
    "benchmarks/fidelity_training.py",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """The seeds from which a method still has to train a task."""

    task: str
    method: Method
    seeds: tuple[int, ...]


class Study:
    """The runs of this commit: which are known, which are missing, and how to get them."""

    def __init__(self, results: Path, commit: str, *, quick: bool = False, threads: int = 1) -> None:
        self.results, self.commit, self.quick, self.threads = results, commit, quick, threads
        self.records = fidelity_report.read(results)

    def steps(self, task: str) -> int:
        return QUICK_STEPS if self.quick else STUDIES[task].steps

    def known(self, task: str, method: str) -> list[Record]:
        """Records of this commit and number of steps."""
        steps = self.steps(task)
        return [
            record
            for record in self.records
            if (record.task, record.method, record.commit, record.steps) == (task, method, self.commit, steps)
        ]

    def missing(self, tasks: Iterable[str], methods: Iterable[Method], seeds: int, retry: bool) -> Iterator[Job]:
        """What is not known yet, task by task, each method from at most so many seeds."""
        chosen = list(methods)
        for task in tasks:
            for method in chosen:
                known = self.known(task, method.name)
                if not retry and any(record.run is None for record in known):
                    continue
                done = {record.seed for record in known if record.run is not None}
                left = tuple(seed for seed in range(min(seeds, method.seeds)) if seed not in done)
                if left:
                    yield Job(task, method, left)

    def estimate(self, jobs: Iterable[Job]) -> float:
        """Seconds, from runs of the same task and method where there are any."""
        total = 0.0
        for job in jobs:
            taken = [r.run.seconds for r in self.known(job.task, job.method.name) if r.run is not None]
            each = sum(taken) / len(taken) if taken else STUDIES[job.task].seconds * job.method.slow
            total += len(job.seeds) * (min(each, STUDIES[job.task].seconds) if self.quick else each)
        return total

    def run(self, job: Job) -> Iterator[Record]:
        """Train, and note each run as it ends. The first seed that fails is the last of its method."""
        try:
            trainer = functools.partial(Trainer, job.task, job.method, self._reference_peak(job))
        except MethodError as error:
            yield self._note(job, job.seeds[0], None, f"{job.method.reference}: {error}")
            return
        with self._worker(trainer, job.method) as worker:
            for seed in job.seeds:
                try:
                    run = Run(**worker.ask("train", seed, self.steps(job.task)))
                except MethodError as error:
                    yield self._note(job, seed, None, str(error))
                    return
                yield self._note(job, seed, run)

    def _reference_peak(self, job: Job) -> int | None:
        """The peak of which the method's budget is a share; measured in a short run if no run of it is known."""
        if not job.method.share:
            return None
        for record in self.known(job.task, job.method.reference):
            if record.run is not None:
                return record.run.peak
        reference = METHODS[job.method.reference]
        with self._worker(functools.partial(Trainer, job.task, reference), reference) as worker:
            return Run(**worker.ask("train", 0, QUICK_STEPS)).peak

    @contextlib.contextmanager
    def _worker(self, trainer: Callable[[], Trainer], method: Method) -> Iterator[Worker]:
        worker = Worker(trainer, name=method.name, threads=self.threads)
        try:
            yield worker
        finally:
            worker.close()

    def _note(self, job: Job, seed: int, run: Run | None, problem: str = "") -> Record:
        options = {"threads": self.threads}
        record = Record(
            job.task, job.method.name, seed, self.commit, self.steps(job.task), run, problem, torch.__version__, options
        )
        self.records.append(record)
        append(self.results, asdict(record))
        return record


def described(record: Record) -> str:
    """A finished run in a line."""
    start = f"{record.task}, {record.method}, seed {record.seed}: "
    run = record.run
    if run is None:
        return start + record.problem
    scores = ", ".join(f"{name} {value:.4g}" for name, value in run.scores.items())
    figures = f"peak {format_size(run.peak)}, step {duration(run.step)}, gradient noise {run.error:.1e}"
    return f"{start}{scores}; {figures}; {run.seconds:.0f} s"


def chosen_methods(patterns: list[str] | None) -> list[Method]:
    """The methods whose names match, in the order of the table. Raises `ValueError` if a pattern matches none."""
    for pattern in patterns or []:
        if not fnmatch.filter(METHODS, pattern):
            raise ValueError(f"--method: {pattern!r} matches none of {', '.join(METHODS)}")
    return [m for name, m in METHODS.items() if any(fnmatch.fnmatch(name, pattern) for pattern in patterns or ["*"])]


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--task", action="append", choices=list(STUDIES), help="repeatable; default: all")
    parse.add_argument("--method", action="append", metavar="PATTERN", help="by name (repeatable; default: *)")
    parse.add_argument(
        "--seeds", type=int, default=5, help="at most so many of each method (default: as many as it has)"
    )
    parse.add_argument("--threads", type=int, default=1, help="of a run (default: 1)")
    parse.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps, one seed: does everything run?")
    parse.add_argument("--retry", action="store_true", help="try again what failed or was refused")
    parse.add_argument("--results", type=Path, default=beside(__file__), help="JSON lines (default: beside this)")
    parse.add_argument("--report", type=Path, metavar="MD", help="write the table of what is known; trains nothing")
    parse.add_argument("--plot", type=Path, metavar="PNG", help="draw score against peak; trains nothing")
    return parse


def main(arguments: list[str] | None = None) -> int:
    parse = parser()
    chosen = parse.parse_args(arguments)
    if min(chosen.seeds, chosen.threads) < 1:
        parse.error("--seeds and --threads must be at least 1")
    try:
        methods = chosen_methods(chosen.method)
    except ValueError as error:
        parse.error(str(error))
    if chosen.report or chosen.plot:
        return write_reports(chosen.results, chosen.report, chosen.plot)
    console = wide()
    study = Study(chosen.results, source_commit(*SOURCES), quick=chosen.quick, threads=chosen.threads)
    tasks = chosen.task or list(STUDIES)
    jobs = list(study.missing(tasks, methods, 1 if chosen.quick else chosen.seeds, chosen.retry))
    runs = sum(len(job.seeds) for job in jobs)
    console.print(f"Sources of commit {study.commit}: {runs} runs, about {study.estimate(jobs) / 60:.0f} minutes.")
    for job in jobs:
        for record in study.run(job):
            console.print(described(record), soft_wrap=True)
    return 0


def write_reports(results: Path, report: Path | None, plot: Path | None) -> int:
    """What the results say, as Markdown and as a picture; 1 if there are none."""
    records = fidelity_report.read(results)
    if not records:
        print(f"{results}: no results; run this without --report and --plot first", file=sys.stderr)
        return 1
    if report:
        report.write_text(fidelity_report.markdown(records))
    if plot:
        import fidelity_plot

        fidelity_plot.draw(records, plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
