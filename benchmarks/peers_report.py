"""What `peers.py` knows about a method and about a network, its records, and the tables that it makes of them.

The summary sets xconv against the best exact peer: of all exact methods but xconv, the one with the lowest peak.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness import records
from harness.gradients import GradientError
from nets import PEER_NETS
from peers_methods import AT_PEER, Method
from peers_subject import GradientNoise
from rich.table import Table

HEADINGS = ("method", "budget", "peak", "added", "OS", "time", "error", "bias", "compile", "/ Inductor", "note")
# xconv's aims: lowest peak and exact lowest peak over the best exact peer's, step time at that peer's peak over the
# peer's, and at 65% of Inductor's peak the step time over Inductor's and the error of the gradients.
TARGETS = {"lowest": 0.55, "exact": 1.0, "time at peer": 1.0, "time at 65%": 1.12, "error at 65%": 0.05}


@dataclass
class Row:
    """What is known about one method on one network. Sizes in bytes, times in seconds; None is not known.

    `slowdown` and `peer_slowdown` are step times over Inductor's and over the best exact peer's, in the same rounds.
    """

    method: Method
    budget: int | None = None
    peak: int | None = None
    resident: int | None = None
    os_peak: int | None = None
    seconds: float | None = None
    slowdown: float | None = None
    peer_slowdown: float | None = None
    compile_seconds: float | None = None
    compile_ratio: float | None = None
    gradient: GradientNoise | None = None
    predictions: dict[str, Any] | None = None
    smallest: int | None = None
    note: str = ""

    @property
    def over(self) -> int:
        """Bytes by which the peak exceeds the budget."""
        return max(0, self.peak - self.budget) if self.peak and self.budget else 0

    @staticmethod
    def from_record(data: Mapping[str, Any]) -> Row:
        gradient = data["gradient"]
        if gradient is not None:
            gradient = GradientNoise(**{**gradient, "first": GradientError(**gradient["first"])})
        return Row(**{**data, "method": Method(**data["method"]), "gradient": gradient})


@dataclass
class NetReport:
    """All rows of one network; `best_peer` names the method with the lowest peak among exact ones other than xconv."""

    net: str
    shape: tuple[int, ...]
    rows: dict[str, Row] = field(default_factory=dict)
    best_peer: str | None = None

    def to_record(self) -> dict[str, Any]:
        """With the figures of the summary."""
        return {**asdict(self), "figures": summarise(self).figures}

    @staticmethod
    def from_record(data: Mapping[str, Any]) -> NetReport:
        """Inverse of `to_record`."""
        rows = {name: Row.from_record(row) for name, row in data["rows"].items()}
        return NetReport(data["net"], tuple(data["shape"]), rows, data["best_peer"])


@dataclass(frozen=True)
class Summary:
    """What one network says about xconv's aims: best exact peer, and the figures that `TARGETS` bounds by their key."""

    net: str
    peer: Row | None
    lowest: Row | None
    exact: Row | None
    figures: dict[str, float | None]


# What a summary needs besides a peer.
SHOWN = {"inductor", "xconv65", "xconv-lowest", "xconv-exact", AT_PEER.name}


def summarise(report: NetReport) -> Summary:
    rows = report.rows
    peer = rows.get(report.best_peer or "")
    lowest, exact, at_65 = (rows.get(name) for name in ("xconv-lowest", "xconv-exact", "xconv65"))

    def over_peer(row: Row | None) -> float | None:
        return row.peak / peer.peak if row and row.peak and peer and peer.peak else None

    at_peer = rows.get(AT_PEER.name)
    figures = {
        "lowest": over_peer(lowest),
        "exact": over_peer(exact),
        "time at peer": at_peer.peer_slowdown if at_peer else None,
        "time at 65%": at_65.slowdown if at_65 else None,
        "error at 65%": at_65.gradient.one if at_65 and at_65.gradient else None,
    }
    return Summary(report.net, peer, lowest, exact, figures)


def table_of(report: NetReport) -> Table:
    shape = "x".join(map(str, report.shape))
    table = Table(title=f"{report.net}, {shape}: best exact peer {report.best_peer}", title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in ("method", "note") else "right", overflow="fold")
    for row in report.rows.values():
        gradient, added = row.gradient, None if row.peak is None else row.peak - (row.resident or 0)
        note = row.note if row.smallest is None else f"infeasible, smallest {mb(row.smallest)} MB"
        if row.over:
            note = f"{row.over:,} B OVER BUDGET {note}".strip()
        table.add_row(
            row.method.name,
            show(row.budget if row.budget != 1 else None, mb),
            show(row.peak, mb),
            show(added, mb),
            show(row.os_peak, mb),
            show(row.slowdown, "{:.3f}".format),
            show(gradient and gradient.one, "{:.1e}".format),
            show(gradient and gradient.bias, "{:.2f}".format),
            show(row.compile_seconds, "{:.0f} s".format),
            show(row.compile_ratio, "{:.2f}".format),
            note,
        )
    return table


