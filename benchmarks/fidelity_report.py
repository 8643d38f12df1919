"""What the fidelity study found: its records, the verdict on each method, and the tables.

The columns, over the seeds of a method:

    score         on held-out data, mean ± standard deviation; higher is better
    difference    of the mean from that of exact training, in standard deviations of exact training over its seeds
    peak          measured physical peak of a step in MB, and as a share of exact training's
    step          processor time of a step over exact training's
    slices        in which the batch is run
    predicted     noise by the plan: variance relative to the energy of what is approximated, summed over residuals
    error         of a trained network's gradient: energy of the added noise relative to the exact gradient's
    of SGD noise  the same, over the variance of exact gradients from batch to batch
    verdict       whether the mean score is within two standard deviations of exact training; "hurts" when below

Methods in bfloat16 are compared with exact training in bfloat16. Where records of several commits are known, a method
is shown by those of the newest.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fidelity_tasks import STUDIES
from fidelity_training import METHODS, Run

WITHIN = 2.0
ABOUT_SCORES = "Mean scores and, in brackets, shares of exact training's peak; bold where an approximation hurts."
HEADINGS = (
    "method", "seeds", "score", "difference", "peak, MB", "share", "step", "slices", "predicted", "error",
    "of SGD noise", "verdict",
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    """A run from one seed, or the `problem` because of which there is none.

    Records that were made before `torch` and `options` were kept have none.
    """

    task: str
    method: str
    seed: int
    commit: str
    steps: int
    run: Run | None
    problem: str = ""
    torch: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def from_json(line: str) -> Record:
        """From its fields. Raises `ValueError` for anything else."""
        try:
            data: dict[str, Any] = json.loads(line)
            run = data.pop("run")
            return Record(**data, run=None if run is None else Run(**run))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a record of the fidelity study: {line[:80]!r} ({error})") from error


def read(path: Path) -> list[Record]:
    """The records of a file of JSON lines, in order; none if there is no such file."""
    return [Record.from_json(line) for line in path.read_text().splitlines()] if path.exists() else []


@dataclass(frozen=True)
class Row:
    """The records of one method on one task, of one commit."""

    method: str
    records: Sequence[Record]

    @property
    def runs(self) -> list[Run]:
        return [record.run for record in self.records if record.run is not None]

    @property
    def problem(self) -> str:
        """What the last attempt met, if it failed."""
        return self.records[-1].problem

    def mean(self, value: Callable[[Run], float | None]) -> float | None:
        """Over the runs; None if it is not known of each."""
        known = [found for found in map(value, self.runs) if found is not None]
        return statistics.mean(known) if known and len(known) == len(self.runs) else None

    @property
    def score(self) -> float:
        return statistics.mean(run.score for run in self.runs)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the score; None of a single run."""
        return statistics.stdev(run.score for run in self.runs) if len(self.runs) > 1 else None


def rows_of(records: Iterable[Record], task: str) -> dict[str, Row]:
    """By method, in the order of `METHODS`; a run that was repeated counts once, as it came out last."""
    mine = [record for record in records if record.task == task]
    rows = {}
    for method in METHODS:
        of_method = [record for record in mine if record.method == method]
        if not of_method:
            continue
        newest = of_method[-1]
        same = [r for r in of_method if (r.commit, r.steps) == (newest.commit, newest.steps)]
        by_seed = {record.seed: record for record in same}
        rows[method] = Row(method, sorted(by_seed.values(), key=lambda record: (record.run is None, record.seed)))
    return rows


def difference(row: Row, exact: Row | None) -> float | None:
    """Of the mean scores, in standard deviations of exact training; None where that has none, NaN after divergence."""
    if exact is None or not row.runs or not exact.runs or not exact.spread:
        return None
    return (row.score - exact.score) / exact.spread


def verdict(row: Row, exact: Row | None) -> str:
    if not row.runs:
        return row.problem
    failed = f"; then {row.problem}" if row.problem else ""
    if row.method == METHODS[row.method].reference:
        return f"the reference{failed}"
    off = difference(row, exact)
    if off is None:
        return f"no spread of exact training to compare with{failed}"
    if math.isnan(off):
        return f"**hurts**: diverged{failed}"
    if off < -WITHIN:
        return f"**hurts**{failed}"
    return ("within" if off <= WITHIN else "better") + failed


