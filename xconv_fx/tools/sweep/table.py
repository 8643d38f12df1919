"""A frontier on a terminal: peak against time and against noise, and a table of the points."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from xconv_fx.options.codecs import CODECS
from xconv_fx.plan.report import CODEC_STYLES, duration, report_table
from xconv_fx.units import format_size

from .frontier import Frontier, Point
from .plot import Plot

# On narrower lines the plots are one below the other, and the columns of the codecs are left out.
WIDE = 84
PLOTS_BESIDE = 72
# Of a table of points, here and on the page.
COLUMNS = ("budget", "peak", "time", "noise", "slices")


@dataclass(frozen=True)
class FrontierReport:
    """Two plots and a table; rich decides on width, colour and characters."""

    frontier: Frontier

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        points = self.frontier.points
        yield from _plots(points, options.max_width)
        yield _table(points, options.max_width)
        plain = points[-1].seconds
        yield Text(f" Times are in addition to {duration(plain)}, the predicted time of a plain step.", style="dim")
        if any(len(point.plans) > 1 for point in points):
            yield Text(f" {len(points[-1].plans)} graphs: peaks are the highest, other numbers are sums.", style="dim")
        for reason in self.frontier.left_out:
            yield Text(f" left out: {reason}", style="dim")


def percent(fraction: float) -> str:
    """A slowdown, such as "+12%"."""
    return "0" if abs(fraction) < 5e-4 else f"{100 * fraction:+.{1 if abs(fraction) < 0.0995 else 0}f}%"


def noise_text(noise: float) -> str:
    """Noise in two digits; exact plans have none."""
    return f"{noise:.2g}" if noise else "exact"


def cells_of(point: Point) -> tuple[str, ...]:
    """What a table says of a point in `COLUMNS`."""
    budget = "none" if point.budget is None else format_size(point.budget)
    return budget, format_size(point.peak), percent(point.slowdown), noise_text(point.noise), str(point.slices)


def log_noise(points: Sequence[Point]) -> list[float]:
    """Decades of noise, for an axis; exact points are one decade below the quietest of the others."""
    positive = [math.log10(point.noise) for point in points if point.noise > 0]
    floor = min(positive, default=0.0) - 1
    return [math.log10(point.noise) if point.noise > 0 else floor for point in points]


def _plots(points: Sequence[Point], width: int) -> Iterator[RenderableType]:
    peaks = [float(point.peak) for point in points]
    ends = format_size(min(peaks)), format_size(max(peaks))
    slow, noisy = [point.slowdown for point in points], max(point.noise for point in points)
    quiet = noise_text(min(point.noise for point in points))
    plots = [
        Plot("extra time of a step, by peak", list(zip(peaks, slow, strict=True)), ends,
             (percent(min(slow)), percent(max(slow)))),
        Plot("noise of the gradients, by peak", list(zip(peaks, log_noise(points), strict=True)), ends,
             (quiet, noise_text(noisy)), style="magenta"),
    ]  # fmt: skip
    if width < PLOTS_BESIDE:
        yield from plots
        return
    beside = Table.grid(expand=True, padding=(0, 2))
    beside.add_column(ratio=1)
    beside.add_column(ratio=1)
    beside.add_row(*plots)
    yield beside


def _table(points: Sequence[Point], width: int) -> Table:
    codecs = [name for name in CODECS if any(name in point.codecs() for point in points)] if width >= WIDE else []
    table = report_table()
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for codec in codecs:
        table.add_column(codec, justify="right", no_wrap=True, style=CODEC_STYLES.get(codec, ""))
    for point in points:
        table.add_row(*cells_of(point), *_shares(point, codecs))
    return table


def _shares(point: Point, codecs: Sequence[str]) -> list[str]:
    """What share of the residuals' bytes each codec stands for."""
    sizes = point.codecs()
    every = sum(sizes.values()) or 1
    return [f"{sizes[codec] / every:.0%}" if codec in sizes else "" for codec in codecs]
