"""The lock file: every check's record as JSON, laid out so that a diff of it reads well.

A key a line, a residual a line, in the order of the configuration and of the model. Equal records give equal bytes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xconv_fx.errors import UsageError

from .record import Held, Record

FORMAT = 1
UPDATE = "xconv check --update"


def dumps(records: Mapping[str, Record], torch: str) -> str:
    """The text of a lock file, written with this version of torch."""
    checks = {name: _plain(record) for name, record in records.items()}
    return _layout({"format": FORMAT, "torch": torch, "checks": checks}) + "\n"


def read(path: Path) -> tuple[dict[str, Record], str]:
    """The records of a lock file by their checks' names, and the version of torch that planned them.

    Empty when there is no such file. Raises `UsageError` when it is not one.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, ""
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "--lock with a file that can be read") from error
    except ValueError as error:
        raise UsageError(f"{path} is no lock file: {error}", UPDATE) from error
    try:
        if data["format"] != FORMAT:
            raise UsageError(f"{path} has format {data['format']!r}, not {FORMAT}", UPDATE)
        return {name: _record(value) for name, value in data["checks"].items()}, str(data["torch"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is no lock file: {error!r}", UPDATE) from error


def write(path: Path, text: str) -> None:
    """Write the text of a lock file. Raises `UsageError`."""
    try:
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", "--lock with a path that can be written") from error


def _plain(record: Record) -> dict[str, Any]:
    data = dataclasses.asdict(record)
    for row in data["residuals"]:
        del row["line"]
    return data


def _record(data: Mapping[str, Any]) -> Record:
    return Record(**{**data, "residuals": tuple(Held(**row) for row in data["residuals"])})


def _layout(value: Any, margin: str = "") -> str:
    """JSON with a line for each key, and for each element of a list."""
    if not isinstance(value, (dict, list, tuple)) or not value:
        return json.dumps(value)
    inner = margin + "  "
    if isinstance(value, dict):
        lines = [f"{inner}{json.dumps(key)}: {_layout(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{margin}}}"
    return "[\n" + ",\n".join(inner + json.dumps(item) for item in value) + f"\n{margin}]"
