"""`xconv plan`: what a model would keep, recompute, quantise or probe under a budget, without training it."""

from __future__ import annotations

import argparse
import re
from typing import Any

from rich.console import Console

from xconv_fx.errors import UsageError
from xconv_fx.plan.report import render, to_json

from .arguments import EXIT_CODES, INFEASIBLE, OK, add_json, add_model, add_options, options, workload, write
from .status import status


def add(commands: Any) -> argparse.ArgumentParser:
    plan: argparse.ArgumentParser = commands.add_parser(
        "plan",
        help="show what would be held between forward and backward under a budget",
        description="Show what would be held between forward and backward under a budget, without training.",
        epilog=EXIT_CODES,
    )
    add_model(plan)
    add_options(plan)
    add_json(plan, "the plans")
    plan.add_argument("--limit", metavar="N", default="25", help="residuals to list, 0 for all (default: %(default)s)")
    return plan


def run(arguments: argparse.Namespace) -> int:
    limit, chosen = _limit(arguments.limit), options(arguments)
    with status("tracing the model"):
        plans = workload(arguments).plans(**chosen)
    if arguments.json is not None:
        write(to_json(plans), arguments.json)
    if arguments.json != "-":
        console = Console()
        for index, plan in enumerate(plans):
            title = f"graph {index + 1} of {len(plans)}" if len(plans) > 1 else None
            console.print(render(plan, limit=limit, title=title))
    missed = any(plan.budget is not None and plan.peak > plan.budget for plan in plans)
    return INFEASIBLE if missed else OK


def _limit(text: str) -> int | None:
    if not re.fullmatch(r"\d+", text):
        raise UsageError(f"--limit {text!r} is not a number of rows", "--limit 25, or --limit 0 for all")
    return int(text) or None
