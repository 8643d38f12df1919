"""What is checked: the table `[tool.xconv]` of a pyproject.toml, or a file xconv.toml with the same keys at its top.

    [tool.xconv]
    tolerance = "1%"                  # of each number; or a size, such as "5MB"
    lock = "xconv.lock"

    [tool.xconv.check.unet]           # one table for each training step, by its name
    target = "net.py:UNet(width=16)"
    inputs = ["4x3x128x128"]
    budget = "60%"

Paths are relative to the file. A key that is misspelt is an error: a check that is silently ignored checks nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xconv_fx.device.scenario import Scenario
from xconv_fx.errors import OptionError, UsageError, join_clauses, nearest
from xconv_fx.options import Options
from xconv_fx.options.budget import parse_size
from xconv_fx.units import format_size

from ..workload import Workload

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILES = ("xconv.toml", "pyproject.toml")
LOCK = "xconv.lock"
EXAMPLE = '[check.NAME] with target = "net.py:build" and inputs = ["8x3x64x64"]'
TOLERANCE_HINT = "write a percentage such as '1%', a size such as '5MB', or 0"
# Keys of a check that are options of the planner, and their names there.
PLANNER = {
    "budget": "mem_budget",
    "codecs": "codecs",
    "probes": "probes",
    "slices": "slices",
    "prefer": "prefer",
    "max_noise": "max_noise",
    "max_layer_noise": "max_layer_noise",
    "max_slowdown": "max_slowdown",
    "reserve": "reserve",
    "calls": "calls",
    "stats": "stats",
}
# Those that say what is planned for.
SCENARIO = ("device", "gpu", "amp", "channels_last", "optimizer")
TOP = ("tolerance", "lock", "check")


@dataclass(frozen=True)
class Tolerance:
    """How much a number may grow: a share of what it was, or bytes."""

    share: float = 0.0
    bytes: int = 0

    @staticmethod
    def parse(value: Any, option: str) -> Tolerance:
        """From "1%", "5MB" or 0. Raises `UsageError` that names the option."""
        text = str(value).strip()
        try:
            if text.endswith("%"):
                share = float(text[:-1]) / 100
                if not 0 <= share < float("inf"):
                    raise ValueError(text)
                return Tolerance(share=share)
            return Tolerance(bytes=parse_size(int(text) if text.isdigit() else text, allow_zero=True))
        except ValueError as error:
            raise UsageError(f"{option} {value!r} is no tolerance", TOLERANCE_HINT) from error

    def allows(self, before: float, after: float, in_bytes: bool) -> bool:
        """Whether `after` is within the tolerance of `before`; bytes of tolerance are for numbers in bytes."""
        return after <= before * (1 + self.share) + (self.bytes if in_bytes else 0)

    def __str__(self) -> str:
        return format_size(self.bytes) if self.bytes else f"{100 * self.share:g}%"


@dataclass(frozen=True)
class Check:
    """One training step: what is planned, with which options, and the table as it is written (for the lock file)."""

    name: str
    workload: Workload
    options: Mapping[str, Any]
    written: Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a file says: all checks, in its order, the lock file's path, and the tolerance."""

    path: Path
    checks: tuple[Check, ...]
    lock: Path
    tolerance: Tolerance

    def chosen(self, names: Iterable[str]) -> tuple[Check, ...]:
        """The checks of these names, all without any. Raises `UsageError` for a name that there is not."""
        known = {check.name: check for check in self.checks}
        for name in (wanted := list(dict.fromkeys(names))):
            if name not in known:
                hint = join_clauses(nearest(name, known), f"checks: {', '.join(known)}")
                raise UsageError(f"{self.path} has no check {name!r}", hint)
        return tuple(known[name] for name in wanted) if wanted else self.checks


def find(start: Path) -> Path:
    """The nearest file with checks, in `start` or a directory above it. Raises `UsageError`."""
    for folder in (start, *start.parents):
        for name in FILES:
            path = folder / name
            if path.is_file() and _table(path) is not None:
                return path
    raise UsageError("no xconv.toml here or above, and no pyproject.toml with [tool.xconv]", f"xconv.toml: {EXAMPLE}")


def read(path: Path) -> Settings:
    """What the file says. Raises `UsageError` with the key that is wrong."""
    table = _table(path)
    if table is None:
        raise UsageError(f"{path} has no table [tool.xconv]", EXAMPLE.replace("[", "[tool.xconv.", 1))
    _refuse_unknown(table, TOP, str(path))
    checks = table.get("check")
    if not isinstance(checks, dict) or not checks:
        raise UsageError(f"{path} lists nothing to check", EXAMPLE)
    lock = table.get("lock", LOCK)
    if not isinstance(lock, str) or not lock:
        raise UsageError(f"{path}: lock = {lock!r} is no path", f'lock = "{LOCK}"')
    return Settings(
        path,
        tuple(_check(path, name, value) for name, value in checks.items()),
        path.parent / lock,
        Tolerance.parse(table.get("tolerance", "1%"), f"{path}: tolerance ="),
    )


def _table(path: Path) -> dict[str, Any] | None:
    """The table with the settings; None in a pyproject.toml without one."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "--config with a file that can be read") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no TOML: {error}", EXAMPLE) from error
    if path.name != "pyproject.toml":
        return content
    table = content.get("tool", {}).get("xconv")
    return table if isinstance(table, dict) else None


def _check(path: Path, name: str, table: Any) -> Check:
    where = f"{path}: check.{name}"
    if not isinstance(table, dict):
        raise UsageError(f"{where} is no table", EXAMPLE)
    _refuse_unknown(table, ("target", "inputs", "loss", "labels", "allocate", *PLANNER, *SCENARIO), where)
    target, loss, allocate = table.get("target"), table.get("loss"), table.get("allocate", False)
    inputs, labels = (_texts(where, key, table.get(key, [])) for key in ("inputs", "labels"))
    if not isinstance(target, str) or not inputs:
        missing = "inputs" if isinstance(target, str) else "target"
        raise UsageError(f"{where} has no {missing}", EXAMPLE)
    if not isinstance(allocate, bool) or not isinstance(loss, (str, type(None))):
        key, hint = ("loss", 'loss = "mean"') if isinstance(allocate, bool) else ("allocate", "allocate = true")
        raise UsageError(f"{where}: {key} = {table[key]!r}", hint)
    options = {PLANNER[key]: value for key, value in table.items() if key in PLANNER}
    if isinstance(options.get("stats"), str):
        options["stats"] = str(path.parent / options["stats"])
    scenario = {key: value for key, value in table.items() if key in SCENARIO}
    try:
        Options.parse(options)
        Scenario.parse(**scenario)
    except OptionError as error:
        key = next((key for key, option in PLANNER.items() if option == error.option), error.option)
        raise UsageError(f"{where}: {key} = {error.value!r}: {error.hint}", f"xconv check {name}") from error
    workload = Workload(target, inputs, loss, labels, allocate, spelling=("inputs", "labels"))
    return Check(name, workload, {**options, **scenario}, dict(table))


def _texts(where: str, key: str, value: Any) -> tuple[str, ...]:
    """A list of strings, or a string for a list of one."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{where}: {key} = {value!r} is no list of strings", f'{key} = ["8x3x64x64"]')
    return tuple(texts)


def _refuse_unknown(table: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = tuple(known)
    for key in table:
        if key not in known:
            hint = join_clauses(nearest(key, known), f"keys: {', '.join(known)}")
            raise UsageError(f"{where} has an unknown key {key!r}", hint)
