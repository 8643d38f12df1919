"""The main job, as a table: four networks, each trained inside 80%, 65% and 55% of what plain Inductor takes.

For every network: Inductor's measured peak; for every budget the measured peak, the peak that the backend audited in
its own generated code, and the step time relative to Inductor's; and the lowest budget that lossless codecs alone can
meet, with the error of the gradients there. The reference of all gradient errors is plain autograd in float64.

A peak here is parameters, buffers, inputs and everything that the step allocates, gradients included; the class indices
that the loss compares with are not counted, because the backend cannot see them. Every network runs in a process of its
own. The exit status is 1 when a measured peak exceeds its budget or a budget turns out to be infeasible.

    python benchmarks/main_job.py --net vgg --net unet3d --json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from harness.console import wide
from harness.gradients import GradientError, gradient_error
from harness.lowest import at_lowest_budget
from harness.subject import Subject
from harness.worker import alone
from nets import NETS, Net
from rich.table import Table
from torch import Tensor

from xconv_fx.errors import BudgetInfeasibleError
from xconv_fx.measure import interleaved_times
from xconv_fx.plan import Plan
from xconv_fx.units import format_size

SHARES = (0.80, 0.65, 0.55)
MAIN_JOB = ("resnet", "vgg", "plain_unet2d", "unet3d")
# A lowest budget that the audit finds too low comes back higher; more than a few rounds would mean it never settles.
LOWEST_ROUNDS = 4


@dataclass(frozen=True)
class Row:
    """One network under one budget. Bytes; `slowdown` is step time over Inductor's, None where nothing was timed."""

    label: str
    budget: int
    measured: int | None = None
    audited: int | None = None
    slowdown: float | None = None
    codecs: dict[str, int] = dataclasses.field(default_factory=dict)
    slices: int = 1
    held_slices: int = 1
    noise: float = 0.0
    smallest: int | None = None

    @property
    def fits(self) -> bool:
        return self.measured is not None and self.measured <= self.budget

    @property
    def audit_ratio(self) -> float | None:
        return None if self.audited is None or not self.measured else self.audited / self.measured


@dataclass(frozen=True)
class Report:
    """All rows of one network, and the gradient errors by name of the run."""

    net: str
    inductor_peak: int
    inductor_seconds: float
    rows: tuple[Row, ...]
    errors: dict[str, GradientError]


def compiled(net: Net, options: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32) -> Subject:
    """The network by xconv with these options, or by plain Inductor, after a step."""
    subject = Subject(net, dtype)
    subject.compile(options)
    subject.step()
    return subject


def audited(plans: Sequence[Plan]) -> int | None:
    """What the backend says the peak is, over all compiled graphs; None when one of them was not audited."""
    peaks = [plan.audited_peak for plan in plans if plan.audited_peak is not None]
    return sum(peaks) if peaks and len(peaks) == len(plans) else None


def row_of(subject: Subject, label: str, budget: int) -> Row:
    plans = subject.plans
    codecs = Counter(choice.codec for plan in plans for choice in plan.choices)
    return Row(
        label, budget, subject.peak().bytes, audited(plans), codecs=dict(sorted(codecs.items())),
        slices=plans[0].slices, held_slices=plans[0].held_slices, noise=sum(plan.noise for plan in plans),
    )  # fmt: skip


def lowest_exact(net: Net, dtype: torch.dtype) -> tuple[int, Subject]:
    """The smallest budget that lossless codecs meet, and the network compiled under it.

    Raises `MethodError` when there is none.
    """

    def attempt(budget: int) -> Subject:
        return compiled(net, {"mem_budget": budget, "codecs": "exact"}, dtype)

    return at_lowest_budget(attempt, LOWEST_ROUNDS)


