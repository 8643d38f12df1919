"""`xconv selftest`: whether what this package computes, holds and predicts is right on a device."""

from __future__ import annotations

import argparse
import re
from typing import Any

from rich.console import Console

from xconv_fx.errors import UsageError

from .arguments import FAILED, OK, add_json, write
from .status import status

OFF = 1
DEVICES = ("cpu", "cuda")
EXAMPLES = f"""\
exit codes: {OK} nothing is off, {OFF} something is, {FAILED} usage error

examples:
  xconv selftest --device cuda --json selftest.json      the file to send with a report
  xconv selftest --device cuda --only gradients --minutes 20
  xconv selftest --device cpu --only 'operators/quantize*' --only slices
"""


def add(commands: Any) -> argparse.ArgumentParser:
    selftest: argparse.ArgumentParser = commands.add_parser(
        "selftest",
        help="check operators, gradients, memory and times on a device",
        description="Run every operator, six small networks by every codec, and steps of two more on a device: equal "
        "words, gradients, draws, peaks as predicted, audited and measured, and times. The most important come first; "
        "what does not fit into the time is left out. The JSON tells versions and the board, not whose it is.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = selftest.add_argument
    option("--device", choices=DEVICES, help="what to test (default: cuda where there is one, else cpu)")
    option("--only", metavar="NAME", action="append", default=[], help="a group, or a pattern of names; repeatable")
    option("--minutes", metavar="N", default="5", help="begin nothing after so many minutes (default: %(default)s)")
    add_json(selftest, "the report")
    return selftest


def run(arguments: argparse.Namespace) -> int:
    if not re.fullmatch(r"\d{1,3}(\.\d+)?", arguments.minutes):
        raise UsageError(f"--minutes {arguments.minutes!r} is not a number of minutes", "--minutes 5")
    import torch

    from xconv_fx.tools.selftest.result import STYLES, Result
    from xconv_fx.tools.selftest.run import selftest

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    errors = Console(stderr=True, soft_wrap=True, highlight=False)

    def told(result: Result) -> None:
        errors.print(f"{result.finding.status:8}  {result.name}", style=STYLES[result.finding.status])

    with status("testing"):
        report = selftest(device, arguments.only, float(arguments.minutes), told)
    if arguments.json is not None:
        write(report.to_json(), arguments.json)
    if arguments.json != "-":
        Console().print(report)
    return OFF if report.off else OK
