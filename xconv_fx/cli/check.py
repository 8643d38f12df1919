"""`xconv check`: do the training steps that a project lists still take what its lock file says?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xconv_fx.errors import BudgetInfeasibleError, UsageError
from xconv_fx.progress import doing

from .arguments import FAILED, OK
from .status import status

if TYPE_CHECKING:
    from xconv_fx.tools.check.compare import Result
    from xconv_fx.tools.check.config import Check, Settings, Tolerance
    from xconv_fx.tools.check.record import Record

GREW = 1
FORMATS = ("text", "json", "github", "junit")
EXAMPLES = f"""\
exit codes: {OK} nothing grew, {GREW} something grew or is not in the lock file, {FAILED} usage error

examples:
  xconv check --update              write xconv.lock; commit it
  xconv check                       compare with it
  xconv check unet --tolerance 0    one check, to the byte
  xconv check --format github       annotate a pull request
  xconv check --format junit > memory.xml
"""


def add(commands: Any) -> argparse.ArgumentParser:
    check: argparse.ArgumentParser = commands.add_parser(
        "check",
        help="compare predicted peaks with a lock file, for continuous integration",
        description="Compare predicted peaks, lowest budgets and plans of the training steps that are listed in "
        "[tool.xconv] of pyproject.toml, or in xconv.toml, with a lock file.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = check.add_argument
    add("names", metavar="NAME", nargs="*", help="checks to run (default: all)")
    add("--update", action="store_true", help="write what is planned now to the lock file")
    add("--config", metavar="FILE", type=Path, help="where checks are listed (default: the nearest here or above)")
    add("--lock", metavar="FILE", type=Path, help="the lock file (default: the configuration's, or xconv.lock)")
    add("--tolerance", metavar="X", help="what a number may grow by, such as 1%% or 5MB (default: the configuration's)")
    add("--format", choices=FORMATS, default="text", help="how to report (default: text)")
    return check


def run(arguments: argparse.Namespace) -> int:
    from xconv_fx.tools.check import config, lock
    from xconv_fx.tools.check.formats import FORMATS as formats

    settings = config.read(arguments.config or config.find(Path.cwd()))
    tolerance = settings.tolerance
    if arguments.tolerance is not None:
        tolerance = config.Tolerance.parse(arguments.tolerance, "--tolerance")
    path = arguments.lock or settings.lock
    checks = settings.chosen(arguments.names)
    known, planned_with = ({}, "") if arguments.update and not arguments.names else lock.read(path)
    if not known and not arguments.update:
        raise UsageError(f"no lock file {path}", lock.UPDATE)
    if planned_with not in ("", _torch_version()):
        sys.stderr.write(f"note: {path} was written with torch {planned_with}, this is {_torch_version()}\n")
    with status("planning"):
        results = [_result(check, settings, known, tolerance, arguments.update) for check in checks]
    if arguments.update:
        _update(settings, results, known, path)
    else:
        results += _orphans(settings, known) if not arguments.names else []
    sys.stdout.write(formats[arguments.format](results))
    return GREW if any(result.failed for result in results) else OK


def _result(
    check: Check, settings: Settings, known: Mapping[str, Record], tolerance: Tolerance, update: bool
) -> Result:
    """Plan a check, and compare it unless it is to be written."""
    from xconv_fx.tools.check.compare import Result, compare
    from xconv_fx.tools.check.record import measure

    try:
        with doing(check.name):
            record = measure(check, settings.path.resolve().parent)
    except BudgetInfeasibleError as error:
        told = BudgetInfeasibleError(error.budget, error.smallest, error.consumers)
        return Result(check.name, problem=str(told))
    except UsageError as error:
        raise UsageError(f"check {check.name}: {error}", error.hint) from error
    if update:
        return Result(check.name, record=record)
    before = known.get(check.name)
    if before is None:
        return Result(check.name, problem="not in the lock file", record=record)
    if before.step != record.step:
        return Result(check.name, problem="configured otherwise than when the lock file was written", record=record)
    return compare(check.name, before, record, tolerance)


def _update(settings: Settings, results: list[Result], known: Mapping[str, Record], path: Path) -> None:
    """Write the lock file, unless a check has no plan."""
    from xconv_fx.tools.check import lock

    if any(result.failed for result in results):
        return
    new = {result.name: result.record for result in results if result.record is not None}
    records = {**known, **new}
    ordered = {check.name: records[check.name] for check in settings.checks if check.name in records}
    lock.write(path, lock.dumps(ordered, _torch_version()))


def _orphans(settings: Settings, known: Mapping[str, Record]) -> list[Result]:
    from xconv_fx.tools.check.compare import Result

    names = {check.name for check in settings.checks}
    problem = "in the lock file, but not in the configuration; xconv check --update"
    return [Result(name, problem=problem) for name in known if name not in names]


def _torch_version() -> str:
    import torch

    return torch.__version__.partition("+")[0]
