"""A plan as people read it: a table of residuals, what they add up to, and what that buys.

`PlanReport` is a rich renderable, so a console decides width, colour (none under `NO_COLOR`) and whether the terminal
can show more than ASCII. Nothing here computes: every number is the plan's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from xconv_fx.units import format_size

from . import Choice, Plan

CODEC_STYLES = {"keep": "dim", "recompute": "cyan", "bitmask": "cyan", "quantize": "yellow",
                "fixed": "yellow", "probe": "magenta"}  # fmt: skip
COLUMNS = ("layer", "residual", "shape", "codec", "r", "bits", "MB", "held", "noise")
NUMERIC = frozenset({"r", "bits", "MB", "held", "noise"})
# Layers that are named as the noisiest.
NOISIEST = 3
CROPPED = frozenset({"layer", "residual"})
# Columns to leave out on lines shorter than so many characters, so that the layer's name stays readable.
NEEDS_WIDTH = {"residual": 100, "shape": 72}


@dataclass(frozen=True)
class Name:
    """A dotted name that loses its middle when it does not fit: both ends of a layer's path tell it apart."""

    text: str

    def cropped(self, width: int, ellipsis: str = "…") -> str:
        """`text` in at most `width` characters."""
        if len(self.text) <= width:
            return self.text
        room = max(0, width - len(ellipsis))
        # The tail is the longer part: in "encoder.stages.3.blocks.1.conv2" it is what differs from row to row.
        head = room // 3
        return (self.text[:head] + ellipsis + self.text[len(self.text) - (room - head) :])[:width]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.cropped(options.max_width, "~" if options.ascii_only else "…"), no_wrap=True)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, max(1, len(self.text)))


@dataclass(frozen=True)
class PlanReport:
    """A plan with its residuals sorted by size, largest first; `limit` cuts the table after so many rows."""

    plan: Plan
    limit: int | None = None
    title: str | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.title:
            yield Text(self.title, style="bold")
        if self.plan.choices:
            yield self._table(options)
        yield self._facts()

    def _table(self, options: ConsoleOptions) -> Table:
        ranked = sorted(self.plan.choices, key=lambda choice: -choice.bytes_before)
        shown = ranked if self.limit is None else ranked[: max(0, self.limit)]
        columns = [name for name in _columns(ranked) if options.max_width >= NEEDS_WIDTH.get(name, 0)]
        table = report_table()
        for column in columns:
            justify = "right" if column in NUMERIC else "left"
            table.add_column(column, justify=justify, no_wrap=column not in CROPPED)  # type: ignore[arg-type]
        for choice in shown:
            cells = _cells(choice)
            table.add_row(*(cells[column] for column in columns))
        if rest := ranked[len(shown) :]:
            ellipsis = "..." if options.ascii_only else "…"
            table.add_row(*_sum_row(f"{ellipsis} and {len(rest)} more", rest, columns), style="dim")
        table.add_section()
        table.add_row(*_sum_row(f"all {len(ranked)}", ranked, columns), style="bold")
        return table

    def _facts(self) -> Padding:
        facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
        facts.add_column(style="bold", no_wrap=True)
        facts.add_column(overflow="fold")
        for label, fact in _facts(self.plan):
            facts.add_row(label, Text(fact))
        return Padding(facts, (0, 0, 0, 1))


def _columns(choices: Sequence[Choice]) -> list[str]:
    """The columns that say something: a plan without probes has no column for their number."""
    used = {
        "r": any(choice.probes is not None for choice in choices),
        "bits": any(choice.bits is not None for choice in choices),
        "noise": any(choice.noise for choice in choices),
    }
    return [column for column in COLUMNS if used.get(column, True)]


def _cells(choice: Choice) -> dict[str, Text | Name | str]:
    return {
        "layer": Name(choice.layer or choice.residual),
        "residual": Name(choice.residual),
        "shape": "x".join(map(str, choice.shape)) or "scalar",
        "codec": Text(codec_name(choice), style=CODEC_STYLES.get(choice.codec, "")),
        "r": "" if choice.probes is None else str(choice.probes),
        "bits": "" if choice.bits is None else str(choice.bits),
        "MB": _megabytes(choice.bytes_before),
        "held": _megabytes(choice.bytes_after),
        "noise": f"{choice.noise:.2g}" if choice.noise else "",
    }


def codec_name(choice: Choice) -> str:
    """The codec as the `codecs` option writes it, and what is recomputed of a whole block as "recompute:block".

    "fold" is what every probe is unless it says otherwise.
    """
    return choice.codec if choice.kind in (None, "fold") else f"{choice.codec}:{choice.kind}"


def _sum_row(label: str, choices: Sequence[Choice], columns: Sequence[str]) -> list[Name | str]:
    sums: dict[str, Name | str] = {
        "layer": Name(label),
        "MB": _megabytes(sum(choice.bytes_before for choice in choices)),
        "held": _megabytes(sum(choice.bytes_after for choice in choices)),
    }
    return [sums.get(column, "") for column in columns]


