"""What a test of the self-test comes to, and the report of all: JSON for a file, a table for a terminal."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from xconv_fx.plan.report import report_table

FORMAT = 1
# Nothing is off; something is; it did not run, because the device has not what it takes, or time was up.
OK, OFF, LEFT_OUT = "ok", "off", "left out"
STYLES = {OK: "green", OFF: "bold red", LEFT_OUT: "yellow"}


@dataclass(frozen=True)
class Finding:
    """What a test found: `off` is what is wrong, "" where nothing is, `left_out` why it did not run.

    `numbers` are what it measured: bytes, seconds, or shares, as their names say.
    """

    off: str = ""
    left_out: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> str:
        return OFF if self.off else LEFT_OUT if self.left_out else OK


@dataclass(frozen=True)
class Result:
    """A test by its name, "group/name", what it found and how long it took."""

    name: str
    finding: Finding
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """All tests on one `device`. Renders itself with rich."""

    device: str
    versions: Mapping[str, Any]
    results: tuple[Result, ...]
    seconds: float

    @property
    def off(self) -> tuple[str, ...]:
        """Names of the tests that found something wrong."""
        return tuple(result.name for result in self.results if result.finding.off)

    def to_json(self) -> str:
        """The report as it is sent."""
        rows = [
            {
                "name": result.name,
                "status": result.finding.status,
                "seconds": round(result.seconds, 3),
                **{key: value for key, value in dataclasses.asdict(result.finding).items() if value},
            }
            for result in self.results
        ]
        data = {"format": FORMAT, "device": self.device, "versions": dict(self.versions), "off": list(self.off)}
        return json.dumps({**data, "seconds": round(self.seconds, 1), "results": rows}, indent=1) + "\n"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = report_table()
        table.add_column("test", no_wrap=True)
        table.add_column("", no_wrap=True)
        table.add_column("s", justify="right", no_wrap=True)
        table.add_column("measured", overflow="fold")
        for result in self.results:
            found = result.finding
            status = Text(found.status, style=STYLES[found.status])
            table.add_row(result.name, status, f"{result.seconds:.1f}", Text("; ".join(_said(found))))
        yield table
        counts = {status: sum(r.finding.status == status for r in self.results) for status in STYLES}
        yield Text(f" {self.device}  " + ", ".join(f"{count} {status}" for status, count in counts.items()))


def _said(found: Finding) -> Iterator[str]:
    yield from filter(None, (found.off, found.left_out))
    for name, value in found.numbers.items():
        yield f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
