"""By what factor real activations are noisier, or less noisy, in a codec than the normal values it predicts for.

Measures the priors of `xconv_fx/noise/expected.py` on the inputs of the convolutions of a small network trained
on handwritten digits (that of harness/digits.py; the first input is the image, the others are rectified):

    deviation   energy of the deviations from the channels' means of each sample, of all energy
    codes       measured over predicted noise of quantised values, for 4, 2 and 1 bits
    sums        the same of what quantising adds to folded sums, median over compressions, bits, means or none

    python benchmarks/noise_priors.py
"""

from __future__ import annotations

import statistics

import torch
from harness.codes import COMPRESSIONS, bytes_of, folds, quantizers, through
from harness.errors import Errors
from harness.layers import Layer
from probes_noise import trained_layers
from rich.console import Console
from rich.table import Table
from torch import Tensor

from xconv_fx.ops import SavedAs, codec_of

DRAWS = 8


def measured(x: Tensor, held: SavedAs) -> float:
    """E|decoded - x|^2 / |x|^2 over a few draws."""
    errors = Errors(x)
    for _ in range(DRAWS):
        errors.add(through(x, held))
    return errors.relative


def deviation(x: Tensor) -> float:
    return float((x - x.mean((2, 3), keepdim=True)).square().sum() / x.square().sum())


def rounding_of_sums(x: Tensor, held: SavedAs) -> float:
    """Measured over predicted noise that the codes add to the sums."""
    exact = held.varied(bits=None)
    share = deviation(x) if held.spec.means else 1.0
    predict = codec_of("probe").noise
    return (measured(x, held) - measured(x, exact)) / share / (predict(held) - predict(exact))


def row_of(layer: Layer) -> list[str]:
    x = layer.x
    codes = [measured(x, held) / codec_of("quantize").noise(held) for held in quantizers(x)]
    sums = [
        rounding_of_sums(x, held)
        for compression in COMPRESSIONS
        for held in folds(x, x.nbytes // compression, unit=x.shape[1])
        if bytes_of(held) * compression <= x.nbytes
    ]
    return [
        layer.name,
        f"{deviation(x):.2f}",
        " ".join(f"{code:.2f}" for code in codes),
        f"{statistics.median(sums):.2f}",
    ]


def main() -> None:
    torch.manual_seed(0)
    console = Console()
    table = Table("layer input", "deviation", "codes", "sums")
    for layer in trained_layers(300, 32, console):
        table.add_row(*row_of(layer))
    console.print(table)


if __name__ == "__main__":
    main()
