"""What `zoo.py` knows of a method on a network, and its table: xconv's exact lowest peak, the best exact peer's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import records
from peers_report import mb, show
from rich.table import Table
from zoo_nets import ZOO
from zoo_subject import ALL_CODECS, EXACT

HEADINGS = (
    "network", "input", "Inductor", "best exact peer", "xconv exact", "ratio", "added, ratio", "predicted / audited",
    "audited / measured", "gradient", "compile",
)  # fmt: skip
# Gradients are suspect when they are further from eager's than so many times what rounding leaves eager's own off by. A
# ReLU at zero makes that more than one would think: where rounding flips a share f of them, the error is sqrt(f).
SUSPECT = 4


@dataclass
class Row:
    """One method on one network. Bytes and seconds; None is not known, `note` says why.

    `resident` are parameters, buffers and inputs, which `peak` includes. `asked` are the budgets that xconv was asked
    for, the last is the one that it trained under; `seconds` are those of the first steps, which compile, refused ones
    included. `gradient` is `GradientError` against eager, or of eager itself against float64; `graphs` what plans say.
    """

    net: str
    method: str
    peak: int | None = None
    resident: int | None = None
    asked: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    gradient: dict[str, Any] | None = None
    graphs: list[dict[str, Any]] = field(default_factory=list)
    smallest: int | None = None
    note: str = ""

    @property
    def added(self) -> int | None:
        """Bytes above parameters, buffers and inputs."""
        return None if self.peak is None else self.peak - (self.resident or 0)

    @property
    def budget(self) -> int | None:
        return self.asked[-1] if self.asked and self.peak else None

    @property
    def audited(self) -> int | None:
        """The largest audited peak of the graphs."""
        return max((graph["audited_peak"] for graph in self.graphs if graph["audited_peak"]), default=None)

    @property
    def foreseen(self) -> float | None:
        """Predicted over audited peak before any audit had corrected the prediction, the furthest off of the graphs."""
        known = [graph["foreseen"] for graph in self.graphs if graph["foreseen"]]
        return max(known, key=lambda ratio: abs(ratio - 1), default=None)


Rows = Mapping[str, Row]


def known(results: Path) -> dict[str, dict[str, Row]]:
    """The last record of each method on each network, by network in the order of the zoo, then by method."""
    names = Row.__dataclass_fields__
    found: dict[str, dict[str, Row]] = {net: {} for net in ZOO}
    for (net, method), data in records.latest(results, "net", "method").items():
        found.setdefault(net, {})[method] = Row(**{name: data[name] for name in names})
    return {net: rows for net, rows in found.items() if rows}


def best_peer(rows: Rows) -> Row | None:
    """Of all methods but xconv's, all of which are exact, the one with the lowest peak."""
    peers = [row for name, row in rows.items() if name not in (EXACT, ALL_CODECS.name) and row.peak]
    return min(peers, key=lambda row: row.peak or 0, default=None)


def table_of(found: Mapping[str, Rows]) -> Table:
    """One line a network."""
    table = Table(title="Lowest peaks with exact gradients, MB (above parameters, buffers and inputs)")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == HEADINGS[0] else "right")
    for net, rows in found.items():
        table.add_row(net, *_cells(net, rows))
    return table


def _cells(net: str, rows: Rows) -> Iterator[str]:
    inductor, eager, exact = (rows.get(name) or Row(net, name) for name in ("inductor", "eager", EXACT))
    peer = best_peer(rows) or Row(net, "")
    yield "x".join(map(str, ZOO[net].input_shape)) if net in ZOO else "-"
    yield _peak(inductor)
    yield f"{_peak(peer)} {peer.method}"
    yield _peak(exact)
    yield _over(exact.peak, peer.peak)
    yield _over(exact.added, peer.added)
    yield show(exact.foreseen, "{:.3f}".format)
    yield _over(exact.audited, exact.peak)
    yield " / ".join(show(row.gradient, lambda error: f"{error['whole']:.0e}") for row in (exact, eager))
    yield " / ".join(f"{sum(row.seconds):.0f}" if row.seconds else "-" for row in (exact, inductor)) + " s"


def _peak(row: Row) -> str:
    return f"{mb(row.peak)} ({mb(row.added or 0)})" if row.peak else "-"


def _over(mine: int | None, theirs: int | None) -> str:
    return f"{mine / theirs:.3f}" if mine and theirs else "-"


def remarks(found: Mapping[str, Rows]) -> Iterator[str]:
    """What went wrong: methods that failed, peaks over their budgets or audits, gradients that are not eager's."""
    for net, rows in found.items():
        for row in rows.values():
            if row.note:
                yield f"{net}, {row.method}: {row.note}"
            for limit, what in ((row.budget, "budget"), (row.audited, "audit")):
                if limit and row.peak and row.peak > limit:
                    yield f"{net}, {row.method}: {row.peak - limit:,} bytes over its {what}"
            if _suspect(row, rows.get("eager")):
                error = row.gradient or {}
                yield f"{net}, {row.method}: gradient off by {error['whole']:.1e}, worst {error['worst_name']}"


def _suspect(row: Row, eager: Row | None) -> bool:
    rounding = eager.gradient["whole"] if eager and eager.gradient else 0.0
    return row.gradient is not None and not row.gradient["whole"] <= max(1e-4, SUSPECT * rounding)