def run(name: str) -> Report:
    """Everything there is to know about one network. Meant for a process of its own."""
    # Past the limit Dynamo would run the rest uncompiled, and the table would be about something else.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    net = NETS[name]
    inductor = compiled(net)
    base = inductor.peak().bytes
    subjects: dict[str, Subject] = {}
    rows: dict[str, Row] = {}
    for share in SHARES:
        label, budget = f"{share:.0%}", int(share * base)
        try:
            subjects[label] = compiled(net, {"mem_budget": budget})
            rows[label] = row_of(subjects[label], label, budget)
        except BudgetInfeasibleError as error:
            rows[label] = Row(label, budget, smallest=error.smallest)
    budget, subjects["exact"] = lowest_exact(net, torch.float32)
    rows["exact"] = row_of(subjects["exact"], "exact", budget)

    steps: dict[str, Callable[[], object]] = {label: subject.step for label, subject in subjects.items()}
    seconds = interleaved_times({"inductor": inductor.step, **steps})
    timed = [
        dataclasses.replace(row, slowdown=seconds[label] / seconds["inductor"]) if label in seconds else row
        for label, row in rows.items()
    ]
    single = {"inductor float32": inductor.gradients(), "exact float32": subjects["exact"].gradients()}
    return Report(name, base, seconds["inductor"], tuple(timed), gradient_errors(net, single))


def gradient_errors(net: Net, single: dict[str, dict[str, Tensor]]) -> dict[str, GradientError]:
    """Errors of the float32 gradients given, of plain autograd's own, and of the exact plan in float64."""
    torch.compiler.reset()
    true = Subject(net, torch.float64).gradients()
    found = {**single, "autograd float32": Subject(net).gradients()}
    found["exact float64"] = lowest_exact(net, torch.float64)[1].gradients()
    return {label: gradient_error(grads, true) for label, grads in found.items()}


def table_of(report: Report) -> Table:
    peak, milliseconds = format_size(report.inductor_peak), report.inductor_seconds * 1e3
    table = Table(title=f"{report.net}: Inductor {peak}, {milliseconds:.0f} ms a step", title_justify="left")
    for heading in (
        "budget",
        "of Inductor",
        "measured",
        "fits",
        "audited",
        "audited / measured",
        "step time",
        "noise",
        "slices (held)",
        "codecs",
    ):
        table.add_column(heading, justify="left" if heading in ("fits", "codecs") else "right")
    for row in report.rows:
        name = "exact, lowest" if row.label == "exact" else ""
        table.add_row(
            f"{name} {format_size(row.budget)}".strip(),
            f"{row.budget / report.inductor_peak:.0%}",
            _or_dash(row.measured, format_size),
            "yes" if row.fits else f"NO, needs {format_size(row.smallest)}" if row.smallest else "NO",
            _or_dash(row.audited, format_size),
            _or_dash(row.audit_ratio, "{:.3f}".format),
            _or_dash(row.slowdown, "{:.2f}x".format),
            f"{row.noise:.1e}" if row.noise else "0",
            f"{row.slices} ({row.held_slices})" if row.slices > 1 else "1",
            ", ".join(f"{count} {codec}" for codec, count in row.codecs.items()),
        )
    return table


def _or_dash(value: Any, show: Callable[[Any], str]) -> str:
    return "-" if value is None else show(value)


def error_table(reports: list[Report]) -> Table:
    table = Table(title="Gradients against plain autograd in float64: relative error", title_justify="left")
    table.add_column("network")
    for heading in ("run", "all parameters", "worst tensor", "which"):
        table.add_column(heading, justify="right" if "tensor" in heading or "all" in heading else "left")
    for report in reports:
        for label, error in report.errors.items():
            table.add_row(report.net, label, f"{error.whole:.1e}", f"{error.worst:.1e}", error.worst_name)
    return table


def as_json(reports: list[Report]) -> str:
    nets = [
        {
            **dataclasses.asdict(report),
            "rows": [{**dataclasses.asdict(r), "fits": r.fits, "audit_ratio": r.audit_ratio} for r in report.rows],
        }
        for report in reports
    ]
    return json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "nets": nets}, indent=2)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--net", action="append", choices=sorted(NETS), help="may be given several times; default: four"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    chosen = parser.parse_args(arguments)
    console = wide()
    reports = []
    for name in chosen.net or MAIN_JOB:
        reports.append(alone(run, name))
        if not chosen.json:
            console.print(table_of(reports[-1]))
    if chosen.json:
        print(as_json(reports))
    else:
        console.print(error_table(reports))
    return 0 if all(row.fits for report in reports for row in report.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