def _facts(plan: Plan) -> Iterator[tuple[str, str]]:
    if plan.calls > 1:
        yield "calls", f"{plan.calls} in a step before the backward, the table is of one"
    if plan.slices > 1:
        again = plan.slices - plan.held_slices
        yield "slices", f"{plan.slices} of the batch, the table is of one; {again} of them run their forward twice"
    if plan.saved_share < 1:
        yield "saved", f"at most {plan.saved_share:.0%} of all residuals; PyTorch's partitioner recomputes the rest"
    saved = f"{format_size(plan.saved_after)} between forward and backward instead of {format_size(plan.saved_before)}"
    yield "held", f"{saved}{_times_less(plan.saved_before, plan.saved_after)}" if plan.choices else "nothing"
    predicted = f"{format_size(plan.predicted_peak)} predicted"
    audited = "" if plan.audited_peak is None else f"{format_size(plan.audited_peak)} in the compiled code, "
    baseline = f"Inductor alone {format_size(plan.baseline_peak)}{_times_less(plan.baseline_peak, plan.peak)}"
    yield "peak", f"{audited}{predicted}; {baseline}"
    if plan.measured_peak is not None:
        over = plan.measured_peak - (plan.budget or plan.measured_peak)
        exceeds = f", over the budget by {format_size(over)}" if over > 0 else ""
        yield "measured", f"{format_size(plan.measured_peak)} in a training step{exceeds}"
    if plan.budget is not None:
        spare = plan.budget - plan.peak
        verdict = f"fits, {format_size(spare)} to spare" if spare >= 0 else f"missed by {format_size(-spare)}"
        yield "budget", f"{format_size(plan.budget)}: {verdict}"
    if plan.gpu is not None:
        spare = plan.gpu_memory - plan.peak
        verdict = f"leaves {format_size(spare)} free" if spare >= 0 else f"exceeds it by {format_size(-spare)}"
        yield "gpu", f"{plan.gpu} of {format_size(plan.gpu_memory)}: the peak {verdict}"
    if plan.peak_at:
        yield "peak at", plan.peak_at
    yield "fixed", f"{format_size(plan.fixed_bytes)} on {plan.device} whatever the plan"
    if plan.optimizer is not None:
        yield "optimizer", f"{format_size(plan.optimizer_bytes)} of that is the state of {plan.optimizer}"
    yield "time", f"{duration(plan.time)} more a step, predicted with {_rates(plan)} rates"
    if plan.noise:
        yield "noise", _noise(plan)
    yield "search", f"{_attempts(plan.attempts)}, {_gap(plan.gap)}"
    for note in plan.notes:
        yield "note", note


def _noise(plan: Plan) -> str:
    """What is added to the gradients, and relative to what: their SGD noise, or by the prior their energy."""
    ranked = sorted(plan.layers, key=lambda row: -row[1])[:NOISIEST]
    most = ", ".join(f"{name} {noise:.2g}" for name, noise in ranked if noise)
    yardstick = "the SGD noise, by stats" if plan.measured else "the gradients' energy, by a prior (no stats)"
    return f"{plan.noise:.2g} of {yardstick}" + (f"; most in {most}" if most else "")


def _rates(plan: Plan) -> str:
    """Whose rates the times were predicted with."""
    if plan.gpu is not None:
        return f"the data sheet's ({plan.gpu})"
    return "calibrated" if plan.calibrated else "generic"


def _times_less(before: int, after: int) -> str:
    return f" ({before / after:.1f}x less)" if 0 < after < before else ""


def _attempts(attempts: int) -> str:
    return f"{attempts} attempt" + ("" if attempts == 1 else "s")


def _gap(gap: float) -> str:
    return f"{100 * gap:.2g}% above the solver's lower bound" if gap > 0 else "at the solver's lower bound"


def report_table() -> Table:
    """An empty table in the style of all reports: a line under the headings, and no frame."""
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")


def duration(seconds: float) -> str:
    """Seconds as people read them, in three digits at most."""
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def _megabytes(size: int) -> str:
    """Megabytes in a column: two decimals for small residuals, none for large ones."""
    if size < 5000:
        return "<0.01" if size else "0"
    return f"{size / 1e6:.{2 if size < 10e6 else 1 if size < 1e9 else 0}f}"


def render(plan: Plan, limit: int | None = None, title: str | None = None) -> PlanReport:
    """What to hand to `rich.print` to show `plan`, with at most `limit` residuals."""
    return PlanReport(plan, limit, title)


def as_text(plan: Plan, width: int = 100, limit: int | None = None) -> str:
    """The report as plain text without colour, for logs; lines of at most `width` characters, no trailing spaces."""
    file = StringIO()
    # Neither the environment (FORCE_COLOR) nor a notebook may turn a log message into something else than text.
    console = Console(file=file, width=width, color_system=None, force_jupyter=False, legacy_windows=False, _environ={})
    console.print(PlanReport(plan, limit))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()).strip("\n")


def write_json(plans: Iterable[Plan], path: str | Path) -> None:
    """Write `plans`, one a compiled graph, to `path` as a JSON array of `Plan.to_json` objects."""
    Path(path).write_text(to_json(plans))


def to_json(plans: Iterable[Plan]) -> str:
    """A JSON array of plans, keys sorted: equal plans give equal text."""
    return json.dumps([json.loads(plan.to_json()) for plan in plans], indent=2, sort_keys=True) + "\n"


def read_json(path: str | Path) -> tuple[Plan, ...]:
    """The plans that `write_json` wrote. Raises `ValueError` on anything else."""
    data = json.loads(Path(path).read_text())
    if not isinstance(data, list):
        raise ValueError(f"{path}: not a JSON array of plans")
    return tuple(Plan.from_json(json.dumps(item)) for item in data)
