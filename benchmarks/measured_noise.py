"""Is the noise that `xconv_fx.calibrate` predicts the noise that codecs make?

A small network is trained on handwritten digits (that of harness/digits.py) and calibrated on a held-out batch. For
each of its layers the input and the output gradient of that batch are caught; the input goes through every codec and
back, many times, and the variance of the weight gradient that PyTorch computes from what comes out is compared with
what the statistics predict, both relative to the layer's energy E. The goal is 30% for every layer and codec. A star
marks what misses it by more than the draws' own uncertainty (two standard errors).

    python benchmarks/measured_noise.py
    python benchmarks/measured_noise.py --layout contiguous --draws 256
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from harness.codes import through
from harness.digits import trained
from harness.errors import Errors
from harness.layers import Layer, caught
from rich.console import Console
from rich.table import Table
from torch import Tensor

import xconv_fx
from xconv_fx.codec_spec import CodecSpec
from xconv_fx.noise.expected import measured_noise
from xconv_fx.ops import SavedAs, fitting_probes

GOAL = 0.3
BITS, FOLDS, PROBES = (8, 4, 2, 1), (6, 48), 16
ORDERS = {"channels_last": (0, 2, 3, 1), "contiguous": (0, 1, 2, 3)}


def codecs(x: Tensor, order: tuple[int, ...]) -> Iterator[tuple[str, SavedAs]]:
    """What the layer's input is held as, with names."""
    blank: dict[str, Any] = {"size": tuple(x.shape), "dtype": x.dtype, "order": order}
    for bits in BITS:
        yield f"quantize, {bits} bits", SavedAs(CodecSpec("quantize", bits=bits), **blank)
    length = math.prod(x.shape[1:])
    for terms in FOLDS:
        if length // terms < 8:
            continue
        probes = fitting_probes(x.shape, order, length // terms)
        fold = SavedAs(CodecSpec("probe", probes=probes, kind="fold"), **blank)
        ways = [("", fold), (", 4 bits", fold.varied(bits=4)), (", 2 bits", fold.varied(bits=2))]
        if x.dim() > 2:
            ways += [(", means", fold.varied(means=True)), (", means, 2 bits", fold.varied(means=True, bits=2))]
        yield from ((f"fold of {terms}{how}", held) for how, held in ways)
    for kind in ("gaussian", "rademacher", "orthogonal"):
        yield f"{PROBES} {kind}", SavedAs(CodecSpec("probe", probes=PROBES, kind=kind), **blank)


def measured(layer: Layer, held: SavedAs, draws: int) -> Errors:
    """Of the weight gradient, when the layer's input goes through the codec."""
    errors = Errors(layer.exact)
    for _ in range(draws):
        errors.add(layer.gradient(through(layer.x, held)))
    return errors


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--layout", choices=sorted(ORDERS), default="channels_last")
    chosen = parser.parse_args(arguments)
    torch.manual_seed(0)
    network = trained(chosen.steps, 32, held_out=256)
    images, classes = network.images[: chosen.batch], network.classes[: chosen.batch]
    stats = xconv_fx.calibrate(network.net, F.cross_entropy, [(images, classes)])
    table = Table(
        "layer", "codec", title=f"variance of a weight gradient over E, {chosen.draws} draws, {chosen.layout}"
    )
    for column in ("predicted", "measured", "predicted / measured"):
        table.add_column(column, justify="right")
    worst, missed = 1.0, 0
    for layer in caught(network.net, images, classes):
        known = stats.layers[layer.name]
        order = ORDERS[chosen.layout] if layer.x.dim() == 4 else tuple(range(layer.x.dim()))
        for what, held in codecs(layer.x, order):
            predicted = measured_noise(held, known)
            errors = measured(layer, held, chosen.draws)
            value = errors.loss / known.energy
            ratio = predicted / value
            worst = max(worst, ratio, 1 / ratio)
            miss = abs(predicted - value) > (GOAL + 2 * errors.doubt) * value
            missed += miss
            cells = (f"{predicted:.3g}", f"{value:.3g} ± {errors.doubt:.0%}", f"{ratio:.2f}{'*' * miss}")
            table.add_row(layer.name, what, *cells)
        table.add_section()
    console = Console(width=100)
    console.print(table)
    console.print(f"Largest deviation {worst - 1:.0%}; {missed} beyond {GOAL:.0%}.", highlight=False)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
