"""`xconv bench`: what was predicted beside what a training step takes on this machine."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from xconv_fx.errors import UsageError
from xconv_fx.units import format_size

from .arguments import FAILED, INFEASIBLE, OK, add_json, add_model, add_planner, options, workload, write
from .status import status

if TYPE_CHECKING:
    from xconv_fx.tools.bench import Bench

EXAMPLES = f"""\
exit codes: {OK} the measured peak is within the budget, {INFEASIBLE} it is not, or no plan is, {FAILED} usage error

examples:
  xconv bench net.py:build --input 8x3x96x96 --budget 60%
  xconv bench net.py:build --input 8x3x96x96 --budget 300MB --codecs exact --steps 20
"""


def add(commands: Any) -> argparse.ArgumentParser:
    bench: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="train some steps here, and compare with what was predicted",
        description="Train some steps on this machine within a budget and by Inductor alone, in turn: peaks as "
        "predicted, as audited in the generated code and as measured, and the times of a step.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(bench)
    add_planner(bench)
    add = bench.add_argument
    add("--device", metavar="NAME", help="cpu or cuda (default: cpu)")
    add("--steps", metavar="N", default="5", help="steps to time of each (default: %(default)s)")
    add_json(bench, "the numbers")
    return bench


def run(arguments: argparse.Namespace) -> int:
    steps, chosen = _steps(arguments.steps), options(arguments)
    if "mem_budget" not in chosen:
        raise UsageError("no --budget", "--budget 60%, or a size such as 8GB")
    import torch

    if chosen.get("device") == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: there is none here", "xconv plan --device cuda, which needs none")
    from xconv_fx.tools.bench import bench

    with status("building the model"):
        found = replace(workload(arguments), allocate=True).ask(bench, steps=steps, **chosen)
    if arguments.json is not None:
        write(json.dumps(asdict(found), indent=2, sort_keys=True) + "\n", arguments.json)
    if arguments.json != "-":
        _show(found)
    return OK if found.xconv.measured <= found.budget else INFEASIBLE


def _steps(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise UsageError(f"--steps {text!r} is not a number from 1", "--steps 5")
    return int(text)


def _show(found: Bench) -> None:
    from xconv_fx.plan.report import duration, report_table
    from xconv_fx.tools.sweep.table import noise_text, percent

    table = report_table()
    table.add_column("", no_wrap=True)
    for column in ("predicted", "audited", "measured", "step"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in (found.inductor, found.xconv):
        audited = "" if row.audited is None else format_size(row.audited)
        cells = [format_size(row.predicted), audited, format_size(row.measured), duration(row.seconds)]
        table.add_row(row.method, *cells)
    spare = found.budget - found.xconv.measured
    verdict = f"{format_size(spare)} to spare" if spare >= 0 else f"missed by {format_size(-spare)}"
    measured = found.xconv.seconds - found.inductor.seconds
    extra = f"{duration(found.xconv.extra)} more a step predicted, {'-' if measured < 0 else ''}"
    console = Console()
    console.print(table)
    console.print(Text(f" budget   {format_size(found.budget)}: measured with {verdict}"))
    console.print(Text(f" time     {extra}{duration(abs(measured))} measured ({percent(found.slowdown)})"))
    console.print(Text(f" noise    {noise_text(found.xconv.noise)}, predicted"))
