"""The model that a command line names: import the user's file, find the callable, build the model.

This runs code we do not know, so everything it raises, even an exit, is turned into a `UsageError` that says where in
the user's file it happened and what to type next.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from xconv_fx.errors import UsageError
from xconv_fx.options import join_clauses, nearest

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

TARGET_HINT = "write FILE.py:callable or package.module:callable, such as net.py:build"


def build(target: str, device: str) -> torch.nn.Module:
    """The model that `target` ("FILE.py:callable" or "package.module:callable") builds, on `device`.

    The callable takes no arguments and returns a `torch.nn.Module`; a module that is one already is taken as it is.
    Raises `UsageError`, whatever the user's code raises.
    """
    import torch

    module, name = _load(target)
    builder = _attribute(module, name, target)
    if isinstance(builder, torch.nn.Module):
        return builder
    if not callable(builder):
        raise UsageError(f"{target} is not callable but a {type(builder).__name__}", _callables_hint(module, name))
    _check_no_arguments(builder, target)
    with torch.device(device):
        hint = "fix the error above, or see it whole with --debug"
        if device == "meta":
            hint = "--allocate if the builder needs real memory, else fix the error above; --debug shows it whole"
        model = _users_code(builder, f"{target} failed", hint, module.__file__)
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"{target} returned {type(model).__name__}, not a torch.nn.Module", "return the model from it")
    return model


def _load(target: str) -> tuple[ModuleType, str]:
    """The module that `target` names, imported, and the name to look up in it."""
    where, colon, name = target.rpartition(":")
    if not colon or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name):
        where = target if not colon or name.endswith(".py") or "/" in name or "\\" in name else where
        raise UsageError(f"{target!r} names no callable", f"{where}:build, where build() returns the model")
    if not where:
        raise UsageError(f"{target!r} names no file", TARGET_HINT)
    return (_load_file(Path(where)) if where.endswith(".py") else _load_module(where)), name


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        beside = sorted(item.name for item in path.parent.glob("*.py")) if path.parent.is_dir() else []
        guess = nearest(path.name, beside) or (f"one of {', '.join(beside[:8])}" if beside else TARGET_HINT)
        raise UsageError(f"no such file: {path}", guess)
    # A name of its own: a user's file may be called like a module that torch needs.
    name = f"xconv_plan_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # As with `python FILE.py`, modules beside the file can be imported; classes can find their own module.
    sys.path.insert(0, str(path.parent.resolve()))
    sys.modules[name] = module
    loader = spec.loader
    _users_code(lambda: loader.exec_module(module), f"{path} cannot be imported", _import_hint(), str(path))
    return module


def _load_module(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    try:
        spec = importlib.util.find_spec(name)
    except ImportError:
        spec = None
    if spec is None:
        hint = (
            f"{name.replace('.', '/')}.py:callable for a file, or run it where {name.partition('.')[0]!r} is importable"
        )
        raise UsageError(f"no module named {name!r}", hint)
    hint = _import_hint()
    return _users_code(lambda: importlib.import_module(name), f"{name} cannot be imported", hint, spec.origin)


def _import_hint() -> str:
    return "fix the error above, or see it whole with --debug; code that trains belongs under if __name__ == '__main__'"


def _users_code(run: Callable[[], T], message: str, hint: str, file: str | None) -> T:
    """Run the user's code; whatever it raises, even an exit, becomes a `UsageError` that says where in `file`."""
    try:
        return run()
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name:
            hint = f"pip install the package that provides {error.name!r}, or run where it is importable"
        raise UsageError(f"{message}{_line_in(file, error)}: {summary(error)}", hint) from error


def _line_in(file: str | None, error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.lineno:
        return f" (line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if file and Path(frame.filename).resolve() == Path(file).resolve()]
    return f" (line {lines[-1]})" if lines else ""


def summary(error: BaseException) -> str:
    """Type and first line of an error's message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _attribute(module: ModuleType, name: str, target: str) -> Any:
    try:
        return attrgetter(name)(module)
    except AttributeError as error:
        raise UsageError(f"{target.rpartition(':')[0]} has no {name!r}", _callables_hint(module, name)) from error


def _callables_hint(module: ModuleType, name: str) -> str:
    own = [
        key
        for key, value in vars(module).items()
        if callable(value) and not key.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    return join_clauses(
        nearest(name, own), f"callables there: {', '.join(own[:12])}" if own else "define build() there"
    )


def _check_no_arguments(builder: Callable[..., Any], target: str) -> None:
    try:
        parameters = inspect.signature(builder).parameters.values()
    except (TypeError, ValueError):
        return
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [item.name for item in parameters if item.default is item.empty and item.kind not in kinds]
    if needed:
        name = target.rpartition(":")[2]
        call = f"{name}({', '.join(f'{item}=...' for item in needed)})"
        hint = f"add a function without arguments, def build(): return {call}, and name that"
        raise UsageError(f"{target} needs arguments: {', '.join(needed)}", hint)
