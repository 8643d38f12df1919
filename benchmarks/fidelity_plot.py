"""Draws what the fidelity study found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fidelity_report import WITHIN, Record, Row, rows_of
from fidelity_tasks import STUDIES

# Family of methods: colour and marker.
STYLES = {
    "exact": ("black", "o"),
    "xconv-": ("tab:red", "o"),
    "actnn": ("tab:blue", "v"),
    "xconv": ("tab:green", "D"),
    "fixed": ("tab:purple", "P"),
    "bf16-exact": ("0.5", "s"),
    "bf16-xconv": ("tab:orange", "s"),
}


def draw(records: Sequence[Record], path: Path) -> None:
    """Write a PNG: score against peak, a panel a task. Grey is within two standard deviations of exact training."""
    # Not a dependency of the package: the tables need none.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = [task for task in STUDIES if any(record.task == task and record.run for record in records)]
    columns = min(3, len(tasks))
    figure, panels = pyplot.subplots(
        math.ceil(len(tasks) / columns), columns, figsize=(4.4 * columns, 3.6 * math.ceil(len(tasks) / columns) + 0.6),
        squeeze=False,
    )  # fmt: skip
    for axes in panels.flat[len(tasks) :]:
        axes.remove()
    for task, axes in zip(tasks, panels.flat, strict=False):
        _panel(axes, task, rows_of(records, task))
    lines = {line.get_label(): line for axes in panels.flat for line in axes.containers}
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncols=6, frameon=False, fontsize="small")
    figure.tight_layout(rect=(0, 0.6 / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _panel(axes: Any, task: str, rows: dict[str, Row]) -> None:
    exact = rows.get("exact")
    base = exact.mean(lambda run: run.peak) if exact else None
    if exact and exact.runs and exact.spread:
        low, high = (exact.score + sign * WITHIN * exact.spread for sign in (-1, 1))
        axes.axhspan(low, high, color="0.9", zorder=0)
    for row in rows.values():
        peak = row.mean(lambda run: run.peak)
        if peak is not None and not math.isnan(row.score):
            colour, marker = _style(row.method)
            x = peak / base if base else peak / 1e6
            error = row.spread or 0.0
            axes.errorbar(
                x, row.score, error, color=colour, marker=marker, linestyle="none", capsize=2, label=row.method
            )
    axes.set(title=task, ylabel=STUDIES[task].score, xlabel="peak, relative to Inductor" if base else "peak, MB")
    axes.grid(alpha=0.3)


def _style(method: str) -> tuple[str, str]:
    return next((style for start, style in STYLES.items() if method.startswith(start)), ("tab:brown", "x"))
