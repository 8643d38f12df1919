"""The command line. Every mistake a user can make ends in one line that says what is wrong and one that says what to
type next; `--debug` adds the traceback. Imports of torch wait until they are needed: `xconv --help` answers at once.

Each command is a module of this package with `add(commands)`, which declares its arguments, and `run(arguments)`,
which does what it says and returns the exit code; `arguments.py` is what they share.
"""

from __future__ import annotations

import argparse
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from rich.console import Console
from rich.text import Text

from xconv_fx import __version__
from xconv_fx.errors import BudgetInfeasibleError, UsageError, XConvError, nearest
from xconv_fx.stack_room import with_stack_room
from xconv_fx.units import sufficient_size

from . import bench, calibrate, check, completion, doctor, fit, plan, profile_machine, selftest, sweep
from .arguments import EXIT_CODES, FAILED, INFEASIBLE

COMMANDS = (plan, sweep, fit, check, bench, calibrate, profile_machine, doctor, selftest, completion)


@with_stack_room
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process) and return its exit code."""
    arguments = _renamed(list(sys.argv[1:] if argv is None else argv))
    try:
        parsed = parser().parse_args(arguments)
        return parsed.run(parsed)
    except XConvError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        _print_error(error)
        return INFEASIBLE if isinstance(error, BudgetInfeasibleError) else FAILED


def _renamed(arguments: list[str]) -> list[str]:
    """The arguments by the present names of commands, with a note on standard error where they have a former one.

    The machine was once measured by `xconv calibrate`, which named no model, and the model by `xconv calibrate-model`.
    """
    command, rest = arguments[:1], arguments[1:]
    flags = [part.partition("=")[0] for part in rest if part.startswith("-")]
    if command == ["calibrate-model"]:
        new = "calibrate"
    elif command == ["calibrate"] and (not rest or {"--device", "--threads", "--json"}.intersection(flags)):
        new = "profile-machine"
    else:
        return arguments
    Console(stderr=True, soft_wrap=True).print(f"note:  xconv {command[0]} is now xconv {new}", highlight=False)
    return [new, *rest]


def _print_error(error: XConvError) -> None:
    hint = getattr(error, "hint", "") if isinstance(error, UsageError) else ""
    if isinstance(error, BudgetInfeasibleError):
        hint = f"--budget {sufficient_size(error.smallest)}"
    console = Console(stderr=True, soft_wrap=True)
    console.print(Text("error: ", style="bold red").append(str(error), style="default not bold"))
    if hint:
        console.print(Text("try:   ", style="bold").append(hint, style="default not bold"))


class _Parser(argparse.ArgumentParser):
    """Reports usage errors like every other error here, and suggests the nearest option for an unknown one.

    Commands are parsers of this class as well.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"{self.prog} --help")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = getattr(parsed, "flags", ())
            name = unknown[0].partition("=")[0]
            raise UsageError(f"unknown argument {name!r}", nearest(name, known) or f"{self.prog} --help")
        return parsed


def parser() -> argparse.ArgumentParser:
    """The command line, with all commands."""
    top = _Parser(prog="xconv", description="Train inside a memory budget.", epilog=EXIT_CODES)
    top.add_argument("--version", action="version", version=f"xconv-fx {__version__}")
    top.set_defaults(run=lambda _: top.error("no command given"))
    commands = top.add_subparsers(title="commands", metavar="COMMAND")
    for module in COMMANDS:
        command = module.add(commands)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=module.run, flags=re.findall(r"--[a-z-]+", command.format_usage()))
    return top
