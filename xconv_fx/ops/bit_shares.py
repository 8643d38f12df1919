"""The widths of `samples.share_bits`, found without sorting: for devices on which every operation is a launch.

`samples.least_noise` sorts what every sample's next width is worth and takes the best that the bits pay for. The place
of a number in that order is how many others come before it, so that every step is a sum of comparisons: a loop that
compilers generate as one kernel, with no table from the host and nothing that waits. It takes (3 samples)^2 comparisons
where a sort takes fewer, which pays as long as a batch has thousands of samples at most. Widths are the same.

Written for graphs: run eagerly, the comparisons are held, which is what a sort avoids.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

WIDTHS = (1, 2, 4, 8)
# What the next width costs in bits, and the noise that each of these takes away.
COSTS = [after - before for before, after in itertools.pairwise(WIDTHS)]
GAINS = [
    (1 / (2.0**before - 1) ** 2 - 1 / (2.0**after - 1) ** 2) / (after - before)
    for before, after in itertools.pairwise(WIDTHS)
]
# Samples that count for nothing are still told apart by the noise of their widths.
LEAST_WEIGHT = 1e-150
# How much the batch's mean gradient counts for each sample: what was noted is old, and some networks mix samples.
STALE, MIXED = 0.05, 0.5


def shares(ranges: Tensor, noted: Tensor, bits: int, mixed: bool) -> tuple[Tensor, Tensor]:
    """As `samples.share_bits`, of gradients that were `noted` (samples,), NaN where none were."""
    low, high = ranges.flatten(2).float()
    weights = (high - low).square().sum(1)
    known = noted + noted.mean() * (MIXED if mixed else STALE)
    widths = least_noise(weights * torch.where(known.isnan(), 1.0, known), bits)
    place = torch.arange(len(widths), device=widths.device)
    first = torch.where(place < place[:, None], widths, 0).sum(1)
    unit = torch.arange(len(widths) * bits, device=widths.device)
    sample = (first <= unit[:, None]).sum(1) - 1
    sample = torch.where(unit < widths.sum(), sample, 0)
    units = torch.stack((sample, widths[sample], unit - first[sample]))
    return torch.stack((widths, first)).int(), units.int()


def least_noise(weights: Tensor, average: int) -> Tensor:
    """As `samples.least_noise`."""
    weights = weights.double().nan_to_num(nan=torch.inf, posinf=torch.inf)
    weights = weights.minimum(weights.masked_fill(weights.isinf(), 0).amax())
    weights = weights.clamp(min=LEAST_WEIGHT)
    worth = torch.cat([weights * gain for gain in GAINS])
    costs = torch.cat([torch.full_like(weights, cost) for cost in COSTS])
    paid = torch.where(_comes_before(worth, including=True), costs, 0).sum(1)
    given = costs * (paid <= (average - WIDTHS[0]) * len(weights))
    widths = (WIDTHS[0] + given.view(len(COSTS), -1).sum(0)).long()
    for width, cost in zip(WIDTHS, COSTS, strict=False):
        # One more width for as many samples of this one as the bits that are left over pay for.
        left = average * len(widths) - widths.sum()
        rank = _comes_before(torch.where(widths == width, weights * GAINS[0], -1)).sum(1)
        widths = widths + cost * ((widths == width) & ((rank + 1) * cost <= left))
    return widths


def _comes_before(worth: Tensor, including: bool = False) -> Tensor:
    """Whether element j (a column) comes before element i (a row) in the order of descending worth, equals as they lie;
    `including` itself."""
    place = torch.arange(len(worth), device=worth.device)
    earlier = place <= place[:, None] if including else place < place[:, None]
    return (worth > worth[:, None]) | ((worth == worth[:, None]) & earlier)
