"""What became of a model's layers when it was converted, or a graph's operations when they were substituted."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from xconv_fx.plan import Plan
from xconv_fx.plan.report import Name, report_table


@dataclass(frozen=True)
class Row:
    """A layer by name and type; what it `holds` now ("" if it was left alone), or why it was left alone."""

    layer: str
    type: str
    holds: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Conversion:
    """The layers that could hold less, in the model's order, and notes on what was asked for and cannot be had.

    `plans` are those that were followed, if any. Renders itself with rich.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    plans: tuple[Plan, ...] = ()

    @property
    def converted(self) -> dict[str, str]:
        """What each converted layer holds, by name."""
        return {row.layer: row.holds for row in self.rows if row.holds}

    @property
    def left(self) -> dict[str, str]:
        """Why each other layer was left alone, by name."""
        return {row.layer: row.reason for row in self.rows if not row.holds}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = report_table()
        table.add_column("layer")
        table.add_column("type", no_wrap=True)
        table.add_column("holds")
        for row in self.rows:
            held = Text(row.holds, style="magenta") if row.holds else Text(f"as before: {row.reason}", style="dim")
            table.add_row(Name(row.layer or "(the model)"), row.type, held)
        if self.rows:
            yield table
        yield Text(f" {len(self.converted)} converted, {len(self.left)} left as they were")
        yield from (Text(f" note: {note}") for note in self.notes)
