"""`xconv fit`: the largest batch, or spatial size, that trains in a budget."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from xconv_fx.errors import UsageError
from xconv_fx.options.budget import Budget
from xconv_fx.units import format_size

from .arguments import FAILED, INFEASIBLE, OK, add_json, add_model, add_options, options, workload, write
from .status import status

if TYPE_CHECKING:
    from xconv_fx.tools.fit import Fit, Trial

MULTIPLES = {"batch": 1, "spatial": 16}
EXAMPLES = f"""\
exit codes: {OK} some size fits, {INFEASIBLE} none does, {FAILED} usage error or the model failed

examples:
  xconv fit net.py:build --input 8x3x224x224 --budget 8GB
  xconv fit net.py:build --input 8x3x224x224 --label 8:int64 --loss loss.py:entropy --gpu t4 --budget 14GB
  xconv fit unet3d.py:build --input 1x1x64x64x64 --budget 8GB --along spatial --multiple 16
"""


def add(commands: Any) -> argparse.ArgumentParser:
    fit: argparse.ArgumentParser = commands.add_parser(
        "fit",
        help="find the largest batch or spatial size that trains in a budget",
        description="Find the largest batch, or spatial size, that trains in a budget: with plain Inductor, with exact "
        "codecs and with all, or with those that --codecs names.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(fit)
    add_options(fit)
    add = fit.add_argument
    add("--along", choices=tuple(MULTIPLES), default="batch", help="what grows (default: %(default)s)")
    add("--multiple", metavar="N", help="sizes are multiples of this (default: 1 sample, 16 pixels)")
    add_json(fit, "what was found")
    return fit


def run(arguments: argparse.Namespace) -> int:
    multiple, chosen = _multiple(arguments), options(arguments)
    budget = Budget.parse(chosen.pop("mem_budget")).bytes if "mem_budget" in chosen else None
    if budget is None:
        wrong = "no --budget" if arguments.budget is None else f"--budget {arguments.budget}: of a peak that varies"
        raise UsageError(wrong, "--budget 8GB: what the largest size has to fit into")
    from xconv_fx.tools.fit import fit

    with status("tracing the model"):
        found = fit(workload(arguments), budget, arguments.along, multiple, **chosen)
    if arguments.json is not None:
        data = {"budget": budget, "along": arguments.along, "multiple": multiple, "methods": list(map(asdict, found))}
        write(json.dumps(data, indent=2, sort_keys=True) + "\n", arguments.json)
    if arguments.json != "-":
        Console().print(_table(found, arguments.along))
    return OK if any(row.largest for row in found) else INFEASIBLE


def _multiple(arguments: argparse.Namespace) -> int:
    if arguments.multiple is None:
        return MULTIPLES[arguments.along]
    if not re.fullmatch(r"[1-9]\d{0,5}", arguments.multiple):
        raise UsageError(f"--multiple {arguments.multiple!r} is not a number from 1", "--multiple 16")
    return int(arguments.multiple)


def _table(found: Sequence[Fit], along: str) -> Table:
    from xconv_fx.plan.report import duration, report_table
    from xconv_fx.tools.sweep.table import noise_text

    table = report_table()
    table.add_column("method", no_wrap=True)
    for column in (
        f"largest {'batch' if along == 'batch' else 'size'}",
        "needs",
        "time",
        "noise",
        "slices",
        "next needs",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    plain = found[0].largest
    for row in found:
        beyond = "" if row.beyond is None else f"{row.beyond.size}: {_needs(row.beyond)}"
        best = row.largest
        if best is None:
            table.add_row(row.method, "none", "", "", "", "", beyond)
            continue
        more = f" ({best.size / plain.size:.3g}x)" if plain and best.size > plain.size else ""
        time = f"+{duration(best.time)}" if best.time > 0 else "0"
        cells = [f"{best.size}{more}", _needs(best), time, noise_text(best.noise), str(best.slices), beyond]
        table.add_row(row.method, *cells)
    return table


def _needs(trial: Trial) -> str:
    return "more noise or time" if trial.needs is None else format_size(trial.needs)
