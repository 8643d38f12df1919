"""What noise the planner expects of a coded residual that it has not seen: the codec's prediction, and three priors.

Codecs predict their noise for independent normal values (`Codec.noise`). Inputs of convolutions are not that: most are
what a rectifier leaves, sparse and of one sign. `benchmarks/noise_priors.py` measures on the layers of a trained
network by what factor the prediction is off; the priors are medians of that. They decide between codecs at equal bytes:
means or more sums, few bits or more folding.

Known gap: priors, the same for every layer.
"""

from __future__ import annotations

from dataclasses import replace

from xconv_fx.ops import registry
from xconv_fx.ops.registry import Held

# Quantising rectified values: a group's range ends at zero, and zeros are coded without error.
RECTIFIED = 0.27
# Quantising sums of them: their tails are heavier than normal ones, which widens the range of a group.
HEAVY_TAILS = 1.4
# Energy of deviations from the channels' means, of all energy; normal values, rectified, keep 0.68.
DEVIATION = 0.7


def expected_noise(held: Held, *, rectified: bool) -> float:
    """E|decoded - x|^2 / E|x|^2; `rectified` says whether x is taken for the result of a ReLU or the like."""
    predict = registry.codec(held.codec).noise
    if held.codec != "probe":
        return predict(held) * (RECTIFIED if rectified else 1.0)
    folding = predict(replace(held, bits=None))
    share = DEVIATION if held.means and rectified else 1.0
    return share * (folding + HEAVY_TAILS * (predict(held) - folding))
