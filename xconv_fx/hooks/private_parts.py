"""Whether the private parts of torch that this package leans on are there, and are called as they were.

What is leaned on is read off the sources of `hooks` and of the lowerings themselves: what they import from torch, the
attributes that they read of that, and what they replace (`mock.patch.object`). The folder `signatures` has the
parameters of functions and classes on every torch that was tested, a file each. The installed one must have those of
the next tested torch before it that must be given, and those that the source which needs them names, and no more that
must be given. Nothing is compiled, and nothing runs but imports.

What a module looks for and does without (in a `try` that catches the failure) is not asked for.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .version import minor

_HERE = Path(__file__).parent
_FOLDERS = (_HERE, _HERE.parent / "ops" / "lowering")
_SIGNATURES = _HERE / "signatures"
# The last minor version of torch that a file needs private parts of, where that is not every one.
_UNTIL = {"hooks/compiled_apart.py": (2, 12)}
_FORGIVEN = {"ImportError", "ModuleNotFoundError", "AttributeError"}


@dataclass(frozen=True)
class Private:
    """Something private of torch, `name` of `owner` (a module, or a class in one); `user` is the file that needs it."""

    owner: str
    name: str
    user: str

    @property
    def path(self) -> str:
        return f"{self.owner}.{self.name}" if self.name else self.owner


@dataclass(frozen=True)
class Fault:
    """What is wrong with something that the file `user` needs."""

    private: Private
    reason: str

    def __str__(self) -> str:
        return f"{self.private.user}: {self.private.path} {self.reason}"


def probe() -> tuple[Fault, ...]:
    """What the installed torch lacks, or takes other arguments for than it did; nothing where all is as it was."""
    recorded: dict[str, list[list[Any]]] = json.loads(signatures(torch.__version__).read_text())
    faults: dict[str, Fault] = {}
    for private in needed():
        if private.path in faults:
            continue
        try:
            found = _found(private)
        except (ImportError, AttributeError):
            faults[private.path] = Fault(private, "is not there")
            continue
        if reason := _changed(recorded.get(private.path), _parameters(found), _words(private.user)):
            faults[private.path] = Fault(private, reason)
    return tuple(faults.values())


def signatures(version: str) -> Path:
    """The file that a torch is held against: that of the last minor version up to its own, else of the first."""
    files = sorted(_SIGNATURES.glob("*.json"), key=lambda file: minor(file.stem))
    return next((file for file in reversed(files) if minor(file.stem) <= minor(version)), files[0])


def write_signatures() -> None:
    """Record the parameters that everything has on the installed torch."""
    found = {private.path: _parameters(_found(private)) for private in needed()}
    rows = {path: parameters for path, parameters in sorted(found.items()) if parameters is not None}
    lines = [f"  {json.dumps(path)}: {json.dumps(parameters)}" for path, parameters in rows.items()]
    place = _SIGNATURES / f"{'.'.join(map(str, minor(torch.__version__)))}.json"
    place.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def needed() -> tuple[Private, ...]:
    """Everything that the sources name for the installed torch, in their order."""
    found: dict[Private, None] = {}
    installed = minor(torch.__version__)
    for folder in _FOLDERS:
        for path in sorted(folder.glob("*.py")):
            user = str(path.relative_to(_HERE.parent))
            if installed <= _UNTIL.get(user, installed):
                found.update(dict.fromkeys(_Names(user).of(ast.parse(path.read_text()))))
    return tuple(found)


def _found(private: Private) -> Any:
    """It, or the object in whose hands it is: what that has is known when it is used.

    Raises `ImportError` or `AttributeError` where it is not there.
    """
    value: Any = importlib.import_module("torch")
    path = "torch"
    for part in private.path.split(".")[1:]:
        if not (inspect.ismodule(value) or inspect.isclass(value)):
            break
        path = f"{path}.{part}"
        if not hasattr(value, part) and inspect.ismodule(value):
            value = importlib.import_module(path)
        else:
            value = getattr(value, part)
    return value


def _parameters(value: Any) -> list[list[Any]] | None:
    """Name, kind, and whether it must be given, of each parameter; None for what is not called, or not described."""
    # What is written in C is described on some versions of Python and not on others.
    if not callable(value) or inspect.isbuiltin(value):
        return None
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return None
    return [[one.name, one.kind.name, one.default is one.empty] for one in parameters]


@functools.cache
def _words(user: str) -> frozenset[str]:
    """All names of arguments, and all strings, of a source."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((_HERE.parent / user).read_text())):
        if isinstance(node, (ast.keyword, ast.arg)) and node.arg is not None:
            found.add(node.arg)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return frozenset(found)


def _changed(before: list[list[Any]] | None, now: list[list[Any]] | None, used: Collection[str]) -> str:
    """Why what was called before, with parameters of these names, cannot be called so any more; "" where it can."""
    if before is None or now is None:
        return ""
    names = {name for name, _, _ in now}
    anything = any(kind in ("VAR_POSITIONAL", "VAR_KEYWORD") for _, kind, _ in now)
    gone = [
        name
        for name, kind, must in before
        if name not in names and not kind.startswith("VAR") and (must or name in used)
    ]
    if gone and not anything:
        return f"has no parameter {', '.join(gone)} any more"
    known = {name for name, _, _ in before}
    added = [name for name, kind, must in now if must and name not in known and not kind.startswith("VAR")]
    return f"must be given {', '.join(added)}" if added else ""


class _Names(ast.NodeVisitor):
    """Collects what one source names of torch's private parts."""

    def __init__(self, user: str) -> None:
        self.user = user
        self.found: list[Private] = []
        # What names in the source stand for: a path from torch on.
        self.aliases: dict[str, str] = {"torch": "torch"}

    def of(self, tree: ast.Module) -> Iterator[Private]:
        """What the source names, each as often as it does."""
        self.visit(tree)
        yield from self.found

    def visit_Try(self, node: ast.Try) -> None:
        types = [handler.type for handler in node.handlers if handler.type is not None]
        caught = {name.id for one in types for name in ast.walk(one) if isinstance(name, ast.Name)}
        if not caught & _FORGIVEN:
            self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.dump(node.test):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] == "torch" and _private(alias.name):
                self._add(alias.name)
                if alias.asname:
                    self.aliases[alias.asname] = alias.name

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if node.level or module.split(".")[0] != "torch":
            return
        for alias in node.names:
            path = f"{module}.{alias.name}"
            self.aliases[alias.asname or alias.name] = path
            if _private(path):
                self._add(path)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        path = self._path(node)
        if path is not None and _private(path) and isinstance(node.ctx, ast.Load):
            self._add(path)
        else:
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Attribute) and ast.unparse(node.func) == "mock.patch.object":
            owner, name = self._path(node.args[0]), node.args[1]
            if owner is not None and isinstance(name, ast.Constant) and isinstance(name.value, str):
                self._add(f"{owner}.{name.value}")
        self.generic_visit(node)

    def _path(self, node: ast.AST) -> str | None:
        """What a name, or an attribute of an attribute, stands for, from torch on; None for anything else."""
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self._path(node.value)
            return None if owner is None else f"{owner}.{node.attr}"
        return None

    def _add(self, path: str) -> None:
        owner, _, name = path.rpartition(".")
        self.found.append(Private(owner, name, self.user))


def _private(path: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in path.split("."))
