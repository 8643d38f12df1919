"""Statistics of a model as people read them: one row a layer."""

from __future__ import annotations

from rich.table import Table

from xconv_fx.options.statistics import LayerStatistics, Statistics
from xconv_fx.plan.report import Name, report_table

# What of codes is shown, and the coarsest.
BITS = (4, 2, 1)


def table(found: Statistics) -> Table:
    """Norm of each layer's mean gradient; the SGD noise of a batch relative to its square; what codes of its input add
    to the SGD noise, its own for layers with a weight gradient, that of the layers before for normalisation layers."""
    shown = report_table()
    shown.add_column("layer")
    for column in ("gradient", "SGD noise", *(f"{bits} bits" for bits in BITS)):
        shown.add_column(column, justify="right", no_wrap=True)
    for name, layer in found.layers.items():
        shown.add_row(Name(name), *_cells(layer, found))
    return shown


def _cells(layer: LayerStatistics, found: Statistics) -> list[str]:
    codes = dict(next(iter(layer.layouts.values())).codes)
    if layer.travel is None:
        size, relative = f"{layer.gradient**0.5:.2g}", f"{layer.sgd / layer.gradient:.2g}" if layer.gradient else ""
        energies, noise = dict.fromkeys(BITS, layer.energy), layer.sgd
    else:
        size = relative = ""
        energies = {bits: sum(variance for _, variance in layer.reached(codes[bits])) for bits in BITS}
        noise = sum(found.layers[name].sgd for name, _ in layer.reaches if name in found.layers)
    return [size, relative, *(f"{codes[bits] * energies[bits] / noise:.2g}" if noise > 0 else "" for bits in BITS)]
