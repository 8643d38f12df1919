"""README's table of `peers.py`."""

from __future__ import annotations

from pathlib import Path

from nets import PEER_NETS
from peers_report import NetReport, Row, mb, newest, show, summarise

# By network, the first column.
NAMES = {
    "resnet": "transformers' ResNet, batch norm",
    "vgg": "VGG, no normalisation",
    "plain_unet2d": "nnU-Net's PlainConvUNet 2D",
    "plain_unet3d": "the same, 3D",
    "unet3d": "MONAI's 3D U-Net",
    "convnext": "transformers' ConvNeXt",
}
HEADINGS = (
    "network, input", "Inductor", "best exact peer", "xconv, exact, lowest", "xconv, lowest",
    "step time at the peer's peak, over the peer's",
    "at 65% of Inductor: step time over Inductor's, gradient error",
)  # fmt: skip


def readme(results: Path) -> str | None:
    """The table; None before all networks are known."""
    reports = newest(results)
    if len(reports) < len(PEER_NETS):
        return None
    heading, *rows = (f"| {' | '.join(cells)} |" for cells in (HEADINGS, *map(_row, reports)))
    return "\n".join((heading, "|---" * len(HEADINGS) + "|", *rows))


def _row(report: NetReport) -> tuple[str, ...]:
    summary = summarise(report)
    peer, figures = summary.peer, summary.figures

    def figure(name: str, form: str = "{:.2f}") -> str:
        return show(figures[name], form.format)

    def peak(row: Row | None) -> str:
        return show(row and row.peak, mb)

    return (
        f"{NAMES[report.net]}, {'x'.join(map(str, report.shape))}",
        peak(report.rows["inductor"]),
        f"{peak(peer)} ({report.best_peer})",
        f"{peak(summary.exact)} ({figure('exact')})",
        f"{peak(summary.lowest)} ({figure('lowest')})",
        figure("time at peer"),
        f"{figure('time at 65%')}, {figure('error at 65%', '{:.1e}')}",
    )
