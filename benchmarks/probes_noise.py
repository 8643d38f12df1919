"""The first table of probes.py: the error of weight gradients at equal bytes."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import torch
from harness.bias import errors_of, verdict
from harness.codes import blank, bytes_of, described, folds, quantizers, through
from harness.digits import trained
from harness.errors import Errors
from harness.layers import Layer, caught
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from xconv_fx.ops import SavedAs
from xconv_fx.planner import probe_ladder
from xconv_fx.units import format_size

PILOT = 32
VARIANCE_GOAL = 9.0


def trained_layers(steps: int, batch: int, console: Console) -> list[Layer]:
    """The convolutions of a trained network, in a training step on a held-out batch; images are channels-last."""
    started = time.perf_counter()
    network = trained(steps, 64, held_out=batch, layout=torch.channels_last)
    console.print(
        f"Trained {steps} steps in {time.perf_counter() - started:.0f} s: loss {network.loss:.3f} in the last one.",
        highlight=False,
    )
    layers = caught(network.net, network.images, network.classes)
    return [
        _numbered(place, layer) for place, layer in enumerate(layers, start=1) if isinstance(layer.module, nn.Conv2d)
    ]


def _numbered(place: int, layer: Layer) -> Layer:
    x, grad_out = (t.detach().contiguous(memory_format=torch.channels_last) for t in (layer.x, layer.grad_out))
    return dataclasses.replace(layer, name=f"{place}: {'x'.join(map(str, x.shape[1:]))}", x=x, grad_out=grad_out)


def gaussian(layer: Layer, probes: int) -> Tensor:
    """The reference: X Z Z^T / r with one Z for all samples, drawn whole."""
    rows = layer.x.flatten(1)
    z = torch.randn(rows.shape[1], probes)
    return ((rows @ z) @ z.t() / probes).view(layer.x.shape)


def coded(layer: Layer, held: SavedAs, draws: int) -> Errors:
    """Draws with the layer's input through a codec."""
    return sample(layer, lambda: through(layer.x, held), draws)


def sample(layer: Layer, estimate: Callable[[], Tensor], draws: int) -> Errors:
    """Of the weight gradient, with estimates of the layer's input."""
    errors = errors_of(layer.exact)
    for _ in range(draws):
        errors.add(layer.gradient(estimate()))
    return errors


def best(layer: Layer, candidates: list[SavedAs]) -> SavedAs:
    """The candidate of least error in a few draws."""
    return min(candidates, key=lambda held: coded(layer, held, PILOT).loss)


def compare(layer: Layer, compression: int, draws: int, table: Table) -> tuple[Errors, Errors]:
    """Adds the row of one layer and payload; returns the reference's draws and ours."""
    payload = layer.x.nbytes // compression
    probes = payload // (len(layer.x) * layer.x.element_size())
    reference = sample(layer, lambda: gaussian(layer, probes), draws)

    def ratio_of(held: SavedAs) -> str:
        return f"{reference.loss / coded(layer, held, draws).loss:.1f}"

    held = best(layer, folds(layer.x, payload, unit=layer.x.shape[1]))
    ours = coded(layer, held, draws)
    ratio = reference.loss / ours.loss
    doubt = ratio * math.hypot(reference.doubt, ours.doubt)
    part = ratio / VARIANCE_GOAL
    goal = f"met by {part:.2f}x" if part >= 1 else f"missed by {1 / part:.2f}x"
    planners, alone = "-", "-"
    if choices := [
        held for held in probe_ladder.probe_candidates(blank(layer.x, "probe"), ("fold",)) if bytes_of(held) <= payload
    ]:
        planners = f"{described(choices[0])}: {ratio_of(choices[0])}"
    if codes := [held for held in quantizers(layer.x) if bytes_of(held) <= payload]:
        alone = f"{codes[0].bits} bit{'s' * (codes[0].bits != 1)}: {ratio_of(codes[0])}"
    table.add_row(
        layer.name, f"{compression}x", format_size(payload), str(probes), f"{reference.relative:.3g}", described(held),
        format_size(bytes_of(held)), f"{ours.relative:.3g}", f"{ratio:.1f} ± {doubt:.1f}", goal, planners, alone,
    )  # fmt: skip
    return reference, ours


def noise_table(layers: list[Layer], compressions: Sequence[int], draws: int, console: Console) -> None:
    """The table, and what the draws say about bias."""
    title = f"Squared error of a weight gradient, relative to its square, of {draws} draws, batch {len(layers[0].x)}\n"
    title += f"Ratios are the Gaussian's error over that of ours (goal: {VARIANCE_GOAL:g}), planner's, quantize"
    table = Table(title=title, title_justify="left")
    headings = ("layer input", "of float32", "payload", "r", "Gaussian", "ours", "bytes", "error", "ratio", "goal")
    for heading in (*headings, "planner's", "quantize"):
        table.add_column(heading, justify="left" if heading in ("layer input", "ours", "planner's") else "right")
    drawn = []
    for layer in layers:
        drawn += [compare(layer, compression, draws, table) for compression in compressions]
        table.add_section()
    console.print(table)
    for name, samples in zip(("Gaussian", "ours"), zip(*drawn, strict=True), strict=True):
        found = verdict(samples)
        said = "unbiased as far as the draws tell" if found.unbiased else "BIASED"
        console.print(
            f"Mean over the draws, {name}: {said}; largest |t| {found.largest:.2f}, limit {found.limit:.2f}, exact "
            f"value within the 95% interval of {found.coverage:.1%} of coordinates.",
            highlight=False,
        )


def quantize_table(layers: list[Layer], draws: int, console: Console) -> None:
    table = Table(title="Codes without probes: relative squared error", title_justify="left")
    table.add_column("layer input")
    for held in quantizers(layers[0].x):
        table.add_column(f"{held.spec.bits} bit{'s' * (held.spec.bits != 1)}", justify="right")
    for layer in layers:
        cells = []
        for held in quantizers(layer.x):
            loss = coded(layer, held, draws).relative
            cells.append(f"{loss:.3g} at {layer.x.nbytes / bytes_of(held):.1f}x")
        table.add_row(layer.name, *cells)
    console.print(table)
