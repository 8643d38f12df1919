"""Statistics of a model as people read them: one row a layer."""

from __future__ import annotations

from rich.table import Table

from xconv_fx.report import Name, report_table
from xconv_fx.statistics import LayerStatistics, Statistics

# What of codes is shown, and the coarsest.
BITS = (4, 2, 1)


def table(found: Statistics) -> Table:
    """For layers with weights: the norm of the mean gradient, the SGD noise of a batch relative to it, and what the
    codes of the input add to the SGD noise; for normalisation layers, how much of an error travels on."""
    shown = report_table()
    shown.add_column("layer")
    for column in ("gradient", "SGD noise", *(f"{bits} bits" for bits in BITS), "travels"):
        shown.add_column(column, justify="right", no_wrap=True)
    for name, layer in found.layers.items():
        shown.add_row(Name(name), *_cells(layer))
    return shown


def _cells(layer: LayerStatistics) -> list[str]:
    if layer.travel is not None:
        return [""] * (2 + len(BITS)) + [f"{layer.travel:.2g}"]
    codes = dict(next(iter(layer.layouts.values())).codes)
    noise = [f"{codes[bits] * layer.energy / layer.sgd:.2g}" if layer.sgd > 0 else "" for bits in BITS]
    relative = f"{layer.sgd / layer.gradient:.2g}" if layer.gradient > 0 else ""
    return [f"{layer.gradient**0.5:.2g}", relative, *noise, ""]
