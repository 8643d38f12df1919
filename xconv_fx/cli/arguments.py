"""What the commands share: exit codes, and the flags that name a model and the planner's options."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from xconv_fx.errors import OptionError, UsageError
from xconv_fx.options import PREFERENCES, Options
from xconv_fx.options.codecs import CODECS_HINT
from xconv_fx.tools.workload import LOSSES, Workload

from .scenario import add_scenario, scenario

OK, INFEASIBLE, FAILED = 0, 1, 2
EXIT_CODES = (
    f"exit codes: {OK} planned, {INFEASIBLE} the budget cannot be met, {FAILED} usage error or the model failed"
)
PROBES_HINT = "write --probes 8 for every layer, or --probes 'encoder.*=8,head=2' by layer name or pattern"
FLAGS = {
    "mem_budget": "--budget",
    "codecs": "--codecs",
    "probes": "--probes",
    "slices": "--slices",
    "prefer": "--prefer",
    "max_noise": "--max-noise",
    "max_layer_noise": "--max-layer-noise",
    "max_slowdown": "--max-slowdown",
    "stats": "--stats",
    "reserve": "--reserve",
    "calls": "--calls",
    "report": "--json",
}


def add_model(command: argparse.ArgumentParser, inputs_required: bool = True) -> None:
    """Declare what names a model, its inputs and its loss."""
    add = command.add_argument
    target = "what builds the model: FILE.py:callable, module:callable or 'module:Class(width=32)'"
    add("target", metavar="TARGET", help=target)
    inputs: dict[str, Any] = {
        "help": "an input such as 4x1x96x96x96 or 2x77:int64; repeat it for every argument, or name a callable that "
        "builds all",
        "required": inputs_required,
    }
    add("--input", dest="inputs", metavar="SHAPE[:DTYPE]", action="append", default=[], **inputs)
    loss = f"{', '.join(LOSSES)}, or a callable of the output and the labels, compiled with the model (default: mean)"
    add("--loss", metavar="WHAT", help=loss)
    labels = "what the loss gets besides the output, such as 8:int64; repeat it"
    add("--label", dest="labels", metavar="SHAPE[:DTYPE]", action="append", default=[], help=labels)
    add("--allocate", action="store_true", help="build the model with real memory, for builders that read weights")


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the planner's options, and what it plans for."""
    add_planner(command)
    add_scenario(command)


def add_planner(command: argparse.ArgumentParser) -> None:
    """Declare the planner's options."""
    add = command.add_argument
    add("--budget", metavar="SIZE", help="limit of the peak: 8GB, 7.5GiB, or 60%% of the peak without xconv")
    add("--codecs", metavar="NAMES", help=CODECS_HINT.replace("%", "%%"))
    add("--probes", metavar="N|LAYER=N,...", help="probes a layer must use, for all layers or by name or pattern")
    add("--slices", metavar="N", help="slices of the batch to run one after another; 1 for never (default: as needed)")
    add("--prefer", metavar="WHAT", help=f"{', '.join(PREFERENCES)}: what to give up last (default: balanced)")
    noise = "predicted variance of the gradients, relative to their energy"
    add("--max-noise", metavar="X", help=f"limit of the {noise}, or none (default: 1, and 1 for any layer's)")
    add("--max-layer-noise", metavar="X", help="the same for the gradient of the noisiest layer, or none")
    add("--max-slowdown", metavar="X", help="limit of the predicted extra time of a step, 0.1 for a tenth")
    add("--stats", metavar="FILE", help="what xconv calibrate measured, to predict noise by (default: priors)")
    add("--reserve", metavar="SIZE", help="part of the budget left for memory outside the step")
    add("--calls", metavar="N", help="forwards of the model that a step runs before their backward (default: 1)")


def add_json(command: argparse.ArgumentParser, what: str) -> None:
    """Declare `--json PATH`, to be written with `write`."""
    text = f"write {what} as JSON to PATH, or to standard output and nothing else with -"
    command.add_argument("--json", metavar="PATH", help=text)


def workload(arguments: argparse.Namespace) -> Workload:
    """What `add_model` declared."""
    return Workload(
        arguments.target, tuple(arguments.inputs), arguments.loss, tuple(arguments.labels), arguments.allocate
    )


def options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `explain`, checked before the user's file is run."""
    given = {
        "mem_budget": arguments.budget,
        "codecs": arguments.codecs,
        "probes": None if arguments.probes is None else _probes(arguments.probes),
        "slices": _number(arguments.slices, int),
        "prefer": arguments.prefer,
        "max_noise": _number(arguments.max_noise, float),
        "max_layer_noise": _number(arguments.max_layer_noise, float),
        "max_slowdown": _number(arguments.max_slowdown, float),
        "stats": arguments.stats,
        "reserve": arguments.reserve,
        "calls": _number(arguments.calls, int),
    }
    given = {name: value for name, value in given.items() if value is not None}
    try:
        Options.parse({**given, "report": None if arguments.json == "-" else arguments.json})
    except OptionError as error:
        if error.option == "probes":
            reason = error.hint.partition(";")[0]
            raise UsageError(f"--probes {arguments.probes!r}: {reason}", PROBES_HINT) from error
        raise UsageError(f"{FLAGS[error.option]} {error.value!r}: {error.hint}") from error
    return {**given, **scenario(arguments)}


def _number(text: str | None, kind: type) -> Any:
    """The number that a flag gives, or the text itself for the options to refuse."""
    try:
        return None if text is None else kind(text)
    except ValueError:
        return text


def _probes(text: str) -> int | dict[str, int]:
    if re.fullmatch(r"\d+", text):
        return int(text)
    pairs = [re.fullmatch(r"\s*(.+?)\s*=\s*(\d+)\s*", part) for part in text.split(",")]
    if not all(pairs):
        raise UsageError(f"--probes {text!r} is not a number of probes", PROBES_HINT)
    return {pair[1]: int(pair[2]) for pair in pairs if pair}


def write(text: str, path: str, option: str = "--json") -> None:
    """Write what an option with a path asks for, to standard output for -. Raises `UsageError`."""
    if path == "-":
        sys.stdout.write(text)
        return
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"cannot write {path!r}: {error.strerror}", f"{option} with a path that can be written"
        ) from error