def markdown(records: Sequence[Record]) -> str:
    """What the columns mean, all scores in one table, and a heading and a table for each task."""
    parts = [
        (f"The columns{(__doc__ or '').partition('The columns')[2]}").strip().replace("\n\n    ", "\n\n```\n    ", 1)
    ]
    parts[0] = parts[0].replace("\n\nMethods in", "\n```\n\nMethods in", 1)
    tables = _tables(records)
    parts.append("\n\n".join(("### All tasks", ABOUT_SCORES, _summary(tables, METHODS))))
    parts += [_section(task, rows) for task, rows in tables.items()]
    return "\n\n".join(parts) + "\n"


def scores(records: Sequence[Record], methods: Iterable[str]) -> str:
    """The table of `ABOUT_SCORES` for these methods."""
    return _summary(_tables(records), methods)


def _tables(records: Sequence[Record]) -> dict[str, dict[str, Row]]:
    """The rows of each task that there are records of."""
    return {task: rows for task in STUDIES if (rows := rows_of(records, task))}


def _summary(tables: dict[str, dict[str, Row]], methods: Iterable[str]) -> str:
    known = [method for method in methods if any(method in rows for rows in tables.values())]
    heading = ("task, score", *known)
    lines = [f"| {' | '.join(cells)} |" for cells in (heading, ["---"] * len(heading))]
    for task, rows in tables.items():
        cells = [_brief(rows[method], rows) if method in rows else "" for method in known]
        lines.append(f"| {task}, {STUDIES[task].score} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _brief(row: Row, rows: dict[str, Row]) -> str:
    exact = rows.get(METHODS[row.method].reference)
    if not row.runs or exact is None or not exact.runs:
        return "refused" if row.problem else ""
    if row is exact:
        return f"{row.score:.4g}" + ("" if row.spread is None else f" ± {row.spread:.2g}")
    peak, reference = row.mean(lambda run: run.peak), exact.mean(lambda run: run.peak)
    text = f"{row.score:.4g}" + (f" ({peak / reference:.2f})" if peak and reference else "")
    return f"**{text}**" if "hurts" in verdict(row, exact) else text


def _section(task: str, rows: dict[str, Row]) -> str:
    commits = sorted({record.commit for row in rows.values() for record in row.records})
    steps = sorted({record.steps for row in rows.values() for record in row.records})
    baselines = {run.baseline for row in rows.values() for run in row.runs}
    about = [f"Score: {STUDIES[task].score}."]
    if baselines:
        about.append(f"Without learning: {max(baselines):.4g}.")
    about += [f"Steps: {', '.join(map(str, steps))}.", f"Sources of commit {', '.join(commits)}."]
    lines = [" | ".join(("", *cells, "")).strip() for cells in (HEADINGS, ["---"] * len(HEADINGS))]
    lines += [" | ".join(("", *_cells(row, rows), "")).strip() for row in rows.values()]
    return "\n".join((f"### {task}", "", " ".join(about), "", *lines))


def _cells(row: Row, rows: dict[str, Row]) -> tuple[str, ...]:
    exact = rows.get(METHODS[row.method].reference)
    if not row.runs:
        return (row.method, "0", *[""] * (len(HEADINGS) - 3), verdict(row, exact).replace("|", "/"))
    spread, off = row.spread, difference(row, exact)
    peak, step = row.mean(lambda run: run.peak), row.mean(lambda run: run.step)
    exact_peak = exact.mean(lambda run: run.peak) if exact else None
    exact_step = exact.mean(lambda run: run.step) if exact else None
    return (
        row.method,
        str(len(row.runs)),
        f"{row.score:.4g}" + ("" if spread is None else f" ± {spread:.2g}"),
        _show(off, "{:+.1f}"),
        _show(peak and peak / 1e6, "{:.1f}"),
        _show(peak and exact_peak and peak / exact_peak, "{:.2f}"),
        _show(step and exact_step and step / exact_step, "{:.2f}"),
        _show(row.mean(lambda run: run.slices), "{:.0f}"),
        _show(row.mean(lambda run: run.noise), "{:.2g}"),
        _show(row.mean(lambda run: run.error), "{:.1e}"),
        _show(row.mean(lambda run: run.of_sgd), "{:.1e}"),
        verdict(row, exact).replace("|", "/"),
    )


def _show(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
