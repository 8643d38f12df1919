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
import multiprocessing
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from lowest import at_lowest_budget
from nets import NETS, Net
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from xconv_fx.errors import BudgetInfeasibleError
from xconv_fx.measure import interleaved_times, training_peak
from xconv_fx.plan import Plan
from xconv_fx.plan.report import read_json
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
class GradientError:
    """Distance from the float64 gradient: of all parameters as one vector, and of the worst parameter tensor."""

    whole: float
    worst: float
    worst_name: str


@dataclass(frozen=True)
class Report:
    """All rows of one network, and the gradient errors by name of the run."""

    net: str
    inductor_peak: int
    inductor_seconds: float
    rows: tuple[Row, ...]
    errors: dict[str, GradientError]


class Subject:
    """A freshly built network with its batch, compiled with `options` (None: plain Inductor), ready to be measured."""

    def __init__(
        self,
        net: Net,
        options: dict[str, Any] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        eager: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.net = net
        self.model: nn.Module = net.build().to(dtype)
        self.inputs, self.target = net.batch(dtype=dtype)
        self.run: Callable[..., Any] = self.model
        self.plans: tuple[Plan, ...] = ()
        if eager:
            return
        # Kept as long as the network: a recompilation writes its report again.
        self.reports = tempfile.TemporaryDirectory()
        if options is None:
            self.run = torch.compile(self.model)
            self.step()
            return
        report = str(Path(self.reports.name) / "plans.json")
        self.run = torch.compile(self.model, backend="xconv", options={**options, "report": report})
        self.step()
        self.plans = read_json(report)

    def loss(self, output: Tensor) -> Tensor:
        return self.net.loss(output, self.target)

    def step(self) -> None:
        """One forward and backward from empty gradients."""
        self.model.zero_grad(set_to_none=True)
        self.loss(self.run(self.inputs)).backward()

    def peak(self) -> int:
        """Measured bytes of the step's physical peak."""
        return training_peak(cast(nn.Module, self.run), self.inputs, self.loss).bytes

    def audited(self) -> int | None:
        """What the backend says the peak is, over all compiled graphs; None when one of them was not audited."""
        peaks = [plan.audited_peak for plan in self.plans if plan.audited_peak is not None]
        return sum(peaks) if peaks and len(peaks) == len(self.plans) else None

    def gradients(self) -> dict[str, Tensor]:
        """Gradients by parameter name, in float64."""
        self.step()
        grads = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        return {name: grad.double() for name, grad in grads.items() if grad is not None}

    def row(self, label: str, budget: int) -> Row:
        codecs = Counter(choice.codec for plan in self.plans for choice in plan.choices)
        first = self.plans[0]
        return Row(
            label, budget, self.peak(), self.audited(), codecs=dict(sorted(codecs.items())), slices=first.slices,
            held_slices=first.held_slices, noise=sum(plan.noise for plan in self.plans),
        )  # fmt: skip


def gradient_error(found: dict[str, Tensor], true: dict[str, Tensor]) -> GradientError:
    """Relative L2 distances. A tensor's own norm counts as at least a millionth of the whole gradient's.

    The floor is there because some true gradients are zero: a bias before a normalisation has no effect.
    """
    norm = torch.stack([grad.norm() for grad in true.values()]).norm()
    off = {name: (found[name] - grad).norm() for name, grad in true.items()}
    relative = {name: float(off[name] / torch.maximum(grad.norm(), 1e-6 * norm)) for name, grad in true.items()}
    worst = max(relative, key=relative.__getitem__)
    return GradientError(float(torch.stack(list(off.values())).norm() / norm), relative[worst], worst)


def lowest_exact(net: Net, dtype: torch.dtype) -> tuple[int, Subject]:
    """The smallest budget that lossless codecs meet, and the network compiled under it.

    Raises `RuntimeError` when there is none.
    """

    def attempt(budget: int) -> Subject:
        return Subject(net, {"mem_budget": budget, "codecs": "exact"}, dtype=dtype)

    return at_lowest_budget(attempt, LOWEST_ROUNDS)


def run(name: str) -> Report:
    """Everything there is to know about one network. Meant for a process of its own."""
    # Past the limit Dynamo would run the rest uncompiled, and the table would be about something else.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    net = NETS[name]
    inductor = Subject(net)
    base = inductor.peak()
    subjects: dict[str, Subject] = {}
    rows: dict[str, Row] = {}
    for share in SHARES:
        label, budget = f"{share:.0%}", int(share * base)
        try:
            subjects[label] = Subject(net, {"mem_budget": budget})
            rows[label] = subjects[label].row(label, budget)
        except BudgetInfeasibleError as error:
            rows[label] = Row(label, budget, smallest=error.smallest)
    budget, subjects["exact"] = lowest_exact(net, torch.float32)
    rows["exact"] = subjects["exact"].row("exact", budget)

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
    true = Subject(net, dtype=torch.float64, eager=True).gradients()
    found = {**single, "autograd float32": Subject(net, eager=True).gradients()}
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
    # A pipe has no width of its own; rich would squeeze the table into 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 170)
    reports = []
    for name in chosen.net or MAIN_JOB:
        # A process a network: no memory, compiled code or allocator state is carried from one to the next.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            reports.append(pool.submit(run, name).result())
        if not chosen.json:
            console.print(table_of(reports[-1]))
    if chosen.json:
        print(as_json(reports))
    else:
        console.print(error_table(reports))
    return 0 if all(row.fits for report in reports for row in report.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
