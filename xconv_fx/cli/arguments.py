"""What the commands share: exit codes, input shapes, the planner's options as flags, and the model that a target names.

Everything that goes wrong with a user's model becomes a `UsageError` that says what to type next.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xconv_fx.errors import OptionError, UsageError, XConvError
from xconv_fx.options import CODECS_HINT, PREFERENCES, Options, join_clauses, nearest
from xconv_fx.target import build, summary

if TYPE_CHECKING:
    import torch

    from xconv_fx.plan import Plan

OK, INFEASIBLE, FAILED = 0, 1, 2
EXIT_CODES = (
    f"exit codes: {OK} planned, {INFEASIBLE} the budget cannot be met, {FAILED} usage error or the model failed"
)
INPUT_HINT = "write sizes joined by x and an optional dtype, such as 4x1x96x96x96 or 32x3x224x224:bfloat16"
PROBES_HINT = "write --probes 8 for every layer, or --probes 'encoder.*=8,head=2' by layer name or pattern"
FLAGS = {
    "mem_budget": "--budget",
    "codecs": "--codecs",
    "probes": "--probes",
    "slices": "--slices",
    "prefer": "--prefer",
    "max_noise": "--max-noise",
    "max_slowdown": "--max-slowdown",
    "reserve": "--reserve",
    "report": "--json",
}
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
DTYPE_ALIASES = {
    "float": "float32",
    "fp32": "float32",
    "half": "float16",
    "fp16": "float16",
    "bf16": "bfloat16",
    "double": "float64",
    "long": "int64",
    "int": "int32",
}


def add_model(command: argparse.ArgumentParser) -> None:
    """Declare what names a model, its inputs and its loss."""
    add = command.add_argument
    add("target", metavar="TARGET", help="what builds the model: FILE.py:callable or module:callable")
    inputs = "an input of the model such as 4x1x96x96x96 or 2x77:int64; repeat it, one for every argument"
    add("--input", dest="inputs", metavar="SHAPE[:DTYPE]", action="append", required=True, help=inputs)
    add("--loss", choices=("mean", "sum"), help="how the output becomes a loss (default: mean)")
    add("--allocate", action="store_true", help="build the model with real memory, for builders that read weights")


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the planner's options."""
    add = command.add_argument
    add("--budget", metavar="SIZE", help="limit of the peak: 8GB, 7.5GiB, or 60%% of the peak without xconv")
    add("--codecs", metavar="NAMES", help=CODECS_HINT.replace("%", "%%"))
    add("--probes", metavar="N|LAYER=N,...", help="probes a layer must use, for all layers or by name or pattern")
    add("--slices", metavar="N", help="slices of the batch to run one after another; 1 for never (default: as needed)")
    add("--prefer", metavar="WHAT", help=f"{', '.join(PREFERENCES)}: what to give up last (default: balanced)")
    add("--max-noise", metavar="X", help="limit of the predicted variance of the gradients, relative to their energy")
    add("--max-slowdown", metavar="X", help="limit of the predicted extra time of a step, 0.1 for a tenth")
    add("--reserve", metavar="SIZE", help="part of the budget left for memory outside the step")


def add_json(command: argparse.ArgumentParser, what: str) -> None:
    """Declare `--json PATH`, to be written with `write`."""
    text = f"write {what} as JSON to PATH, or to standard output and nothing else with -"
    command.add_argument("--json", metavar="PATH", help=text)


