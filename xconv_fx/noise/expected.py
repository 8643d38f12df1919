"""What noise the planner expects of a coded residual: as measured on the user's data, or else by priors.

Codecs predict their noise for independent normal values (`Codec.noise`). Inputs of convolutions are not that: most are
what a rectifier leaves, sparse and of one sign, and large where gradients are. `xconv_fx.options.statistics` has, for
each layer that was measured, the noise of codes and by what factor that of sums is off; between the numbers of terms
that were measured, factors are interpolated on a logarithmic scale.

Without measurements there are three priors. `benchmarks/noise_priors.py` measures on the layers of a trained network by
what factor the prediction is off; the priors are medians of that. They decide between codecs at equal bytes: means or
more sums, few bits or more folding.

Known gap: priors, the same for every layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from xconv_fx.ops.codec import SavedAs, codec_of
from xconv_fx.ops.quantize import bits_of
from xconv_fx.options.statistics import Fold, LayerStatistics, Pairs

# Quantising rectified values: a group's range ends at zero, and zeros are coded without error.
RECTIFIED = 0.27
# Quantising sums of them: their tails are heavier than normal ones, which widens the range of a group.
HEAVY_TAILS = 1.4
# Energy of deviations from the channels' means, of all energy; normal values, rectified, keep 0.68.
DEVIATION = 0.7


def expected_noise(held: SavedAs, *, rectified: bool) -> float:
    """E|decoded - x|^2 / E|x|^2; `rectified` says whether x is taken for the result of a ReLU or the like."""
    predict = codec_of(held.spec.codec).noise
    if held.spec.codec != "probe":
        return predict(held) * (RECTIFIED if rectified else 1.0)
    folding = predict(held.varied(bits=None))
    share = DEVIATION if held.spec.means and rectified else 1.0
    return share * (folding + HEAVY_TAILS * (predict(held) - folding))


def measured_noise(held: SavedAs, layer: LayerStatistics) -> float:
    """The variance that the codec adds to the gradient of a layer that was measured, over the layer's energy E."""
    layout = layer.layout(held.order)
    if held.spec.codec != "probe":
        return dict(layout.codes)[bits_of(held)]
    predict = codec_of("probe").noise
    folding = predict(held.varied(bits=None))
    rounding = predict(held) - folding
    if held.spec.kind != "fold":
        return _dense(held, layer, folding, rounding)
    folds = layout.deviations if held.spec.means else layout.folds
    if not folds:  # Too small for sums: never offered, but a user may ask for it.
        return expected_noise(held, rectified=True)
    terms = math.prod(held.size[1:]) / (held.spec.probes or 1)
    noise = folding * _at(terms, folds, lambda fold: fold.folding)
    if rounding:
        noise += rounding * _at(terms, folds, lambda fold: _nearest(fold.rounding, bits_of(held)))
    return noise


def _dense(held: SavedAs, layer: LayerStatistics, folding: float, rounding: float) -> float:
    """One projection serves all samples: pairs of them count by how many other samples there are for each."""
    spread = layer.deviation if held.spec.means else layer.plain
    if spread is None:
        return expected_noise(held, rectified=True)
    others = (held.size[0] - 1) / max(1, layer.samples - 1)
    return folding * (spread.own + others * spread.cross + spread.coherent) + rounding * spread.own


def _at(terms: float, folds: Sequence[Fold], read: Callable[[Fold], float]) -> float:
    return float(np.interp(math.log(terms), [math.log(fold.terms) for fold in folds], [read(fold) for fold in folds]))


def _nearest(rounding: Pairs, bits: int) -> float:
    """Of the widths that were measured, the value of the one nearest to `bits`."""
    return min(rounding, key=lambda pair: abs(pair[0] - bits))[1]
