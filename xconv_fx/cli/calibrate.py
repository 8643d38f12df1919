"""`xconv calibrate`: measure how noisy a model's gradients are on the user's data (`xconv_fx.calibrate`)."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from xconv_fx.errors import UsageError
from xconv_fx.tools.workload import names_callable

from .arguments import FAILED, OK, add_model, workload, write
from .status import status

if TYPE_CHECKING:
    from xconv_fx.options.statistics import Statistics

DATA_HINT = "--data FILE.py:callable, for a function that returns or yields pairs of inputs and targets"
EXAMPLES = f"""\
exit codes: {OK} measured and written, {FAILED} usage error or the model failed

examples:
  xconv calibrate net.py:build --data net.py:batches --loss net.py:loss --output stats.json
  xconv plan net.py:build --input 8x3x96x96 --budget 60% --stats stats.json
"""


def add(commands: Any) -> argparse.ArgumentParser:
    calibrate: argparse.ArgumentParser = commands.add_parser(
        "calibrate",
        help="measure a model's gradient noise on your data, for plans that weigh it",
        description="Run a few exact steps without an update, and write how sensitive each layer's gradient is to what "
        "is held for it, beside its own SGD noise. Plans read the file with --stats.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(calibrate, inputs_required=False)
    add = calibrate.add_argument
    add("--data", metavar="CALLABLE", help="yields batches, pairs of inputs and targets: FILE.py:callable")
    add("--batches", metavar="N", default="2", help="batches to measure, at most (default: %(default)s)")
    add("--seed", metavar="N", default="0", help="of parameters and all else that is drawn (default: %(default)s)")
    add("--output", metavar="FILE", required=True, help="where the statistics are written, - for standard output")
    return calibrate


def run(arguments: argparse.Namespace) -> int:
    if not re.fullmatch(r"[1-9]\d{0,3}", arguments.batches):
        raise UsageError(f"--batches {arguments.batches!r} is not a number from 1", "--batches 2")
    if not re.fullmatch(r"\d{1,9}", arguments.seed):
        raise UsageError(f"--seed {arguments.seed!r} is not a number from 0", "--seed 0")
    if (arguments.data is None) != bool(arguments.inputs):
        given = "neither --data nor --input" if arguments.data is None else "both --data and --input"
        raise UsageError(f"{given} given", DATA_HINT)
    folder = Path(arguments.output).parent
    if not folder.is_dir():
        raise UsageError(f"--output {arguments.output!r}: there is no directory {str(folder)!r}", "--output stats.json")
    import torch

    from xconv_fx.tools.user_data import measured_on_data, measured_on_inputs

    step = replace(workload(arguments), allocate=True)
    torch.manual_seed(int(arguments.seed))
    with status("building the model"):
        if arguments.data is not None:
            found = measured_on_data(step, arguments.data, int(arguments.batches))
        else:
            found = step.ask(measured_on_inputs, batches=int(arguments.batches))
    write(found.to_json(), arguments.output, "--output")
    if arguments.output != "-":
        _show(found, arguments)
    return OK


def _show(found: Statistics, arguments: argparse.Namespace) -> None:
    from xconv_fx.tools.statistics_table import table

    console = Console()
    console.print(table(found))
    batches = f"{found.batches} batch" + ("" if found.batches == 1 else "es")
    console.print(Text(f" measured on {batches}; plans read it with --stats {arguments.output}"), soft_wrap=True)
    if arguments.data is None and not any(map(names_callable, arguments.inputs)):
        console.print(Text(" inputs were random numbers, labels zeros: for numbers that count, " + DATA_HINT))