def summary_table(summaries: list[Summary]) -> Table:
    table = Table(title="xconv against the best exact peer, MB; targets in brackets", title_justify="left")
    table.add_column("network")
    table.add_column("best exact peer")
    for name, head in (("lowest", "xconv lowest"), ("exact", "xconv exact lowest")):
        table.add_column(f"{head} (<= {TARGETS[name]:.2f})", justify="right")
    table.add_column(f"step time at the peer's peak (<= {TARGETS['time at peer']:.2f})", justify="right")
    table.add_column(f"step time at 65% of Inductor (<= {TARGETS['time at 65%']:.2f})", justify="right")
    table.add_column(f"gradient error at 65% (<= {TARGETS['error at 65%']:.2f})", justify="right")
    for summary in summaries:
        peer = summary.peer
        table.add_row(
            summary.net,
            "-" if peer is None else f"{peer.method.name} {show(peer.peak, mb)}",
            f"{show(summary.lowest and summary.lowest.peak, mb)}: {_judge(summary, 'lowest')}",
            f"{show(summary.exact and summary.exact.peak, mb)}: {_judge(summary, 'exact')}",
            *(_judge(summary, name) for name in ("time at peer", "time at 65%", "error at 65%")),
        )
    return table


def predictions_table(reports: list[NetReport]) -> Table:
    """How far xconv's predictions were off, over all its rows of a network.

    Peaks: predicted before anything was generated over audited in the code, and audited over measured. Time: predicted
    over measured step time, as the factor between the two whichever is larger, in the mean over the rows.
    """
    table = Table(title="xconv's predictions: smallest and largest ratio over its rows", title_justify="left")
    table.add_column("network")
    for heading in ("rows", "predicted / audited peak", "audited / measured peak", "step time, mean factor"):
        table.add_column(heading, justify="right")
    for report in reports:
        rows = [row for row in report.rows.values() if row.predictions and row.peak]
        plain = report.rows["inductor"].seconds
        foreseen = [row.predictions["foreseen"] for row in rows if row.predictions]
        audited = [row.predictions["audited_peak"] / row.peak for row in rows if row.predictions and row.peak]
        factors = [
            max(ratio, 1 / ratio)
            for row in rows
            if row.predictions and row.slowdown and plain
            for ratio in [(1 + row.predictions["time"] / plain) / row.slowdown]
        ]
        mean = sum(factors) / len(factors) if factors else None
        table.add_row(report.net, str(len(rows)), _range(foreseen), _range(audited), show(mean, "{:.2f}".format))
    return table


def _range(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{min(known):.3f} to {max(known):.3f}" if known else "-"


def _judge(summary: Summary, name: str) -> str:
    value = summary.figures[name]
    if value is None:
        return "-"
    return f"[{'green' if value <= TARGETS[name] else 'red'}]{value:.3f}[/]{'' if value <= TARGETS[name] else ' NO'}"


def mb(size: int) -> str:
    return f"{size / 1e6:.1f}"


def show(value: Any, form: Callable[[Any], str]) -> str:
    return "-" if value is None else form(value)


def newest(results: Path) -> list[NetReport]:
    """What is known of each network at full size, in the order of `PEER_NETS`.

    Of records that have an exact peer and all methods that the summary shows; which peers there were they say.
    """
    found = (data for data in records.read(results) if not data["options"]["tiny"])
    whole = {data["net"]: data for data in found if data["best_peer"] and data["rows"].keys() >= SHOWN}
    return [NetReport.from_record(whole[net]) for net in PEER_NETS if net in whole]


def within_budgets(reports: Sequence[NetReport]) -> str:
    """How many measurements of xconv there are, and which exceeded their budgets."""
    rows = [(report.net, row) for report in reports for row in report.rows.values() if row.budget and row.peak]
    over = [f"{net} {row.method.name} by {row.over / (row.budget or 1):.2%}" for net, row in rows if row.over]
    return f"{len(rows)} measurements of xconv, {len(over)} over their budgets{': ' * bool(over)}{', '.join(over)}"
