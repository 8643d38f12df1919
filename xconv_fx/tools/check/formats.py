"""The outcome of checks for whoever reads it: tables for people, JSON, GitHub's annotations, JUnit's XML.

Sources: "Workflow commands for GitHub Actions" (docs.github.com) for the annotations and their escapes; the JUnit
schema that Jenkins and GitLab read for the XML, of which only `testsuite`, `testcase`, `failure` and `system-out` are
used.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from xconv_fx.plan.report import Name, report_table
from xconv_fx.units import format_size

from .compare import Difference, Number, Result
from .lock import UPDATE
from .record import Held

# Rows of a table, and words of a message: the largest say where to look, and all of them are in the JSON.
ROWS = 12
NAMED = 3


def text(results: Sequence[Result]) -> str:
    """Tables, as wide and as colourful as the terminal allows."""
    console = Console()
    with console.capture() as captured:
        for result in results:
            console.print(_shown(result))
    lines = [line.rstrip() for line in captured.get().splitlines()]
    # Tables begin and end with an empty line: one between two is enough.
    kept = [line for line, next_one in zip(lines, (*lines[1:], "end"), strict=True) if line or next_one]
    return "\n".join(kept).rstrip("\n") + "\n"


def as_json(results: Sequence[Result]) -> str:
    """Everything, as one object."""
    checks = [
        {
            "name": result.name,
            "failed": result.failed,
            "problem": result.problem,
            "numbers": [dataclasses.asdict(number) for number in result.numbers],
            "residuals": [dataclasses.asdict(difference) for difference in result.residuals],
            "layers": [{"name": name, "before": then, "after": now} for name, then, now in result.layers],
        }
        for result in results
    ]
    return json.dumps({"failed": any(result.failed for result in results), "checks": checks}, indent=2) + "\n"


def github(results: Sequence[Result]) -> str:
    """A workflow command for each check that failed or changed: an error or a notice at the line of the user's code."""
    lines = []
    for result in results:
        if not result.failed and not result.changed:
            continue
        level = "error" if result.failed else "notice"
        properties = {**_place(result), "title": f"xconv check {result.name}"}
        written = ",".join(f"{key}={_escaped(value, in_property=True)}" for key, value in properties.items())
        lines.append(f"::{level} {written}::{_escaped(describe(result))}")
    return "".join(line + "\n" for line in lines)


def junit(results: Sequence[Result]) -> str:
    """A test suite with a case for each check."""
    failed = sum(result.failed for result in results)
    suite = ElementTree.Element("testsuite", name="xconv check", tests=str(len(results)), failures=str(failed))
    for result in results:
        case = ElementTree.SubElement(suite, "testcase", classname="xconv.check", name=result.name)
        if result.failed:
            headline, _, _ = describe(result).partition("\n")
            ElementTree.SubElement(case, "failure", message=headline).text = describe(result)
        elif result.changed:
            ElementTree.SubElement(case, "system-out").text = describe(result)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


FORMATS: dict[str, Callable[[Sequence[Result]], str]] = {
    "text": text,
    "json": as_json,
    "github": github,
    "junit": junit,
}


def describe(result: Result) -> str:
    """A check's outcome in plain text: the numbers in one line, then the layers with the most growth."""
    if result.problem:
        return f"{result.problem}; {UPDATE}" if result.record is not None else result.problem
    numbers = sorted(result.numbers, key=lambda number: not number.regressed)
    lines = ["; ".join(f"{n.name} {_quantity(n.before, n.unit)} -> {_quantity(n.after, n.unit)}" for n in numbers)]
    lines += [f"layer {name}: {then or 'none'} -> {now or 'none'}" for name, then, now in result.layers[:NAMED]]
    lines += [f"residual of {_name(item)}: {_change(item)}" for item in result.residuals[:NAMED]]
    return "\n".join(filter(None, lines)) or "nothing changed"


def _shown(result: Result) -> RenderableType:
    verdict, style = ("grew", "bold red") if result.failed else ("ok", "bold green")
    if result.problem:
        hint = [Text(f"  try: {UPDATE}")] if result.record is not None else []
        return Group(Text.assemble((f"{result.name}: failed", "bold red")), Text(f"  {result.problem}"), *hint)
    note = "" if result.failed or not result.changed else f", but not what the lock file says; {UPDATE} keeps it"
    parts: list[RenderableType] = [Text.assemble((f"{result.name}: {verdict}", style), note)]
    if result.numbers:
        parts.append(_numbers(result.numbers))
    if result.layers:
        parts.append(_layers(result.layers))
    if result.residuals:
        parts.append(_residuals(result.residuals))
    return Group(*parts)


