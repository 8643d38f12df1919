"""What a command line names in the user's code: a model, its inputs, a loss.

`FILE.py:callable`, `package.module:callable`, or either with arguments, `module:Class(width=32, norm="batch")`, which
are literals: nothing of a command line is evaluated. Importing and calling runs code we do not know, so everything it
raises, even an exit, is turned into a `UsageError` that says where in the user's file it happened and what to type
next.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from xconv_fx.errors import UsageError, join_clauses, nearest

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

TARGET_HINT = "write FILE.py:callable or package.module:callable, such as net.py:build"
ARGUMENTS_HINT = (
    "arguments are numbers, strings in quotes, True, False, None, and lists, tuples and dicts of them, such as "
    "'net.py:build(width=32, norm=\"batch\")'; for anything else write a function that calls it, and name that"
)
_TARGET = re.compile(r"(?P<where>.*?):(?P<name>[^\W\d]\w*(?:\.[^\W\d]\w*)*)(?P<call>\(.*\))?", re.DOTALL)


@dataclass(frozen=True)
class Target:
    """A target taken apart: a file or module, a name in it, and the arguments of a call (None: without parentheses)."""

    where: str
    name: str
    call: str | None = None
    positional: Sequence[Any] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def parse(text: str) -> Target:
        """From "FILE.py:callable", "module:callable" or "module:callable(arguments)". Raises `UsageError`."""
        match = _TARGET.fullmatch(text.strip())
        if match is None:
            where, colon, name = text.partition("(")[0].rpartition(":")
            where = text if not colon or name.endswith(".py") or "/" in name or "\\" in name else where
            raise UsageError(f"{text!r} names no callable", f"{where}:build, where build() returns the model")
        where, name, call = match.group("where", "name", "call")
        if not where:
            raise UsageError(f"{text!r} names no file", TARGET_HINT)
        return Target(where, name, call) if call is None else Target(where, name, call, *_literals(call, text))

    @property
    def path(self) -> Path | None:
        """The file that it names; None for a module."""
        return Path(self.where) if self.where.endswith(".py") else None

    def load(self) -> tuple[ModuleType, Any]:
        """The imported module, and what has the name in it. Raises `UsageError`, whatever the user's code raises."""
        module = _load_module(self.where) if self.path is None else _load_file(self.path)
        try:
            return module, attrgetter(self.name)(module)
        except AttributeError as error:
            raise UsageError(f"{self.where} has no {self.name!r}", _callables_hint(module, self.name)) from error

    @property
    def plain(self) -> str:
        """The target without arguments."""
        return f"{self.where}:{self.name}"

    def __str__(self) -> str:
        return self.plain + (self.call or "")


def build(target: str, device: str) -> torch.nn.Module:
    """The model that `target` names, on `device`: what its callable returns, or a module that is one already.

    Raises `UsageError`, whatever the user's code raises.
    """
    import torch

    parsed = Target.parse(target)
    module, builder = parsed.load()
    if isinstance(builder, torch.nn.Module):
        if parsed.call is not None:
            raise UsageError(f"{parsed.plain} is a model already, not what builds one", parsed.plain)
        return builder
    model = _result(parsed, module, builder, device)
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"{target} returned {type(model).__name__}, not a torch.nn.Module", "return the model from it")
    return model


def called(target: Target, device: str) -> Any:
    """What the callable that `target` names returns, called with its arguments under `device`. Raises `UsageError`."""
    return _result(target, *target.load(), device)


def function(target: Target, device: str) -> Callable[..., Any]:
    """The function that `target` names; of a class, or with arguments, what it returns. Raises `UsageError`."""
    module, found = target.load()
    if target.call is not None or isinstance(found, type):
        found = _result(target, module, found, device)
    if not callable(found):
        raise _not_callable(target, module, found)
    return found


def _result(target: Target, module: ModuleType, builder: Any, device: str) -> Any:
    import torch

    if not callable(builder):
        raise _not_callable(target, module, builder)
    _check_arguments(builder, target)
    hint = "fix the error above, or see it whole with --debug"
    if device == "meta":
        hint = "--allocate if the builder needs real memory, else fix the error above; --debug shows it whole"
    call = functools.partial(builder, *target.positional, **target.keywords)
    with torch.device(device):
        return _users_code(call, f"{target} failed", hint, module.__file__)


def _not_callable(target: Target, module: ModuleType, found: object) -> UsageError:
    message = f"{target.plain} is not callable but a {type(found).__name__}"
    return UsageError(message, _callables_hint(module, target.name))


def _literals(call: str, text: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of "(...)"; literals only."""
    try:
        tree = ast.parse(f"f{call}", mode="eval").body
        if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
            raise ValueError("more than one call")
        positional = tuple(ast.literal_eval(argument) for argument in tree.args)
        keywords = {item.arg: ast.literal_eval(item.value) for item in tree.keywords if item.arg is not None}
        if len(keywords) < len(tree.keywords):
            raise ValueError("** is no argument")
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise UsageError(f"{text!r}: the arguments {call} are not literals", ARGUMENTS_HINT) from error
    return positional, keywords


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        beside = sorted(item.name for item in path.parent.glob("*.py")) if path.parent.is_dir() else []
        guess = nearest(path.name, beside) or (f"one of {', '.join(beside[:8])}" if beside else TARGET_HINT)
        raise UsageError(f"no such file: {path}", guess)
    # A name of its own: a user's file may be called like a module that torch needs.
    name = f"xconv_plan_{path.stem}"
    # Model, inputs and loss of one file share its classes.
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__file__ == str(path.resolve()):
        return loaded
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # As with `python FILE.py`, modules beside the file can be imported; classes can find their own module.
    sys.path.insert(0, str(path.parent.resolve()))
    sys.modules[name] = module
    loader = spec.loader
    try:
        _users_code(lambda: loader.exec_module(module), f"{path} cannot be imported", _import_hint(), str(path))
    except UsageError:
        del sys.modules[name]
        raise
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


def _callables_hint(module: ModuleType, name: str) -> str:
    own = [
        key
        for key, value in vars(module).items()
        if callable(value) and not key.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    return join_clauses(
        nearest(name, own), f"callables there: {', '.join(own[:12])}" if own else "define build() there"
    )


def _check_arguments(function: Callable[..., Any], target: Target) -> None:
    """Raises `UsageError`, with a call that would work, unless `function` takes the target's arguments."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*target.positional, **target.keywords)
    except TypeError as error:
        known = [name for name, item in signature.parameters.items() if item.kind is not item.VAR_KEYWORD]
        wrong = next((name for name in target.keywords if name not in known), None)
        guess = nearest(wrong, known) if wrong is not None else ""
        write = f"write '{target.plain}({_needed(signature, target)})', or name a function without arguments"
        message = f"{target} cannot be called: {error}"
        if not target.call:
            message = f"{target} needs arguments: {', '.join(_names(signature))}"
        raise UsageError(message, join_clauses(guess, write)) from error


def _names(signature: inspect.Signature) -> list[str]:
    """The parameters without a default."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        name for name, item in signature.parameters.items() if item.default is item.empty and item.kind not in kinds
    ]


def _needed(signature: inspect.Signature, target: Target) -> str:
    """Arguments to write: those without a default, with the values that were given by name."""
    return ", ".join(
        f"{name}={target.keywords[name]!r}" if name in target.keywords else f"{name}=..." for name in _names(signature)
    )
