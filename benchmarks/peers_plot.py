"""Draws what `peers.py` measured: peak against step time, and peak against the error of the gradients.

A row of panels a network. Peaks are relative to Inductor's, so are step times. Methods with a knob are joined by a
line, in the order of their peaks; what lies lower and further left is better.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers_report import NetReport, Row

# Family: colour, marker, whether its rows are settings of one knob.
STYLES = {
    "eager": ("0.5", "s", False),
    "inductor": ("black", "o", False),
    "torch budget": ("tab:blue", "v", True),
    "checkpoint": ("tab:green", "D", False),
    "fp8": ("tab:purple", "P", False),
    "xconv": ("tab:red", "o", True),
}
EXACT = ("xconv, exact codecs", "tab:orange", "*")
# Errors of exact methods are rounding; they are drawn at this floor at least, so that the axis shows the others.
ROUNDING = 1e-6


def draw(reports: Sequence[NetReport], path: Path) -> None:
    """Write a PNG of all these networks."""
    # Not a dependency of the package: the tables need none.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(reports), 2, figsize=(11, 3.6 * len(reports)), squeeze=False)
    for report, (time, error) in zip(reports, panels, strict=True):
        _panel(time, report, "time")
        _panel(error, report, "error")
    # No network need have all the methods.
    lines = {line.get_label(): line for axes in panels.flat for line in axes.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.45 / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _panel(axes: Any, report: NetReport, what: str) -> None:
    base = report.rows["inductor"].peak
    if base:
        for family, (colour, marker, joined) in STYLES.items():
            rows = [row for row in report.rows.values() if row.method.family == family]
            plain = [row for row in rows if row.method.codecs == "all"]
            _points(axes, plain, base, what, family, colour, marker, joined)
            _points(axes, [row for row in rows if row not in plain], base, what, *EXACT, joined=False)
    axes.set(title=report.net, xlabel="physical peak, relative to Inductor")
    axes.set_ylabel("step time, relative to Inductor" if what == "time" else "gradient error (one draw)")
    if what == "error":
        axes.set_yscale("log")
    axes.grid(alpha=0.3)


def _points(
    axes: Any, rows: list[Row], base: int, what: str, label: str, colour: str, marker: str, joined: bool
) -> None:
    points = sorted((row.peak / base, value) for row in rows if row.peak and (value := _value(row, what)))
    if points:
        line = "-" if joined else "none"
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=line, label=label, alpha=0.8)


def _value(row: Row, what: str) -> float | None:
    if what == "time":
        return row.slowdown
    return max(ROUNDING, row.gradient.one) if row.gradient else None
