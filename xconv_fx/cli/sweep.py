"""`xconv sweep`: what every budget costs, from the lowest that has a plan to none."""

from __future__ import annotations

import argparse
import re
from typing import Any

from rich.console import Console

from xconv_fx.errors import UsageError

from .arguments import FAILED, INFEASIBLE, OK, add_json, add_model, add_options, options, workload, write
from .status import status

EXAMPLES = f"""\
exit codes: {OK} planned, {INFEASIBLE} the budget given with --budget cannot be met, {FAILED} usage error

examples:
  xconv sweep net.py:build --input 8x3x224x224
  xconv sweep net.py:build --input 8x3x224x224 --codecs exact --points 6
  xconv sweep net.py:build --input 8x3x224x224 --gpu t4 --budget 14GB --html frontier.html --png frontier.png
"""


def add(commands: Any) -> argparse.ArgumentParser:
    sweep: argparse.ArgumentParser = commands.add_parser(
        "sweep",
        help="draw what every budget costs, from the lowest to none",
        description="Plan for budgets from the lowest that has a plan to none: peak against time and noise.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(sweep)
    add_options(sweep)
    add = sweep.add_argument
    add("--points", metavar="N", default="10", help="budgets to plan for, with none as the last (default: %(default)s)")
    add("--png", metavar="PATH", help="write the plot as a picture (needs the extra `plot`)")
    add("--html", metavar="PATH", help="write a page with charts, memory over the step and a table of residuals")
    add_json(sweep, "the points and their plans")
    return sweep


def run(arguments: argparse.Namespace) -> int:
    points, chosen = _points(arguments.points), options(arguments)
    from xconv_fx.tools.sweep.frontier import frontier
    from xconv_fx.tools.sweep.table import FrontierReport

    with status("tracing the model"):
        found = workload(arguments).ask(frontier, points=points, **chosen)
    title = f"{arguments.target}, {' '.join(arguments.inputs)}"
    if arguments.png is not None:
        from xconv_fx.tools.sweep.picture import draw

        draw(found, title, arguments.png)
    if arguments.html is not None:
        from xconv_fx.tools.sweep.page import to_html

        write(to_html(found, title, found.selected), arguments.html, "--html")
    if arguments.json is not None:
        from xconv_fx.tools.sweep.data import to_json

        write(to_json(found), arguments.json)
    if arguments.json != "-":
        Console().print(FrontierReport(found))
    return INFEASIBLE if found.missed else OK


def _points(text: str) -> int:
    if not re.fullmatch(r"\d{1,4}", text) or int(text) < 2:
        raise UsageError(f"--points {text!r} is not a number from 2", "--points 10")
    return int(text)
