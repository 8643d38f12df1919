"""A line on a terminal, drawn with Braille dots, or with asterisks where a terminal can show no more than ASCII.

Small, because rich draws everything else here: the console decides on width, colour and characters as it does for
tables. Of the libraries that plot on terminals none draws in ASCII alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

# Bits of the dots of a Braille character, by row and column.
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
BRAILLE = 0x2800
NARROWEST = 24


@dataclass(frozen=True)
class Plot:
    """Points joined by a line, in the order given. `x_ticks` and `y_ticks` are texts for the ends of the axes."""

    title: str
    points: Sequence[tuple[float, float]]
    x_ticks: tuple[str, str]
    y_ticks: tuple[str, str]
    height: int = 8
    style: str = "cyan"

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(NARROWEST, options.max_width), options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        margin = max(map(len, self.y_ticks)) + 1
        width = max(1, options.max_width - margin - 2)
        vertical, corner, horizontal = ("|", "+", "-") if options.ascii_only else ("│", "└", "─")
        yield Text(self.title, style="bold", no_wrap=True, overflow="ellipsis")
        labels = {0: self.y_ticks[1], self.height - 1: self.y_ticks[0]}
        for number, line in enumerate(self._lines(width, options.ascii_only)):
            label = Text(f"{labels.get(number, ''):>{margin - 1}} {vertical}", no_wrap=True)
            yield label.append(line, style=self.style)
        yield Text(" " * margin + corner + horizontal * width, no_wrap=True)
        low, high = self.x_ticks
        yield Text(" " * (margin + 1) + low + high.rjust(max(0, width - len(low))), no_wrap=True)

    def _lines(self, width: int, ascii_only: bool) -> Iterator[str]:
        """The rows of characters, from the top."""
        across, down = (1, 1) if ascii_only else (2, 4)
        dots = set(self._dots(width * across, self.height * down))
        for row in range(self.height):
            if ascii_only:
                yield "".join("*" if (column, row) in dots else " " for column in range(width))
            else:
                yield "".join(_braille(dots, column * 2, row * 4) for column in range(width))

    def _dots(self, width: int, height: int) -> Iterator[tuple[int, int]]:
        """Columns and rows of the dots, counted from the top left."""
        places = [
            (round(x * (width - 1)), round((1 - y) * (height - 1)))
            for x, y in zip(*(_scaled(axis) for axis in zip(*self.points, strict=True)), strict=True)
        ]
        for (x0, y0), (x1, y1) in zip(places, places[1:] or places, strict=False):
            steps = max(abs(x1 - x0), abs(y1 - y0), 1)
            for step in range(steps + 1):
                yield round(x0 + (x1 - x0) * step / steps), round(y0 + (y1 - y0) * step / steps)


def _scaled(values: Sequence[float]) -> list[float]:
    """Into 0 to 1; values that are all the same into 0."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


def _braille(dots: set[tuple[int, int]], left: int, top: int) -> str:
    bits = sum(DOTS[y][x] for y in range(4) for x in range(2) if (left + x, top + y) in dots)
    return chr(BRAILLE + bits) if bits else " "