@dataclass(frozen=True)
class InputSpec:
    """Shape and dtype name of one model input."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    @staticmethod
    def parse(text: str) -> InputSpec:
        """From "4x1x96x96x96" or "2x77:int64". Raises `UsageError`."""
        sizes, colon, dtype = text.partition(":")
        if not re.fullmatch(r"[1-9]\d*(?:[xX][1-9]\d*)*", sizes):
            raise UsageError(f"--input {text!r} is not a shape of positive sizes", INPUT_HINT)
        dtype = DTYPE_ALIASES.get(dtype.lower(), dtype.lower()) if colon else "float32"
        if dtype not in DTYPES:
            hint = join_clauses(nearest(dtype, DTYPES), f"dtypes: {', '.join(DTYPES)}")
            raise UsageError(f"--input {text!r}: no dtype {dtype!r}", hint)
        return InputSpec(tuple(map(int, re.split("[xX]", sizes))), dtype)

    def zeros(self, device: str | torch.device) -> torch.Tensor:
        import torch

        return torch.zeros(self.shape, dtype=getattr(torch, self.dtype), device=device)

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))}:{self.dtype}"


def plans_of(arguments: argparse.Namespace) -> Sequence[Plan]:
    """The plans of the model, inputs and options that the command line names. Raises `UsageError`."""
    chosen = options(arguments)
    specs = [InputSpec.parse(text) for text in arguments.inputs]
    model = build(arguments.target, "cpu" if arguments.allocate else "meta")
    _check_count(model, specs)
    return _explain(model, specs, chosen)


def options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `explain`, checked before the user's file is run."""
    given = {
        "mem_budget": arguments.budget,
        "codecs": arguments.codecs,
        "probes": None if arguments.probes is None else _probes(arguments.probes),
        "slices": _number(arguments.slices, int),
        "prefer": arguments.prefer,
        "max_noise": _number(arguments.max_noise, float),
        "max_slowdown": _number(arguments.max_slowdown, float),
        "reserve": arguments.reserve,
    }
    given = {name: value for name, value in given.items() if value is not None}
    try:
        Options.parse({**given, "report": None if arguments.json == "-" else arguments.json})
    except OptionError as error:
        if error.option == "probes":
            reason = error.hint.partition(";")[0]
            raise UsageError(f"--probes {arguments.probes!r}: {reason}", PROBES_HINT) from error
        raise UsageError(f"{FLAGS[error.option]} {error.value!r}: {error.hint}") from error
    return given if arguments.loss is None else {**given, "loss": arguments.loss}


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


def _check_count(model: torch.nn.Module, specs: Sequence[InputSpec]) -> None:
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*specs)
    except TypeError as error:
        hint = f"one --input for each argument of forward{signature}"
        raise UsageError(f"{len(specs)} --input given, but {error}", hint) from error


def _explain(model: torch.nn.Module, specs: Sequence[InputSpec], options: dict[str, Any]) -> Sequence[Plan]:
    from xconv_fx.explain import explain

    # A builder may place its model itself, and a model built at import is where the file put it.
    weight = next(model.parameters(), None)
    inputs = [spec.zeros("meta" if weight is None else weight.device) for spec in specs]
    try:
        plans = explain(model, *inputs, **options).plans
    except XConvError:
        raise
    except Exception as error:
        # The compiler reports a wrong shape at length; the model itself, run on the same inputs, says it in a line.
        cause = _eager_failure(model, inputs) or getattr(error, "inner_exception", None) or error
        given = " ".join(f"--input {spec}" for spec in specs)
        where = _layer_of(model, cause)
        hint = "another --input if the shape or dtype is wrong; --debug shows the whole error"
        raise UsageError(f"{type(model).__name__} failed on {given}{where}: {summary(cause)}", hint) from error
    if not plans:
        hint = "a model with parameters that require gradients"
        raise UsageError(f"{type(model).__name__} has nothing to train, so there is nothing to plan", hint)
    return plans


def _eager_failure(model: torch.nn.Module, inputs: list[torch.Tensor]) -> Exception | None:
    import torch

    try:
        with torch.no_grad():
            model(*inputs)
    except Exception as error:
        return error
    return None


def _layer_of(model: torch.nn.Module, error: BaseException) -> str:
    """Where in `model` the error was raised: the innermost layer whose code was running."""
    import torch

    names = {id(layer): name for name, layer in model.named_modules()}
    where = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        layer = frame.f_locals.get("self")
        if isinstance(layer, torch.nn.Module) and names.get(id(layer)):
            where = f", in {names[id(layer)]} ({type(layer).__name__}({layer.extra_repr()}))"
    return where


def write(text: str, path: str) -> None:
    """Write what `--json PATH` asks for; raises `UsageError` where that is impossible."""
    if path == "-":
        sys.stdout.write(text)
        return
    try:
        Path(path).write_text(text)
    except OSError as error:
        raise UsageError(
            f"cannot write {path!r}: {error.strerror}", "--json with a path that can be written"
        ) from error