def _table(*columns: str, right: Sequence[str] = ()) -> Table:
    table = report_table()
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left")
    return table


def _numbers(numbers: Sequence[Number]) -> RenderableType:
    table = _table("number", "was", "is", "", right=("was", "is"))
    for number in numbers:
        style = "red" if number.regressed else ""
        was, now = (_quantity(value, number.unit) for value in (number.before, number.after))
        table.add_row(number.name, was, now, Text(_percent(number), style=style))
    return Padding(table, (0, 0, 0, 2))


def _layers(layers: Sequence[tuple[str, str, str]]) -> RenderableType:
    table = _table("layer", "was", "is")
    for name, then, now in layers[:ROWS]:
        table.add_row(Name(name or "(model)"), Text(then or "-"), Text(now or "-"))
    _rest(table, len(layers) - ROWS)
    return Padding(table, (0, 0, 0, 2))


def _residuals(differences: Sequence[Difference]) -> RenderableType:
    """Those whose bytes or codec changed; failing that, those which the backward reads in other ways."""
    moved = [item for item in differences if item.moved]
    last = ("MB", "more") if moved else ("read by the backward",)
    table = _table("residual of", "shape", "held as", *last, right=("MB", "more"))
    for item in (shown := (moved or differences)[:ROWS]):
        keys: list[Callable[[Held], str]] = [lambda held: held.shape, lambda held: held.codec]
        keys.append((lambda held: f"{held.held / 1e6:.2f}") if moved else (lambda held: held.uses))
        table.add_row(Name(_name(item)), *(Text(_both(item, key)) for key in keys), *([_more(item)] if moved else []))
    _rest(
        table, len(differences) - len(shown), " changed" if len(shown) == ROWS else " that the backward reads otherwise"
    )
    return Padding(table, (0, 0, 0, 2))


def _rest(table: Table, more: int, what: str = "") -> None:
    if more > 0:
        table.add_row(f"and {more} more{what}", style="dim")


def _name(item: Difference) -> str:
    held = item.after or item.before
    assert held is not None
    where = f" ({_relative(held.line)})" if held.line else ""
    return (held.layer or held.operation) + where


def _both(item: Difference, part: Callable[[Held], str]) -> str:
    """What a residual was and is, in one cell: once if it is the same."""
    then, now = (None if held is None else part(held) for held in (item.before, item.after))
    if then is None or then == now:
        return now or ""
    return f"{then} -> {'-' if now is None else now}"


def _change(item: Difference) -> str:
    """A residual's change in words."""
    if item.before is None or item.after is None:
        held = item.after or item.before
        assert held is not None
        return f"{'new' if item.after else 'gone'}, {held.shape}, {held.codec}, {format_size(held.held)} held"
    parts = [_both(item, key) for key in (lambda held: held.shape, lambda held: held.codec, lambda held: held.uses)]
    return f"{', '.join(part for part in parts if ' -> ' in part) or parts[1]}; {_more(item)}"


def _more(item: Difference) -> str:
    held, _ = item.grown
    return f"{'+' if held > 0 else ''}{format_size(held)}" if held else "same"


def _percent(number: Number) -> str:
    if not number.before:
        return "from nothing"
    return f"{100 * (number.after / number.before - 1):+.2g}%"


def _quantity(value: float, unit: str) -> str:
    if unit == "B":
        return format_size(value)
    return f"{value * 1e3:.3g} ms" if unit == "s" else f"{value:.2g}"


def _place(result: Result) -> dict[str, str]:
    """File and line to annotate: where the residual that grew most is made, else the file of the model."""
    for item in result.residuals:
        if item.after is not None and item.after.line:
            file, _, line = _relative(item.after.line).rpartition(":")
            return {"file": file, "line": line}
    return {}


def _relative(line: str) -> str:
    """`file:line` from the root of the repository that the job runs in, where it lies below it."""
    file, _, number = line.rpartition(":")
    for root in (os.environ.get("GITHUB_WORKSPACE"), Path.cwd()):
        if root and Path(file).is_relative_to(root):
            return f"{Path(file).relative_to(root).as_posix()}:{number}"
    return line


def _escaped(value: str, in_property: bool = False) -> str:
    """As a workflow command takes it."""
    for character, code in (("%", "%25"), ("\r", "%0D"), ("\n", "%0A")):
        value = value.replace(character, code)
    return value.replace(":", "%3A").replace(",", "%2C") if in_property else value
